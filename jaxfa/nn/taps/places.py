"""The places of a model that may be tapped, as abstract forward passes come to them."""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr

from jaxfa.jaxprs.cuts import mark, marked
from jaxfa.jaxprs.versions import opened
from jaxfa.nn.model.leaves import at_leaves, error_in, first_input, named_floats
from jaxfa.nn.model.program import Example, Program, method_of
from jaxfa.nn.model.variables import Recorder, intercept, leaf_name, modules_of, structs
from jaxfa.nn.taps.tap import Held, Place
from jaxfa.nn.weights.survey import Survey, look_through, program_of


class Forward(NamedTuple):
    """A forward pass, traced once for all that is asked of it, with its places.

    Attributes:
      program: the call.
      jaxpr: from the model's arrays and its arguments to the logits, and to all else that it returns and changes.
      to_logits: what of that the logits depend on.
      learns: the parameters.
      seen: what was seen at the places.
      error: the logits' shape.
      factor: how many times larger than the example's the batch is in all of these, by which its axis is known; 0 where
        the model runs with no other batch than it has.
      modules: the paths of the modules with parameters that the logits depend on, in the order of their calls.
    """

    program: Program
    jaxpr: Any
    to_logits: Any
    learns: frozenset[str]
    seen: Recorder
    error: Any
    factor: int
    modules: list[str]

    def survey(self, places: Iterable[Place]) -> Survey:
        """The contractions in it, where these places are tapped."""
        tapped = {place.path for place in places if place.kind == "parameter"}
        return look_through(self.program, self.jaxpr, tapped)

    def holds_examples(self, place: str) -> bool:
        """Whether an error can be delivered there: examples come first, in every call alike."""
        first, *others = self.seen.calls.get(place, [{}])
        return all(other == first for other in others) and any(map(self.is_alike, first.values()))

    def is_alike(self, leaf: Any) -> bool:
        """Whether an array has as many examples as the logits have."""
        return bool(leaf.shape[:1] == self.error.shape[:1])

    def doubtful(self) -> set[int]:
        """The sizes of all axes but the first, if the factor divides any, by accident or as another of the batch's."""
        leaves = [leaf for calls in self.seen.calls.values() for one in calls for leaf in one.values()]
        sizes = {size for leaf in (self.error, *leaves) if self.is_alike(leaf) for size in leaf.shape[1:]}
        return sizes if any(size % self.factor == 0 for size in sizes) else set()

    def why_not(self, weights: list[str]) -> str:
        """Why no error can be delivered below these weights."""
        for weight in weights:
            for path in self.modules:
                leaves = [leaf for one in self.seen.calls.get(f"input of {path}", ()) for leaf in one.values()]
                if path and _inside(weight, path) and leaves and not self.holds_examples(f"input of {path}"):
                    shape, (n, *_) = true_size(leaves[0], self.factor).shape, true_size(self.error, self.factor).shape
                    return f"what {path!r} reads, of shape {shape}, has no axis of the logits' {n} examples first"
        return "what is below it is no module's input"

    def children(self, path: str) -> list[str]:
        """The modules that were called of those inside a module, but for those inside them."""
        inside = [other for other in self.modules if other and other != path and _inside(other, path)]
        return [one for one in inside if not any(one != other and _inside(one, other) for other in inside)]

    def at_taps(self, held: dict[str, Held]) -> Recorder:
        """What was seen at taps, in the order of the pass; at a parameter, that."""
        found, taps = Recorder(), {}
        for path, one in held.items():
            taps[f"{one.tap.place.kind} of {one.tap.place.path}"] = path
            if one.parameter is not None:
                value = one.parameter.get_value()
                found.record(path, {"": _struct(value)}, value)
        for place in filter(taps.__contains__, self.seen.seen):
            for value, source in zip(self.seen.calls[place], self.seen.sources[place], strict=True):
                found.record(taps[place], value, source)
        found.end = self.seen.end
        return found


