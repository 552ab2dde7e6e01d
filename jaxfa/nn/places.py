"""The places of a model that may be tapped, as one abstract forward pass comes to them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.tree_util import DictKey

from jaxfa.jaxprs.cuts import mark
from jaxfa.nn.leaves import at_leaves, error_in, named_floats
from jaxfa.nn.program import Example, Program, method_of
from jaxfa.nn.tap import first_input
from jaxfa.nn.variables import intercept, modules_of, structs


class Forward(NamedTuple):
    """A traced forward pass, with its places.

    Attributes:
      jaxpr: from the model's arrays and its arguments to the logits.
      names: the model's arrays by path; None for what is data.
      learns: the parameters.
      shapes: at every place, the shapes in the order of its calls.
      modules: the paths of the modules that were called, in that order.
      batch: how many examples there are.
    """

    jaxpr: Any
    names: list[str | None]
    learns: frozenset[str]
    shapes: dict[str, list[dict[str, tuple[int, ...]]]]
    modules: list[str]
    batch: int

    def holds_examples(self, place: str) -> bool:
        """Whether an error can be delivered there: examples come first, in every call alike."""
        first, *others = self.shapes.get(place, [{}])
        return all(other == first for other in others) and any(shape[:1] == (self.batch,) for shape in first.values())

    def why_not(self, weights: list[str]) -> str:
        """Why no error can be delivered below these weights."""
        for weight in weights:
            for path in self.modules:
                shapes = [shape for one in self.shapes[f"input of {path}"] for shape in one.values()]
                if path and _inside(weight, path) and shapes and not self.holds_examples(f"input of {path}"):
                    return (
                        f"what {path!r} reads, of shape {shapes[0]}, has no axis of the logits' {self.batch} examples "
                        f"first"
                    )
        return "what is below it is no module's input"

    def sizes(self) -> tuple[tuple[int, ...], set[int]]:
        """The shape of the logits, and all sizes that axes have at the places."""
        shapes = [shape for calls in self.shapes.values() for one in calls for shape in one.values()]
        logits = self.jaxpr.out_avals[0].shape
        return logits, {size for shape in (logits, *shapes) for size in shape}

    def children(self, path: str) -> list[str]:
        """The modules that were called of those inside a module, but for those inside them."""
        inside = [other for other in self.modules if other and other != path and _inside(other, path)]
        return [one for one in inside if not any(one != other and _inside(one, other) for other in inside)]


class _Places:
    """What is seen at the places. Hashed by identity, so that a module may hold it as an attribute."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[dict[str, tuple[int, ...]]]] = {}

    def mark(self, place: str, tree: Any) -> Any:
        """The tree, with its arrays of floats marked."""
        floats = named_floats(tree)
        self.shapes.setdefault(place, []).append({name: leaf.shape for name, leaf in floats.items()})
        return at_leaves(tree, dict.fromkeys(floats, partial(mark, place=place)))


class _Marked(NamedTuple):
    path: str
    places: _Places


def look(model: nnx.Module, method: str, example: Example, logits: Callable[[Any], Any] | None) -> Forward:
    """Traces a model's forward pass."""
    model, places = nnx.clone(model, variables=False), _Places()
    for path, module in list(modules_of(model)):
        if callable(module) and not isinstance(module, nnx.bridge.ToNNX) and _learns(module):
            module.marked = nnx.static(_Marked(path, places))
            intercept(module, _marked)
    program = Program(model, method_of(method), *example.arguments(), _own(nnx.Param), _own(object))

    def run(*states: Any) -> jax.Array:
        return error_in(program.returned(program.run(*states)[0]), logits)

    jaxpr = jax.make_jaxpr(run)(*structs(program.states))
    params, rest, data = (jax.tree_util.tree_flatten_with_path(state)[0] for state in program.states)
    names = [_name(path) for path, _ in (*params, *rest)]
    modules = [place.removeprefix("input of ") for place in places.shapes if place.startswith("input of ")]
    return Forward(
        jaxpr,
        [*names, *[None] * len(data)],
        frozenset(names[: len(params)]),
        places.shapes,
        modules,
        jaxpr.out_avals[0].shape[0],
    )


def _marked(self: Any, own_call: Any, *args: Any, **kwargs: Any) -> Any:
    path, places = self.marked
    args, kwargs = first_input(own_call, args, kwargs, partial(places.mark, f"input of {path}"))
    return places.mark(f"output of {path}", own_call(self, *args, **kwargs))


def _learns(module: Any) -> bool:
    return bool(jax.tree.leaves(nnx.state(module, nnx.Param)))


def _own(kind: type) -> Any:
    return lambda path, value: path[0] == 0 and isinstance(value, kind)


def _name(path: Any) -> str:
    return "/".join(str(key.key) for key in path[1:] if isinstance(key, DictKey))


def _inside(path: str, other: str) -> bool:
    return not other or path.startswith(f"{other}/")
