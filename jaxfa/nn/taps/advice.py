"""What attach says to do where it refuses a direct rule: an ``at=`` is named only if it was tried."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxfa.base import DirectRule, Rule
from jaxfa.nn.model.variables import modules_of
from jaxfa.nn.taps.choose import Choice, choose, name_all
from jaxfa.nn.taps.describe import layer_name
from jaxfa.nn.taps.places import Forward, look
from jaxfa.nn.taps.put import Call


class Advice(NamedTuple):
    """Other places for a direct rule's taps.

    Attributes:
      model: the model, without the rule.
      rule: the rule.
      call: how the model is called.
      refusal: what attach would say with other places in ``at=``; nothing if it would take them.
    """

    model: Any
    rule: Rule
    call: Call
    refusal: Callable[[tuple[str, ...]], str]

    def for_all(self) -> str:
        """Where the rule could tap the model instead, or what is missing."""
        if isinstance(self.rule, DirectRule) and self.rule.modulate is not None:
            names = "layers, or blocks, and beside them what makes no product, as norms and embeddings"
            return f"at= names what learns: {names}."
        if not self.is_free() or self.call.example is None:
            return ""
        forward = look(self.model, self.call.method, self.call.example, self.call.logits)
        choice = choose(self.model, forward, self.call.allow)
        if choice.faults:
            return f"No at= was found that would do: {_missing(choice, forward)}."
        at = self.named(map(str, choice.places))
        missing = self.refusal(at) if at else "no layer is below the last, which needs no tap."
        return f"No at= was found that would do: {missing}" if missing else f"at={at} would do."

    def is_free(self) -> bool:
        """Whether the rule taps where ``at=`` says, and nowhere else."""
        rule = self.rule
        return isinstance(rule, DirectRule) and rule.weights is None and rule.source is None and not rule.parameters

    def without(self, rest: tuple[str, ...]) -> str:
        """What to do in place of taps at the logits; ``rest`` are the other places that were asked for."""
        at = self.named(rest)
        return f"at={at} would do." if at and not self.refusal(at) else self.for_all()

    def named(self, places: Any) -> tuple[str, ...]:
        """Places by as few globs as name them alone."""
        return tuple(name_all(places, [path for path, _ in modules_of(self.model)]))


def refuse_at_end(taps: Sequence[str], rest: tuple[str, ...] = (), advice: Advice | None = None) -> None:
    """Refuses taps at the logits, where an exact error would be given up, and by feedback training diverges.

    Raises:
      ValueError: if there are such taps.
    """
    if not taps:
        return
    words = advice.without(rest) if advice else ""
    mend = "Leave it out of at=, so that the last layer learns from that."
    if not words or words.startswith("No "):
        mend, words = "Let a layer with weights follow, which then learns from that.", ""
    names = ", ".join(map(repr, taps))
    raise ValueError(
        f"The tap {names} is at the logits themselves: no weights follow, and what the rule brings would take the "
        f"place of the loss's own exact error. {mend} {words}".rstrip()
    )


def _missing(choice: Choice, forward: Forward) -> str:
    """Why an error comes to some layer by no direct feedback."""
    fault = choice.faults[0]
    name, weights = layer_name(min(fault.names)), ", ".join(sorted({repr(layer_name(one)) for one in fault.passed}))
    if weights:
        return f"the error of {name!r} passes {weights}, and {forward.why_not(sorted(fault.passed))}"
    return f"the error of {name!r} comes on several ways, and no module between returns floats"
