"""Layer-wise rules: where a Flax layer contracts its input with weights, and what takes that place."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxfa.base import Layer, LayerFeedback
from jaxfa.delivery import undifferentiated
from jaxfa.jaxprs.contractions import layer_scope
from jaxfa.nn.model.program import is_transformed
from jaxfa.nn.model.variables import REFUSAL, Feedback, Recorder, intercept, modules_of, release
from jaxfa.nn.weights.factored import Factored
from jaxfa.nn.weights.views import Call, Factorised, Groups, Matrices, View, Whole, of_einsum, roles
from jaxfa.ops import with_feedback


class Site(NamedTuple):
    """A layer's contraction: the attribute that holds its operation, and the shape of one kernel.

    A kernel with more axes than ``shape`` is a stack of layers, made by ``nnx.vmap`` and run by ``nnx.scan``.
    """

    attribute: str
    operation: Callable[..., jax.Array]
    shape: tuple[int, ...]
    view: View

    def stack(self, kernel: jax.Array) -> tuple[int, ...]:
        """The leading axes of a kernel that count the layers of a stack; ``()`` for a single layer."""
        leading = kernel.ndim - len(self.shape)
        if kernel.shape[leading:] != self.shape:
            raise ValueError(f"Weights {kernel.shape} are no stack of {self.shape}: stack layers on axis 0.")
        return kernel.shape[:leading]

    def layers(self, kernel: jax.Array) -> tuple[int, ...]:
        """The axes of :meth:`matrices` before a rule's: the stack's, then the groups' or the batch's."""
        return self.matrices(kernel).shape[: len(self.stack(kernel)) + self.view.batch]

    def matrices(self, kernel: jax.Array) -> jax.Array:
        """The kernel, or each of a stack's, as rules see it."""
        matrices: Callable[[jax.Array], jax.Array] = self.view.matrices
        for _ in self.stack(kernel):
            matrices = jax.vmap(matrices)
        return matrices(kernel)


def find_site(module: Any) -> Site | None:
    """The site of a layer that a rule can be put on; None for any other module."""
    site = None
    match module:
        case Factored():
            site = Site("operation", module.operation, module.shape, Factorised())
        case nnx.Linear():
            site = Site("dot_general", module.dot_general, (module.in_features, module.out_features), Whole((0, 1)))
        case nnx.LinearGeneral():
            made = module.dot_general_cls() if module.dot_general_cls is not None else module.dot_general
            batch = tuple(module.batch_axis.values())
            shape = (*batch, *module.in_features, *module.out_features)
            view = Matrices(tuple(range(len(shape))), shape, len(batch), len(module.out_features))
            site = Site("dot_general", made or lax.dot_general, shape, view)
        case nnx.Einsum():
            shape = tuple(module.kernel_shape)
            site = Site("einsum_op", module.einsum_op, shape, of_einsum(module.einsum_str, shape))
        case nnx.Conv() if module.mask is None:
            shape, groups = tuple(module.kernel_shape), module.feature_group_count
            seen = Groups(groups) if groups > 1 else Whole(tuple(range(len(shape))))
            site = Site("conv_general_dilated", module.conv_general_dilated, shape, seen)
        case nnx.ConvTranspose() if module.mask is None:
            *window, n, m = range(len(module.kernel_shape))
            order = (*window, m, n) if module.transpose_kernel else (*window, n, m)
            site = Site("conv_transpose", BareConvTranspose.of(module), tuple(module.kernel_shape), Whole(order))
    return site


def sites_of(model: nnx.Module) -> dict[str, tuple[Any, Site]]:
    """The layers of a model that a rule can be put on, by path, each with its site."""
    sites = {path: (module, find_site(module)) for path, module in modules_of(model)}
    return {path: (module, site) for path, (module, site) in sorted(sites.items()) if site is not None}


@dataclasses.dataclass(frozen=True)
class BareConvTranspose:
    """``(x, kernel) -> y`` without the bias: ConvTranspose has no attribute for its operation."""

    graphdef: Any
    structure: Any

    @classmethod
    def of(cls, module: nnx.ConvTranspose) -> "BareConvTranspose":
        """That of a layer."""
        bare = nnx.clone(module)
        bare.bias, bare.use_bias = nnx.data(None), False
        graphdef, state = nnx.split(bare)
        return cls(graphdef, jax.tree.structure(state))

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The transposed convolution."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.structure, [kernel]))(x)


