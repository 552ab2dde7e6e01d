"""Why the inputs of layers are not where a direct rule should tap a model, in words that are true of the model."""

from typing import NamedTuple

from jaxfa.jaxprs.cuts import Cuts, Use
from jaxfa.nn.taps.describe import layer_name


class Fault(NamedTuple):
    """Parameters that would not learn by direct feedback.

    Attributes:
      names: the parameters.
      passed: the weights that their error passes on its way from a tap; none where it comes from several.
    """

    names: frozenset[str]
    passed: frozenset[str]


def why(cuts: Cuts, faults: list[Fault]) -> str:
    """What of a model the faults come from: a way past layers, a loop, weights at no tap, or ways that part."""
    after = {place: _after(cuts, place) for starts in cuts.starts.values() for place in starts}
    found = set()
    for fault in faults:
        uses = [starts for use, starts in cuts.starts.items() if not fault.passed and fault.names & use.names]
        ends = {place for starts in uses for place in starts}
        bare = {place for starts in uses for place, passed in starts.items() if not passed}
        if any(place in after[place] for place in ends):
            found.add("layers run in a loop")
        elif any(place in after[other] for place in bare for other in ends):
            found.add("shortcuts pass layers by")
    for reason in ("shortcuts pass layers by", "layers run in a loop"):
        if reason in found:
            return reason
    passing = [fault for fault in faults if fault.passed]
    if passing:
        name, weights = layer_name(min(passing[0].names)), layer_name(min(passing[0].passed))
        return f"the error of {name!r} would pass the weights of {weights!r}"
    return f"the error of {layer_name(min(faults[0].names))!r} would come on several ways"


def _after(cuts: Cuts, place: str) -> set[str]:
    """The taps, and the output, that a tap's value leads to, past others, too."""
    found: set[str] = set()
    ahead = [place]
    while ahead:
        more = cuts.starts.get(Use((ahead.pop(),)), {}).keys() - found
        found |= more
        ahead += more
    return found
