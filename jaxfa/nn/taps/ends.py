"""Taps at the logits, where feedback would take the place of the error itself."""

from collections.abc import Mapping

from jaxfa.jaxprs.cuts import OUTPUT, Use
from jaxfa.jaxprs.ends import Ends
from jaxfa.jaxprs.flows import NONE
from jaxfa.nn.model.variables import Recorder
from jaxfa.nn.taps.places import Forward
from jaxfa.nn.taps.tap import Held
from jaxfa.nn.taps.taps import stacks_of
from jaxfa.nn.weights.survey import names_of


def taps_at_end(held: dict[str, Held], forward: Forward, recorder: Recorder) -> list[str]:
    """The taps between which and the place where the error is taken nothing learns and nothing is contracted.

    Args:
      held: the taps, with their feedback.
      forward: the forward pass.
      recorder: what was seen at the taps.
    """
    places = {path: _place(one) for path, one in held.items() if not one.tap.follows}
    sources = {places[path] for path in places if held[path].tap.is_source}
    ends = Ends(places.values(), forward.learns).run(forward.to_logits, names_of(forward.program))
    stacks, found = stacks_of(held), []
    for path, place in places.items():
        lead = ends.leaders.get((ends.origins.get(place), place.startswith("input")), place)
        goes: Mapping[str, frozenset[str]] = ends.starts.get(Use((lead,)), {})
        # The last of a stack is at the logits, too. (A local loss is for all others, and this one has no other place.)
        itself = {lead} if stacks[path] and not _is_local(held[path]) else set()
        last = {OUTPUT, *sources} & goes.keys()
        is_last = last and goes.keys() <= last | itself and all(goes[end] == NONE for end in last)
        if held[path].tap.is_receiver and (is_last or all(h is recorder.end for h in recorder.sources[path])):
            found.append(path)
    return found


def _is_local(one: Held) -> bool:
    return any(feedback.local for feedback in one.tap.feedbacks().values())


def _place(one: Held) -> str:
    place = one.tap.place
    return place.path if place.kind == "parameter" else f"{place.kind} of {place.path}"
