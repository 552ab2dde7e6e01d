"""How a tapped model runs: as a function of its state, whose taps read the output error in their backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfa.delivery import with_error
from jaxfa.nn.leaves import error_in
from jaxfa.nn.program import Program, method_of
from jaxfa.nn.tap import Channel, taps_of
from jaxfa.ops import varying_axes


def call_direct(aligned: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a model with a direct rule, which may be differentiated."""
    program = Program(aligned.model, method_of(aligned.method), args, kwargs)
    source = _Source()

    def run(states: Any, ref: Any) -> Any:
        channel = Channel(ref)

        def prepare(model: Any) -> None:
            for tap in taps_of(model).values():
                tap.channel = channel

        found = program.run(*states, prepare=prepare)
        channel.ref = None  # an inner jit's cache may keep the channel
        source.kind = channel.source
        return found

    def error_of(outputs: Any) -> jax.Array:
        if aligned.rule.source is not None:
            return source.zeros(aligned.rule.source)  # the source will write it
        return error_in(program.returned(outputs[0]), aligned.logits)

    try:
        return program.finish(*with_error(run, error_of, tuple(program.states)))
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "The model uses a traced value that is none of its own: a direct rule follows what is an argument, a "
            "variable or an array attribute of the model. Hand the model what it closes over as an argument."
        ) from error


class _Source:
    """The type of the activation at a rule's source."""

    def __init__(self) -> None:
        self.kind: Any = None

    def zeros(self, path: str) -> jax.Array:
        if self.kind is None:
            raise ValueError(f"This call never reaches the rule's source {path!r}, where its error is taken.")
        zeros = jnp.zeros(self.kind.shape, self.kind.dtype)
        return lax.pcast(zeros, tuple(sorted(varying_axes(self.kind), key=repr)), to="varying")
