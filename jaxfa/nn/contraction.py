"""Layer-wise rules: where a Flax layer contracts its input with weights, and what takes that place."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxfa.base import Layer, LayerFeedback
from jaxfa.nn.variables import Feedback, Recorder, intercept, modules_of, release
from jaxfa.ops import with_feedback


class View(NamedTuple):
    """A kernel of many axes as the matrix ``(inputs, outputs)`` that rules are written for."""

    permutation: tuple[int, ...]
    permuted: tuple[int, ...]
    matrix: tuple[int, int]

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        return kernel.transpose(self.permutation).reshape(self.matrix)

    def to_kernel(self, matrix: jax.Array) -> jax.Array:
        inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        return matrix.reshape(self.permuted).transpose(inverse)


class Site(NamedTuple):
    """Where a layer contracts: the attribute that holds its operation, and the shape of one kernel.

    A kernel with more axes than ``shape`` is a stack of layers, made by ``nnx.vmap`` and run by ``nnx.scan``.
    """

    attribute: str
    operation: Callable[..., jax.Array]
    shape: tuple[int, ...]
    view: View | None = None

    def stack(self, kernel: jax.Array) -> tuple[int, ...]:
        """The leading axes of a kernel that count the layers of a stack; ``()`` for a single layer."""
        leading = kernel.ndim - len(self.shape)
        if kernel.shape[leading:] != self.shape:
            raise ValueError(f"Weights {kernel.shape} are no stack of {self.shape}: stack layers on axis 0.")
        return kernel.shape[:leading]

    def matrix(self, kernel: jax.Array) -> jax.Array:
        """The kernel, or each of a stack's, as rules see it."""
        if self.view is None:
            return kernel
        to_matrix: Callable[[jax.Array], jax.Array] = self.view.to_matrix
        for _ in self.stack(kernel):
            to_matrix = jax.vmap(to_matrix)
        return to_matrix(kernel)


def find_site(module: Any) -> Site | None:
    """The site of a layer that a rule can be put on; None for any other module."""
    match module:
        case nnx.Linear():
            return Site("dot_general", module.dot_general, (module.in_features, module.out_features))
        case nnx.LinearGeneral():
            made = module.dot_general_cls() if module.dot_general_cls is not None else module.dot_general
            batch, inputs = tuple(module.batch_axis.values()), (*module.in_features, *module.out_features)
            matrix = (math.prod(module.in_features), math.prod(module.out_features))
            view = None if batch else View(tuple(range(len(inputs))), inputs, matrix)
            return Site("dot_general", made or lax.dot_general, (*batch, *inputs), view)
        case nnx.Einsum():
            return Site("einsum_op", module.einsum_op, tuple(module.kernel_shape), _einsum_view(module))
        case nnx.Conv() if module.mask is None:
            return Site("conv_general_dilated", module.conv_general_dilated, tuple(module.kernel_shape))
        case nnx.ConvTranspose() if module.mask is None:
            return Site("conv_transpose", _bare_conv_transpose(module), tuple(module.kernel_shape))
    return None


def sites_of(model: nnx.Module) -> dict[str, tuple[Any, Site]]:
    """The layers of a model that a rule can be put on, by path, each with its site."""
    sites = {path: (module, find_site(module)) for path, module in modules_of(model)}
    return {path: (module, site) for path, (module, site) in sorted(sites.items()) if site is not None}


def _einsum_view(module: nnx.Einsum) -> View | None:
    shape = tuple(module.kernel_shape)
    operands, _, result = (module.einsum_str or ",").partition("->")
    lhs, kernel = operands.split(",")
    if len(kernel) != len(shape) or "." in kernel:
        return None  # subscripts given at the call, or an ellipsis: the axes are not known here
    inputs = [i for i, axis in enumerate(kernel) if axis not in result]
    outputs = [i for i, axis in enumerate(kernel) if axis in result]
    if any(kernel[i] in lhs for i in outputs):
        return None  # a batch axis: one matrix per index, which is no single matrix
    permuted = tuple(shape[i] for i in inputs + outputs)
    matrix = (math.prod(shape[i] for i in inputs), math.prod(shape[i] for i in outputs))
    return View((*inputs, *outputs), permuted, matrix)


def _bare_conv_transpose(module: nnx.ConvTranspose) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """``(x, kernel) -> y`` without the bias: ConvTranspose has no attribute for its operation."""
    bare = nnx.clone(module)
    bare.bias, bare.use_bias = nnx.data(None), False
    graphdef, state = nnx.split(bare)
    return functools.partial(_run_bare, graphdef, jax.tree.structure(state))


def _run_bare(graphdef: Any, structure: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, jax.tree.unflatten(structure, [kernel]))(x)


class Contraction(nnx.Module):
    """Takes the place of a layer's ``dot_general``, ``einsum`` or convolution and gives it the rule's backward."""

    def __init__(self, site: Site, feedback: LayerFeedback, path: str) -> None:
        self.site = nnx.static(site)
        self.path = path
        self.feedback = Feedback(feedback)
        self.recorder: Recorder | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Runs the layer's own operation on ``(x, kernel, ...)``, an einsum's on ``(subscripts, x, kernel, ...)``."""
        lead = int(isinstance(args[0], str))
        before, (x, kernel), after = args[:lead], args[lead : lead + 2], args[lead + 2 :]
        view, operation = self.site.view, self.site.operation

        def op(x: jax.Array, w: jax.Array) -> jax.Array:
            return operation(*before, x, w if view is None else view.to_kernel(w), *after, **kwargs)

        if self.recorder is not None:
            self.recorder.record(self.path, (op, jax.ShapeDtypeStruct(x.shape, x.dtype)))
        return with_feedback(op)(x, kernel if view is None else view.to_matrix(kernel), self.feedback.get_value())


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
    stack = contraction.site.stack(kernel)
    for _ in stack:
        op = jax.vmap(op)
    x = jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype)
    return Layer(op, x, contraction.site.matrix(kernel))
