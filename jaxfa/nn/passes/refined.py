"""What a rule's own phase looks at: the layers, or the network with its activations shifted."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import lax

from jaxfa.nn.model.leaves import error_in
from jaxfa.nn.model.program import Example, Program, method_of
from jaxfa.nn.model.variables import Recorder
from jaxfa.nn.taps.tap import Tap, held_taps, plain_of, set_taps
from jaxfa.nn.weights.contraction import contractions_of, layer_of, sites_of
from jaxfa.nn.weights.own import layer_of as own_layer_of
from jaxfa.nn.weights.survey import by_path, own_of, survey


def own_at(attached: Any, example: Any) -> list[tuple[str, Any, Any]]:
    """A model's own contractions with feedback that a call makes: path, feedback, and what is there."""
    if not attached.own:
        return []
    sites = survey(attached.model, method_of(attached.method), example).sites
    return [(path, one, sites[one.site]) for path, one in by_path(own_of(attached)).items() if one.site in sites]


def layers_of(attached: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a layer-wise ``refine`` looks at: every contraction with its operation, input shape and weights."""
    recorder, probe = Recorder(), nnx.clone(attached.model, variables=False)
    for contraction in contractions_of(probe).values():
        contraction.recorder = recorder
    Program(probe, method_of(attached.method), args, kwargs).abstractly(lambda out: None)
    kernels = {path: module.kernel.get_value() for path, (module, _) in sites_of(plain_of(attached.model)).items()}
    seen = {path: one for path, one in contractions_of(attached.model).items() if path in recorder.seen}
    layers = {path: layer_of(one, kernels[path], recorder.seen[path]) for path, one in seen.items()}
    return layers | {
        path: own_layer_of(found, one.site) for path, one, found in own_at(attached, Example.of(args, kwargs))
    }


def shifted_forward(attached: Any, args: Any, kwargs: Any) -> Callable[[dict[str, Any]], jax.Array]:
    """What a direct ``refine`` looks at: ``taps -> logits`` of the plain network with ``taps[path]`` added to ``h``.

    The parameters are constants.
    """
    program = Program(attached.model, method_of(attached.method), args, kwargs)
    states = lax.stop_gradient(program.states)

    def forward(shifts: dict[str, Any]) -> jax.Array:
        def shift(tap: Tap) -> None:
            if (tap.follows or tap.path) in shifts:
                tap.shift = nnx.Variable(shifts[tap.follows or tap.path])

        outputs, _ = program.run(*states, prepare=partial(set_taps, act=shift))
        return error_in(program.returned(outputs), attached.logits)

    return forward


def bound(attached: Any, program: Program) -> Program:
    """The program of a call, whose feedback is bound to this batch if the rule asks for it; the model's stays."""
    if attached.rule.bind is None:
        return program
    model, args, kwargs = program.nodes
    held = {path: one for path, one in held_taps(model).items() if one.tap.feedback is not None}
    if not held:  # a model of one layer
        return program
    feedback = {path: one.tap.feedback.get_value() for path, one in held.items()}
    feedback = attached.rule.bind(shifted_forward(attached, args, kwargs), feedback)
    modules = {id(module): path for path, module in nnx.iter_modules(model)}
    found = {(0, *modules[id(one.module)], one.name, "feedback"): feedback[path] for path, one in held.items()}
    program.states = [
        nnx.from_flat_state(
            [(path, leaf.replace(found[path]) if path in found else leaf) for path, leaf in nnx.to_flat_state(state)]
        )
        for state in program.states
    ]
    return program
