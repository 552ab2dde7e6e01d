"""Contractions of a model's own, such as ``x @ w``, einsums, tied heads and adapters, in a rule's terms."""

import dataclasses
import string
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfa.base import Layer, LayerFeedback, feedback_dataclass, transpose
from jaxfa.jaxprs.contractions import Contraction
from jaxfa.jaxprs.weights import over_stack, shape_of
from jaxfa.nn.weights.views import Bound, Call, Groups, Matrices, Whole, of_einsum, roles
from jaxfa.ops import CHOICE, with_feedback


class OwnSite(NamedTuple):
    """A contraction with a feedback of its own, the same in every call.

    Attributes:
      name: the path of the parameter.
      mark: which function of the parameters the weights are.
      levels: as :class:`jaxfa.jaxprs.weights.Weight`'s.
      view: how a rule sees the weights, as matrices.
      is_vector: whether the weights have one output and no axis for it.
      thin: whether a rule may give the weights another number of outputs.
    """

    name: str
    mark: str
    levels: tuple[str, ...]
    view: Whole | Groups | Matrices
    is_vector: bool
    thin: bool

    def matrices(self, w: jax.Array) -> jax.Array:
        """The weights of one layer as rules see them."""
        return self.view.matrices(w[..., None] if self.is_vector else w)


def site_of(found: Contraction) -> OwnSite | None:
    """The site of a contraction; None where it cannot be followed."""
    weight = found.weight
    if weight.root is None or weight.tail is None:
        return None
    view = _conv_view(found) if found.eqn.primitive.name == "conv_general_dilated" else _dot_view(found)
    if view is None:
        return None
    is_vector = isinstance(view, Matrices) and len(view.permutation) > len(weight.shape)
    return OwnSite(weight.name, weight.mark, weight.levels, roles(view), is_vector, weight.thin)


def _dot_view(found: Contraction) -> Whole | Matrices | None:
    weight, (contracted, outputs) = found.weight, found.roles()
    if weight.thin:
        view = of_einsum(*_einsum(found))
        return view if isinstance(view, Matrices) else None
    if contracted & outputs:
        return None
    batch = [axis for axis in range(len(weight.shape)) if axis not in contracted | outputs]
    order = (*batch, *sorted(contracted), *sorted(outputs))
    return Matrices(order, tuple(weight.shape[axis] for axis in order), len(batch), len(outputs))


def _einsum(found: Contraction) -> tuple[str, tuple[int, ...]]:
    """The subscripts ``"x,kernel->result"`` of a ``dot_general``, and the kernel's shape: it has an output's axis."""
    at, numbers, shape = found.at, found.eqn.params["dimension_numbers"], found.weight.shape
    w = list(string.ascii_lowercase[: len(shape)])
    x = list(string.ascii_uppercase[: len(shape_of(found.eqn.invars[1 - at]))])
    for sides in numbers:
        for i, j in zip(sides[at], sides[1 - at], strict=True):
            x[j] = w[i]
    batch = [w[axis] for axis in numbers[1][at]]
    used = {w[axis] for axis in numbers[0][at]} | set(batch)
    own, rest = [axis for axis in w if axis not in used], [axis for axis in x if axis not in used]
    result = [*batch, *own, *rest] if at == 0 else [*batch, *rest, *own]
    if not own:
        w, result, shape = [*w, "z"], [*result, "z"], (*shape, 1)
    return f"{''.join(x)},{''.join(w)}->{''.join(result)}", shape


def _conv_view(found: Contraction) -> Whole | Groups | None:
    params = found.eqn.params
    x, w, y = params["dimension_numbers"]
    if found.at != 1 or params["batch_group_count"] != 1 or len(found.weight.axes) != len(found.weight.shape):
        return None
    order, last = (*w[2:], w[1], w[0]), len(w) - 1
    groups = params["feature_group_count"]
    if groups == 1:
        return Whole(order)
    # A group is a slice of the channels, which a rule finds on the last axis.
    return Groups(groups) if order == tuple(range(len(w))) and x[1] == y[1] == last else None