class _Places:
    """What is seen at the places. Hashed by identity, so that a module may hold it as an attribute."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> Recorder:
        """A new pass."""
        self.seen = Recorder()
        self.sources: dict[int, tuple[Any, Any]] = {}
        return self.seen

    def see(self, place: str, learns: bool, tree: Any) -> Any:
        """The tree, whose arrays of floats are marked in the traced program where something learns."""
        floats = named_floats(tree)
        self.seen.record(place, {name: _struct(leaf) for name, leaf in floats.items()}, self.source(tree))
        return self.hold(at_leaves(tree, dict.fromkeys(floats, partial(self.mark, place))), tree) if learns else tree

    def mark(self, place: str, leaf: Any) -> Any:
        return self.hold(mark(leaf, place), leaf)

    def hold(self, marked: Any, own: Any) -> Any:
        """Notes that a value is the same as before its mark."""
        self.sources[id(marked)] = marked, self.source(own)
        return marked

    def source(self, value: Any) -> Any:
        """What a value was before it was marked."""
        return self.sources.get(id(value), (value, value))[1]


class _Watched(NamedTuple):
    path: str
    learns: bool
    places: _Places


def _watch(model: nnx.Module) -> tuple[Any, _Places]:
    model, places, learning = nnx.clone(model, variables=False), _Places(), list[str]()
    for path, module in list(modules_of(model)):  # what is in a module comes before it
        learns = any(_inside(one, path) for one in learning) or bool(jax.tree.leaves(nnx.state(module, nnx.Param)))
        learning += [path] * learns
        if callable(module) and isinstance(module, nnx.Module) and not isinstance(module, nnx.bridge.ToNNX):
            module.watched = nnx.static(_Watched(path, learns, places))
            intercept(module, _watched)
    return model, places


def _watched(self: Any, own_call: Any, *args: Any, **kwargs: Any) -> Any:
    path, learns, places = self.watched
    args, kwargs = first_input(own_call, args, kwargs, partial(places.see, f"input of {path}", learns))
    return places.see(f"output of {path}", learns, own_call(self, *args, **kwargs))


def places_of(model: nnx.Module, method: str, example: Example) -> Recorder:
    """The shapes at every place, in the order of the forward pass."""
    watched, places = _watch(model)
    Program(watched, method_of(method), *example.arguments()).abstractly(lambda out: None)
    return places.seen


def look(model: nnx.Module, method: str, example: Example, logits: Callable[[Any], Any] | None) -> Forward:
    """Traces a model's forward pass.

    It has a batch that is larger by a factor that no size has, so that the batch axis is known. Where the model runs
    with no other batch than it has, an axis of the batch's size is taken for it.
    """
    watched, places = _watch(model)

    def trace(example: Example, factor: int) -> Forward:
        program, seen = program_of(watched, method_of(method), *example.arguments()), places.start()

        def run(*states: Any) -> Any:
            found = program.run(*states)
            error = error_in(program.returned(found[0]), logits)
            seen.end = places.source(error)
            return error, found

        return _forward(program, jax.make_jaxpr(run)(*structs(program.states)), seen, factor)

    def enlarged(axis: int, sizes: set[int]) -> Forward:
        # Small, since a model may loop over an axis.
        factor = next(one for one in itertools.count(2) if all(size % one for size in sizes if size))
        return trace(example.marked(axis, factor), factor)

    sizes = {size for leaf in (*jax.tree.leaves(nnx.state(model)), *example.leaves) for size in jnp.shape(leaf)}
    for axis in range(min(2, max((len(leaf.shape) for leaf in example.leaves), default=0))):
        try:
            found = enlarged(axis, sizes)
            doubtful = found.doubtful()
            found = enlarged(axis, sizes | doubtful) if doubtful else found
        except Exception:
            continue
        if found.error.shape[0] % found.factor == 0:
            return found
    return trace(example, 0)


def _forward(program: Program, jaxpr: Any, seen: Recorder, factor: int) -> Forward:
    outputs = opened(jaxpr).outvars
    to_logits, _ = dce_jaxpr(opened(jaxpr), [i == 0 for i in range(len(outputs))], instantiate=True)
    marks = marked(to_logits)
    called = [place.removeprefix("input of ") for place in seen.seen if place.startswith("input of ")]
    learns = frozenset(leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(program.states[0])[0])
    modules = [path for path in called if f"output of {path}" in marks]
    return Forward(program, jaxpr, to_logits, learns, seen, outputs[0].aval, factor, modules)


def true_size(larger: Any, factor: int) -> jax.ShapeDtypeStruct:
    """The shape of an array that was measured, in the example's own batch."""
    sizes = (size // factor if factor and size % factor == 0 else size for size in larger.shape)
    return jax.ShapeDtypeStruct(tuple(sizes), larger.dtype)


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _inside(path: str, other: str) -> bool:
    return not other or path.startswith(f"{other}/")
