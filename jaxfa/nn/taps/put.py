"""Puts a direct rule's taps on a model."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from flax import nnx

from jaxfa.base import DirectRule
from jaxfa.nn.model.program import Example
from jaxfa.nn.model.variables import asks, modules_of
from jaxfa.nn.taps.above import surroundings
from jaxfa.nn.taps.ends import taps_at_end
from jaxfa.nn.taps.measured import tappable, that_are_read
from jaxfa.nn.taps.places import Forward, look, true_size
from jaxfa.nn.taps.tap import Place, held_taps, place_tap
from jaxfa.nn.taps.taps import (
    check_calls,
    check_source,
    drop_unused,
    end_at,
    fill_taps,
    follow,
    only_leaf,
    refuse_unseen,
)
from jaxfa.nn.taps.trace import weights_above
from jaxfa.nn.taps.wanted import check_modulated, places_for, refuse_unmatched


class Call(NamedTuple):
    """How a model is called: its method, which of its outputs are logits, what with; and what may backpropagate."""

    method: str
    logits: Callable[[Any], Any] | None
    example: Example | None
    allow: tuple[str, ...]


class Placed(NamedTuple):
    """What came of putting a rule on a model.

    Attributes:
      backprop: the layers that the rule itself leaves to backpropagation.
      own: the feedback of the model's own contractions, and those that have none.
      note: where a direct rule taps that was not told, and why.
      seen: looks through the forward pass, if that was traced.
      error: the output error's shape, if it is known.
      at_end: the taps at the logits themselves.
      rest: the places that were asked for, but for those.
    """

    backprop: list[str]
    own: Any = ((), ())
    note: str = ""
    seen: Callable[[], Any] | None = None
    error: Any = None
    at_end: Sequence[str] = ()
    rest: tuple[str, ...] = ()


def put_direct(model: Any, rule: DirectRule, rngs: nnx.Rngs, at: Any, call: Call) -> Placed:
    """Taps a model for a direct rule."""
    if call.example is None:
        raise ValueError(
            "A direct rule needs example=, one batch of inputs: its feedback leads from outputs to layers."
        )
    method, example = call.method, call.example
    forward = look(model, method, example, call.logits)
    places, note = places_for(model, rule, at, forward, call)
    refuse_unmatched("the rule's globs", rule.globs, [place.path for place in places], under=True)
    modules = dict(modules_of(model))
    refuse_unseen(_unseen(modules, forward, places), call.allow)
    for place in sorted(places, key=lambda place: place.kind == "input"):
        place_tap(modules, place)
    held = held_taps(model)
    recorder, error, factor = forward.at_taps(held), forward.error, forward.factor
    seen, above = recorder.seen, []
    drop_unused(held, seen, None if rule.weights is not None else at, call.allow)
    follow(held, recorder)
    if rule.source in seen:
        check_source(held, rule.source, list(seen))
        error = only_leaf(seen[rule.source], rule.source)
        end_at(held, rule.source, list(seen))  # first: a tap above would refuse the gradient that tells what is above
        above = weights_above(model, method, true_size(error, factor), rule.source, example)
    if rule.modulate is not None:
        check_modulated(rule.modulate, seen)
    found, error = tappable(held, seen, error, factor)
    around = surroundings(model, held, seen, method, example) if asks(rule, "above") else {}
    fill_taps(held, rule, rngs, that_are_read(model, call, found), error, around=around)
    check_calls(held, recorder.calls)
    at_end = [] if rule.parameters else taps_at_end(held, forward, recorder)
    known = {*at_end, rule.modulate}
    rest = tuple(str(place) for place in places if not {place.path, str(place)} & known)
    return Placed(above, note=note, seen=partial(forward.survey, places), error=error, at_end=at_end, rest=rest)


def _unseen(modules: dict[str, Any], forward: Forward, places: tuple[Place, ...]) -> dict[str, Any]:
    """The modules with parameters of their own that the example's call does not come to, outside of tapped blocks."""
    tapped = {place.path for place in places}
    blocks = [place.path for place in places if place.kind == "output"]
    return {
        path: module
        for path, module in modules.items()
        if path
        and path not in tapped
        and callable(module)
        and any(isinstance(value, nnx.Param) for value in vars(module).values())
        and f"output of {path}" not in forward.seen.seen
        and not any(path.startswith(f"{block}/") for block in blocks)
    }