@feedback_dataclass
class Viewed(LayerFeedback):
    """The feedback of matrices in the place of weights that hold them in another way.

    Attributes:
      feedback: one for each index of the view's batch axes; its rule says which matrix takes the weights' place.
      view: how the weights are seen as matrices.
    """

    feedback: Any
    view: Any = dataclasses.field(metadata={"static": True})

    def matrix(self, w: jax.Array) -> jax.Array:
        b = self._each(lambda feedback, w: feedback.matrix(w).astype(w.dtype))(self.feedback, self.view.matrices(w))
        # The view only moves entries, so that its transpose is its inverse.
        return transpose(self.view.matrices, w, b)

    def signal(self, x: jax.Array, w: jax.Array, delta: jax.Array, dw: jax.Array) -> "Viewed":
        learn = self._each(lambda feedback, w, dw: feedback.signal(x, w, delta, dw))
        return Viewed(learn(self.feedback, self.view.matrices(w), self.view.matrices(dw)), self.view)

    def _each(self, of_one: Callable[..., Any]) -> Callable[..., Any]:
        for _ in range(self.view.batch):
            of_one = jax.vmap(of_one)
        return of_one


def contract(found: Contraction, site: OwnSite, feedback: LayerFeedback) -> jax.Array:
    """The contraction, forward as it is, backward by the rule."""
    weight, x, w = found.weight, found.x.here, found.weight.here()
    constants = [value.here for value in weight.constants]
    if not site.thin:
        return with_feedback(partial(_chosen, found))(x, w, Viewed(feedback, site.view), *constants)
    bound = _bound(found, site, x, constants)
    run = with_feedback(bound.op)
    for _ in range(site.view.batch):
        run = jax.vmap(run)
    y = bound.join(run(bound.split(x), site.matrices(w), feedback))
    return y[..., 0] if site.is_vector else jnp.moveaxis(y, -1, _last(found))


def _bound(found: Contraction, site: OwnSite, x: Any, constants: list[Any]) -> Bound:
    """The contraction in a rule's terms, with its channels last."""

    def run(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
        return _evaluate(found, x, found.weight.valued(kernel, *constants), **options)

    def operation(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
        if not site.is_vector:
            return jnp.moveaxis(run(x, kernel, **options), _last(found), -1)
        if kernel.shape[-1] == 1:
            return run(x, kernel[..., 0])[..., None]
        return jax.vmap(run, (None, -1), -1)(x, kernel)

    view = of_einsum(*_einsum(found)) if found.eqn.primitive.name == "dot_general" else site.view
    return view.bind(Call(operation), x)


def _last(found: Contraction) -> int:
    """The axis of the result that counts outputs, if there is one alone."""
    return -1 if found.eqn.primitive.name == "dot_general" else found.eqn.params["dimension_numbers"].out_spec[1]


def layer_of(found: Contraction, site: OwnSite) -> Layer:
    """The :class:`jaxfa.Layer` of a contraction that was looked through; a stack's is vectorised."""
    aval: Any = found.eqn.invars[1 - found.at].aval
    w = weights_of(found, site)
    bound = _bound(found, site, aval, [value.made() for value in found.weight.constants])
    x = jax.eval_shape(bound.split, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    layers = w.shape[: len(site.levels) + site.view.batch]
    op = bound.op
    for _ in layers:
        op = jax.vmap(op)
    return Layer(op, jax.ShapeDtypeStruct((*layers, *x.shape[site.view.batch :]), x.dtype), w)


def weights_of(found: Contraction, site: OwnSite) -> jax.Array:
    """The weights of a contraction that was looked through as rules see them, a stack's layers in front."""
    return over_stack(site.matrices, site.levels)(found.weight.stacked().astype(found.weight.dtype))


def _chosen(found: Contraction, x: jax.Array, w: jax.Array, *constants: jax.Array) -> jax.Array:
    """The contraction as a function of the base, from which the constants choose."""
    with jax.named_scope(CHOICE):
        w = found.weight.valued(w, *constants)
    return _evaluate(found, x, w)


def _evaluate(found: Contraction, x: jax.Array, w: jax.Array, **options: Any) -> jax.Array:
    operands = (w, x) if found.at == 0 else (x, w)
    return found.eqn.primitive.bind(*operands, **found.eqn.params | options)
