"""How a tapped model runs: as a function of its state, whose taps read the output error in their backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import lax

from jaxfa.delivery import with_error
from jaxfa.jaxprs.follow import with_local_products
from jaxfa.nn.leaves import error_in
from jaxfa.nn.program import Program, method_of
from jaxfa.nn.tap import Channel, holders_of, tap_parameters, taps_of
from jaxfa.ops import zeros_of

# A model's own parameters, its other state, and its arguments.
_FILTERS = tuple(
    lambda path, value, kind=kind: path[0] == 0 and isinstance(value, kind) for kind in (nnx.Param, object)
)


def call_direct(attached: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a model with a direct rule, which may be differentiated."""
    program = bound(attached, Program(attached.model, method_of(attached.method), args, kwargs, *_FILTERS))
    channels: list[Channel] = []

    def run(states: Any, ref: Any) -> Any:
        channel = Channel(ref)
        channels.append(channel)

        def prepare(model: Any) -> None:
            for tap in taps_of(model).values():
                tap.channel = channel
            tap_parameters(model)

        call = partial(program.run, prepare=prepare)
        found = (with_local_products(call) if attached.is_local else call)(*states)
        channel.ref = None  # an inner jit's cache may keep the channel
        return found

    def error_of(outputs: Any) -> jax.Array:
        if attached.rule.source is not None:
            return _zeros(channels[-1].source, attached.rule.source)  # the source will write it
        return error_in(program.returned(outputs[0]), attached.logits)

    try:
        return program.finish(*with_error(run, error_of, attached.error, tuple(program.states)))
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


def shifted_forward(attached: Any, args: Any, kwargs: Any) -> Callable[[dict[str, Any]], jax.Array]:
    """``taps -> logits`` of the plain network with ``taps[path]`` added to ``h``; the parameters are constants."""
    program = Program(attached.model, method_of(attached.method), args, kwargs)
    states = lax.stop_gradient(program.states)

    def forward(shifts: dict[str, Any]) -> jax.Array:
        def prepare(model: Any) -> None:
            for path, tap in taps_of(model).items():
                if (tap.follows or path) in shifts:
                    tap.shift = nnx.Variable(shifts[tap.follows or path])
            tap_parameters(model)

        outputs, _ = program.run(*states, prepare=prepare)
        return error_in(program.returned(outputs), attached.logits)

    return forward


def bound(attached: Any, program: Program) -> Program:
    """The program of a call, whose feedback is bound to this batch if the rule asks for it; the model's stays."""
    if attached.rule.bind is None:
        return program
    model, args, kwargs = program.nodes
    taps = {path: tap for path, tap in taps_of(model).items() if tap.feedback is not None}
    if not taps:  # a model of one layer
        return program
    feedback = {path: tap.feedback.get_value() for path, tap in taps.items()}
    feedback = attached.rule.bind(shifted_forward(attached, args, kwargs), feedback)
    modules = {id(module): path for path, module in nnx.iter_modules(model)}
    found = {
        (0, *modules[id(module)], name, "feedback"): feedback[tap.path]
        for module, name, tap in holders_of(model)
        if tap.path in taps
    }
    program.states = [
        nnx.from_flat_state(
            [(path, leaf.replace(found[path]) if path in found else leaf) for path, leaf in nnx.to_flat_state(state)]
        )
        for state in program.states
    ]
    return program
