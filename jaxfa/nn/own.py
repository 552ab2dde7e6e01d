"""Contractions that a model makes by itself, outside of Flax's layers: ``x @ w``, einsums, tied heads, adapters."""

import dataclasses
import string
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import DictKey

from jaxfa.base import LayerFeedback, Rule, init_at, register, transpose
from jaxfa.follow import Contraction, Follower
from jaxfa.nn.program import Example, Program
from jaxfa.nn.variables import Feedback, init_stack, structs
from jaxfa.nn.views import Call, Groups, Matrices, Whole, of_einsum, roles
from jaxfa.ops import CHOICE, with_feedback
from jaxfa.weights import Value, base


class OwnSite(NamedTuple):
    """A contraction with a feedback of its own, the same in every call.

    Attributes:
      name: the path of the parameter.
      mark: which function of the parameters the weights are.
      levels: as :class:`jaxfa.weights.Weight`'s.
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
    x = list(string.ascii_uppercase[: found.eqn.invars[1 - at].aval.ndim])
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


@register
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
    is_dot = found.eqn.primitive.name == "dot_general"
    last = -1 if is_dot else found.eqn.params["dimension_numbers"].out_spec[1]

    def operation(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
        kernel = weight.tail(kernel[..., 0] if site.is_vector else kernel, *constants)
        y = _evaluate(found, x, kernel, **options)
        return y[..., None] if site.is_vector else jnp.moveaxis(y, last, -1)

    view = of_einsum(*_einsum(found)) if is_dot else site.view
    bound = view.bind(Call(operation, (), (), {}), x)
    run = with_feedback(bound.op)
    for _ in range(view.batch):
        run = jax.vmap(run)
    y = bound.join(run(bound.split(x), site.matrices(w), feedback))
    return y[..., 0] if site.is_vector else jnp.moveaxis(y, -1, last)


def _chosen(found: Contraction, x: jax.Array, w: jax.Array, *constants: jax.Array) -> jax.Array:
    """The contraction as a function of the base, from which the constants choose."""
    with jax.named_scope(CHOICE):
        w = found.weight.tail(w, *constants)
    return _evaluate(found, x, w)


def _evaluate(found: Contraction, x: jax.Array, w: jax.Array, **options: Any) -> jax.Array:
    operands = (w, x) if found.at == 0 else (x, w)
    return found.eqn.primitive.bind(*operands, **found.eqn.params | options)


class OwnContraction(nnx.Module):
    """The feedback of a contraction that no layer makes."""

    def __init__(self, site: OwnSite, feedback: LayerFeedback) -> None:
        self.site = nnx.static(site)
        self.path = site.name
        self.feedback = Feedback(feedback)


class Survey(NamedTuple):
    """The contractions of a model that have no feedback.

    Attributes:
      sites: where a rule can be put, with what is there.
      lost: the parameters that cannot be followed to where they are contracted.
      tables: the parameters that data looked something up in.
    """

    sites: dict[OwnSite, Contraction]
    lost: set[str]
    tables: set[str]


def survey(model: nnx.Module, call: Callable[..., Any], example: Example) -> Survey:
    """Looks through a model's forward pass."""
    found = Survey({}, set(), set())

    def see(one: Contraction, held: Any) -> None:
        site = site_of(one)
        if site is None:
            found.lost.add(one.weight.name)
        else:
            found.sites.setdefault(site, one)

    program = Program(model, call, *example.arguments(), *_KINDS)
    jaxpr = jax.make_jaxpr(lambda *states: program.run(*states)[0])(*structs(program.states))
    follower = Follower(see, found.lost.add, live=False)
    follower.run(jaxpr, _values(program.states, live=False), None)
    return found._replace(tables=follower.tables)


def call_with_feedback(model: nnx.Module, call: Callable[..., Any], own: Any, left: Any, args: Any, kwargs: Any) -> Any:
    """Runs a model whose own contractions have feedback.

    Args:
      model: the model.
      call: the function ``(model, ...)`` to run.
      own: the :class:`OwnContraction` of each.
      left: the parameters that are left to backpropagation.
      args: positional arguments.
      kwargs: keyword arguments.
    """
    held = {one.site: one.feedback.get_value() for one in own}

    def act(found: Contraction, held: Any) -> jax.Array | None:
        site, name = site_of(found), found.weight.name
        if site in held:
            return contract(found, site, held[site])
        if name in left:
            return None
        raise ValueError(
            f"This call contracts {name!r} as the example did not, so that there is no feedback for it: give attach() "
            f"an example of this call, or allow={name!r}."
        )

    program = Program(model, call, args, kwargs, *_KINDS)
    jaxpr, returned = jax.make_jaxpr(program.run, return_shape=True)(*structs(program.states))
    values = Follower(act, lambda name: None, live=True).run(jaxpr, _values(program.states, live=True), held)
    return program.finish(*jax.tree.unflatten(jax.tree.structure(returned), [value.here for value in values]))


def _is_own(path: Any, value: Any, kind: type = object) -> bool:
    return path[0] == 0 and isinstance(value, kind)


_KINDS = (partial(_is_own, kind=nnx.Param), _is_own)


def _values(states: Any, *, live: bool) -> list[Value]:
    """What is known of a model's parameters, its other state and its arguments."""
    params, state, data = states
    values = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = "/".join(str(key.key) for key in path[1:] if isinstance(key, DictKey))
        here = leaf if live else None
        weight = base(name, name, leaf, lambda leaf=leaf: leaf, lambda leaf=leaf: leaf, leaf.dtype)
        values.append(Value(here, lambda leaf=leaf: leaf, learns=True, weight=weight))
    values += [Value(leaf if live else None, lambda leaf=leaf: leaf) for leaf in jax.tree.leaves(state)]
    return values + [Value(leaf if live else None, data=True) for leaf in jax.tree.leaves(data)]


def put_own(rule: Rule, rngs: nnx.Rngs, found: Survey, is_chosen: Any) -> list[OwnContraction]:
    """Feedback for a model's own contractions."""
    own = []
    for site, one in found.sites.items():
        if not is_chosen(site.name):
            continue
        root: Any = one.weight.root
        w, matrices = root().astype(one.weight.dtype), site.matrices
        for _ in site.levels:
            matrices = jax.vmap(matrices)
        w = matrices(w)
        layers = w.shape[: len(site.levels) + site.view.batch]
        feedback = init_stack(init_at(rule, path=site.name), rngs.feedback(), layers, w)
        plain = feedback is None or (not site.thin and type(feedback).transport is not LayerFeedback.transport)
        own += [] if plain else [OwnContraction(site, feedback)]
    return own
