"""The output error of a model's run, or what a rule reads off it with the logits, such as the targets."""

from typing import Any

import jax
from jax import lax

from jaxfa.nn.model.leaves import error_in
from jaxfa.nn.model.program import Program
from jaxfa.nn.taps.tap import taps_of
from jaxfa.wire import reading


class OutputError:
    """How the error of one run is found; most rules need nothing of the outputs but their cotangents.

    Attributes:
      feedbacks: those that it is delivered by.
      reads: as their class has it.

    Raises:
      ValueError: if some of them need the error and others the targets, or the targets are wanted at a source.
    """

    def __init__(self, attached: Any, program: Program) -> None:
        self.feedbacks = [one for tap in taps_of(attached.model).values() for one in tap.feedbacks().values()]
        self.reads = reading(self.feedbacks)
        if self.reads is not None and attached.rule.source is not None:
            raise ValueError(
                f"{type(self.feedbacks[0]).__name__} learns from targets, which the error at the logits tells, and the "
                f"rule takes the error at {attached.rule.source!r}: leave out its source."
            )
        self._program, self._logits = program, attached.logits

    def keep(self, outputs: Any) -> jax.Array | None:
        """What of the outputs is needed when their cotangents come."""
        return None if self.reads is None else lax.stop_gradient(self._in(outputs))

    def of(self, kept: jax.Array | None, cotangents: Any) -> jax.Array:
        """What is delivered to the taps."""
        e = self._in(cotangents)
        return e if self.reads is None or kept is None else self.reads(kept, e)

    def _in(self, outputs: Any) -> jax.Array:
        return error_in(self._program.returned(outputs), self._logits)