class Contraction(nnx.Module):
    """Takes the place of a layer's ``dot_general``, ``einsum`` or convolution and gives it the rule's backward.

    Without feedback it says in a traced program what the layer's operation is.
    """

    def __init__(self, site: Site, feedback: LayerFeedback | None, path: str) -> None:
        self.site = nnx.static(site)
        self.path = path
        self.feedback: Any = nnx.data(None) if feedback is None else Feedback(feedback)
        self.is_audited = False  # in a run of the attached model
        self.recorder: Recorder | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Runs the layer's own operation on ``(x, kernel, ...)``, an einsum's on ``(subscripts, x, kernel, ...)``."""
        if self.feedback is None:
            with jax.named_scope(layer_scope(self.path)):
                return self.site.operation(*args, **kwargs)
        lead = int(isinstance(args[0], str))
        before, (x, kernel), after = args[:lead], args[lead : lead + 2], args[lead + 2 :]
        call = Call(self.site.operation, before, tuple(map(_frozen, after)), tuple(sorted(kwargs.items())))
        view, feedback = self._view(*before or [None]), self.feedback.get_value()
        if self.recorder is not None:
            bound = view.bind(call, x)
            inputs = bound.split(x)
            one = jax.ShapeDtypeStruct(inputs.shape[view.batch :], inputs.dtype)
            self.recorder.record(self.path, (bound.op, one))
        contract = _contract_once if is_transformed() and _is_shared(view, call, feedback) else _contract
        y = contract(view, call, x, kernel, feedback)
        return y if self.is_audited or not is_transformed() else undifferentiated(REFUSAL.format(repr(self.path)), y)

    def _view(self, subscripts: str | None) -> View:
        """The kernel's view by the subscripts of this call, which may be others than the layer was made with."""
        made = self.site.view
        if subscripts is None:
            return made
        asked = of_einsum(subscripts, self.site.shape)
        if roles(asked) != roles(made):
            raise ValueError(
                f"The einsum {self.path!r} is called with {subscripts!r}, in which its kernel's axes have other roles "
                f"than in the subscripts that it was made with, for which its feedback is. Make the layer with these."
            )
        return asked


def _contract(view: View, call: Call, x: jax.Array, kernel: Any, feedback: LayerFeedback) -> jax.Array:
    """A layer's operation with the rule's backward."""
    bound = view.bind(call, x)
    run = with_feedback(bound.op)
    for _ in range(view.batch):
        run = jax.vmap(run)
    return bound.join(run(bound.split(x), view.matrices(kernel), feedback))


# Layers that are alike are traced once, in one network and from trace to trace.
_contract_once = jax.jit(_contract, static_argnums=(0, 1), inline=True)


def _is_shared(view: View, call: Call, feedback: LayerFeedback) -> bool:
    """Whether equal calls are one program: an operation of the user's own may read what changes between them."""
    try:
        hash((call, jax.tree.structure(feedback)))
    except TypeError:
        return False
    return isinstance(view, Factorised) or call.operation in (lax.dot_general, lax.conv_general_dilated, jnp.einsum)


def _frozen(value: Any) -> Any:
    """Lists, as Flax's of a convolution's padding, as tuples, which have a hash."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def contractions_of(model: nnx.Module) -> dict[str, Contraction]:
    """What a layer-wise rule was put on, by the path of the layer."""
    found = {module.path: module for _, module in modules_of(model) if isinstance(module, Contraction)}
    return dict(sorted(found.items()))


def audited(model: nnx.Module) -> None:
    """Lets a copy of a model that a rule was put on be differentiated."""
    for contraction in contractions_of(model).values():
        contraction.is_audited = True


def _contracted_conv_transpose(self: Any, own_call: Any, inputs: jax.Array) -> jax.Array:
    """``nnx.ConvTranspose`` with its convolution through the layer's :class:`Contraction`."""
    del own_call
    bias = None if self.bias is None else self.bias[...]
    inputs, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
    y = self.conv_transpose(inputs, kernel)
    return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


def place(module: Any, contraction: Contraction) -> None:
    """Puts a contraction where the layer will call it."""
    if isinstance(module, nnx.ConvTranspose):
        intercept(module, _contracted_conv_transpose)
    if isinstance(module, nnx.LinearGeneral):
        module.dot_general_cls = None  # it would be preferred; the site's operation is already made by it
    setattr(module, contraction.site.attribute, nnx.data(contraction))


def restore(module: Any) -> None:
    """Undoes :func:`place`, where it was done."""
    for name, contraction in list(vars(module).items()):
        if isinstance(contraction, Contraction):
            delattr(module, name)
            if isinstance(module, nnx.ConvTranspose):
                release(module)
            else:
                setattr(module, name, nnx.static(contraction.site.operation))


def layer_of(contraction: Contraction, kernel: jax.Array, recorded: tuple[Any, Any]) -> Layer:
    """The :class:`jaxfa.Layer` of a contraction, from what its forward pass recorded; a stack's is vectorised."""
    op, x = recorded
    layers = contraction.site.layers(kernel)
    for _ in layers:
        op = jax.vmap(op)
    x = jax.ShapeDtypeStruct((*layers, *x.shape), x.dtype)
    return Layer(op, x, contraction.site.matrices(kernel))
