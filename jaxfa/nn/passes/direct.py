"""How a tapped model runs: as a function of its state, whose taps read the output error in their backward pass."""

from functools import partial
from typing import Any

import jax
from flax import nnx

from jaxfa.delivery import Error, with_error
from jaxfa.jaxprs.follow import with_local_products
from jaxfa.nn.model.program import Example, Program, method_of
from jaxfa.nn.passes.output import OutputError
from jaxfa.nn.passes.refined import bound
from jaxfa.nn.taps.tap import Channel, set_taps
from jaxfa.varying import zeros_of

# A model's own parameters, its other state, and its arguments.
_FILTERS = tuple(
    lambda path, value, kind=kind: path[0] == 0 and isinstance(value, kind) for kind in (nnx.Param, object)
)


def call_direct(attached: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a model with a direct rule, which may be differentiated."""
    program = bound(attached, Program(attached.model, method_of(attached.method), args, kwargs, *_FILTERS))
    output, channels = OutputError(attached, program), list[Channel]()

    def run(states: Any, ref: Any) -> Any:
        channel = Channel(ref)
        channels.append(channel)

        def prepare(model: Any) -> None:
            set_taps(model, lambda tap: setattr(tap, "channel", channel))

        call = partial(program.run, prepare=prepare)
        found = (with_local_products(call) if attached.is_local else call)(*states)
        channel.ref = None  # an inner jit's cache may keep the channel
        return found

    def error_of(kept: Any, cotangents: Any) -> jax.Array:
        if attached.rule.source is not None:
            return _zeros(channels[-1].source, attached.rule.source)  # the source will write it
        return output.of(kept, cotangents[0])

    in_turn = attached.in_turn and not any(one.is_made_once for one in output.feedbacks)
    try:
        likely = attached.error if Example.of(args, kwargs) == attached.example else None
        error = Error(lambda outputs: output.keep(outputs[0]), error_of, likely, in_turn)
        return program.finish(*with_error(run, error, tuple(program.states)))
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "The model uses a traced value that is none of its own: a direct rule follows what is an argument, a "
            "variable or an array attribute of the model. Hand the model what it closes over as an argument."
        ) from error
    except KeyError as error:
        if "AbstractRef" not in str(error):
            raise
        raise ValueError(
            f"The tap {channels[-1].last!r} is inside a lax.cond, lax.switch or nnx.cond, where JAX {jax.__version__} "
            f"can't differentiate what reads an error; JAX 0.12 can. Tap the module around it, or choose between the "
            f"results with jnp.where."
        ) from error


def _zeros(kind: Any, source: str) -> jax.Array:
    """Zeros of the type of the activation at a rule's source."""
    if kind is None:
        raise ValueError(f"This call never reaches the rule's source {source!r}, where its error is taken.")
    return zeros_of(kind)
