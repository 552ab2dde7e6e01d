"""Streaming: a model of tapped blocks that learns in a second forward pass, in the memory of its largest block.

The forward pass keeps nothing but its inputs. When the output error is known the model runs once more, and every tapped
block forms its update as it runs and drops its activations at once: direct feedback's promise of no activation storage,
for blocks of any shapes. Where taps are at the inputs of layers, as SSA's are, the same is done with what is between
two of them (:mod:`jaxfa.nn.passes.pieces`). (For stacks of equal blocks without Flax, see :func:`jaxfa.direct_stack`.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError
from jax import lax

from jaxfa.base import DirectRule, Rule
from jaxfa.delivery import filled, is_zero
from jaxfa.nn.model.cotangents import floats_of, is_float, products, relearned, split_floats
from jaxfa.nn.model.leaves import at_leaves, named_floats
from jaxfa.nn.model.program import Program, method_of
from jaxfa.nn.passes.output import OutputError
from jaxfa.nn.passes.pieces import gradient_by_pieces
from jaxfa.nn.passes.refined import bound
from jaxfa.nn.taps.tap import Tap, held_taps, set_taps, taps_of
from jaxfa.nn.taps.taps import stacks_of
from jaxfa.ops import deliver, deliver_for_all
from jaxfa.order import after
from jaxfa.stacks.schedules import Dispatch, Schedule
from jaxfa.varying import zeros_of


class Walk:
    """A forward pass block by block. Hashable, so that a tap may hold it as a static attribute.

    Attributes:
      known: what the next block waits for. Otherwise the compiler might draw dropout's masks for all blocks first.
    """

    def __init__(self, known: Any) -> None:
        self.known = known
        self.trace = nnx.Variable(())

    def visit(self, tap: Tap, module: Any, own_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the block at a tap returns, at its tapped leaves as a constant; it changes its state."""
        self.check(tap)
        program = Program(module, own_call, args, kwargs)
        found = _beside(program, tap, lax.stop_gradient(self.learn(program, tap)))
        return at_leaves(program.finish(*found), dict.fromkeys(tap.leaves, lax.stop_gradient))

    def check(self, tap: Tap) -> None:
        """Refuses a tap inside a transformation."""
        try:
            self.trace.set_value(())  # Flax refuses in any other trace than the walk's own
        except TraceContextError:
            raise ValueError(
                f"The model calls its tapped block {tap.path!r} inside a transformation (remat, jit, scan, cond): take "
                f"schedule=jaxfa.stacks.stored, or call it as it is, since in other schedules it runs once more anyway."
            ) from None

    def entering(self, tap: Tap) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """What is done to what comes from between blocks, at a tap before one: nothing until the error is known."""
        del tap
        return {}

    def learn(self, program: Program, tap: Tap) -> Any:
        """Runs a block as it is: the output error is not known yet."""
        del tap
        found = program.run(self.waiting(program))
        self.known = found[0]
        return found

    def waiting(self, program: Program) -> Any:
        """What a block computes with, as constants; all but its floats after what is known."""
        flat = nnx.to_flat_state(program.states[0])
        others = {path: leaf for path, leaf in flat if not (path[0] == 0 and is_float(leaf))}
        others = after(others, self.known)
        return lax.stop_gradient(nnx.from_flat_state([(path, others.get(path, leaf)) for path, leaf in flat]))


class Sweep(Walk):
    """A second pass, in which every block learns as it runs.

    Attributes:
      e: the output error.
      learned: the products of what every block computes with and its gradient, which is held fixed: numbers whose
        gradient that is, wherever it comes from.
    """

    def __init__(self, e: jax.Array) -> None:
        super().__init__(e)
        self.e = e
        self.learned: list[jax.Array] = []

    def entering(self, tap: Tap) -> dict[str, Callable[[jax.Array], jax.Array]]:
        if tap.follows:
            return dict.fromkeys(tap.leaves, lax.stop_gradient)
        return {name: partial(self.enter, tap, name, one) for name, one in tap.feedbacks().items()}

    def enter(self, tap: Tap, leaf: str, feedback: Any, h: jax.Array) -> jax.Array:
        """``h`` as a constant; what it was made of learns from the error that is delivered to it."""
        self.check(tap)
        pair, e = lax.stop_gradient((h, feedback)), after(self.e, self.known)
        with jax.named_scope(f"tap[{tap.scope(leaf)}]"):
            delta, signal = (deliver_for_all if tap.place.kind == "parameter" else deliver)(pair, e)
        self.learned += [*products(delta, h), *products(signal, feedback)]
        return lax.stop_gradient(h)

    def learn(self, program: Program, tap: Tap) -> Any:
        found, gradients, signals = learn(program, self.waiting(program), tap, lambda: after(self.e, self.known))
        self.learned += products(gradients, split_floats(program.states[0])[0])
        self.learned += products(signals, tap.feedbacks())
        # Not the error at its input, which nothing may need.
        self.known = {name: one for name, one in gradients.items() if name.startswith("0/")}, signals
        return found


def learn(program: Program, state: Any, tap: Tap, error: Callable[[], jax.Array]) -> tuple[Any, Any, Any]:
    """What a block returns and changes, and what its floats and its feedback learn."""
    floats, rebuild = split_floats(state)

    def forward(floats: dict[str, Any]) -> tuple[Any, Any]:
        found = program.run(rebuild(floats))
        leaves = named_floats(program.returned(found[0]))
        return {name: leaves[name] for name in tap.leaves}, found

    leaves, vjp, found = jax.vjp(forward, floats, has_aux=True)
    e, feedbacks = error(), tap.named(state[0]["feedback_tap"]["feedback"].get_value())
    deltas, signals = {}, {}
    for name, h in leaves.items():
        with jax.named_scope(f"tap[{tap.scope(name)}]"):
            deltas[name], signals[name] = deliver((h, feedbacks[name]), e)
    return found, vjp(deltas)[0], signals


def _beside(program: Program, tap: Tap, found: Any) -> Any:
    """What a block returned and changed; it runs again for the gradient of others than its tapped leaves: a penalty."""

    def backward(state: Any, cotangents: Any) -> Any:
        def forward(floats: list[Any]) -> Any:
            outputs, changed = program.run(rebuild(floats))
            returned, attributes = nnx.merge(program.result, outputs)
            returned = at_leaves(returned, dict.fromkeys(tap.leaves, lax.stop_gradient))
            return nnx.split((returned, attributes))[1], changed

        if all(map(is_zero, jax.tree.leaves(cotangents))):
            return None, None
        floats, rebuild, cotangent = floats_of(state)
        _, pullback = jax.vjp(forward, floats)
        return cotangent(pullback(filled(cotangents))[0]), None

    return relearned(lambda both: (both[1], both[0]), backward, (program.states[0], found))


def check_streams(model: nnx.Module, rule: Rule, schedule: Schedule) -> None:
    """Refuses what no sweep can teach block after block: other rules, and taps inside each other or inside a stack."""
    if isinstance(rule, DirectRule) and rule.modulate is not None:
        raise ValueError(
            f"schedule={schedule!r} teaches block after block, from the last to the first, and this rule compares "
            f"two passes forward: take jaxfa.stacks.stored."
        )
    if not isinstance(rule, DirectRule) or rule.source is not None:
        raise ValueError(
            f"schedule={schedule!r} is for direct rules whose error is the logits'; take jaxfa.stacks.stored."
        )
    held = held_taps(model)
    stacks = stacks_of(held)
    for path, (_, _, tap) in held.items():
        within = [other for other in stacks if path.startswith(f"{other}/")]
        if (tap.at_input and isinstance(schedule, Dispatch)) or stacks[path] or within:
            where = "in a stack of layers" if stacks[path] else "at a layer's input"
            reason = f"inside {within[0]!r}" if within else where
            raise ValueError(
                f"schedule={schedule!r} teaches whole blocks, each by itself, but the tap {path!r} is {reason}. Name "
                f"separate modules with at= (SSA, whose at= chooses layers to factor, always taps their inputs, which "
                f"schedule=jaxfa.stacks.stream takes); for stacked blocks there is jaxfa.direct_stack."
            )


def call_streamed(attached: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a tapped model, keeping its inputs alone; its gradient is formed by a second forward sweep."""
    program = bound(attached, Program(attached.model, method_of(attached.method), args, kwargs))
    output = OutputError(attached, program)

    def keep(state: Any) -> Any:
        found = program.run(state, prepare=walked(Walk(state)))
        return found, (state, output.keep(found[0]))

    def backward(kept: Any, cotangents: Any) -> Any:
        state, logits = kept

        def surrogate(floats: list[Any]) -> list[jax.Array]:
            sweep = Sweep(output.of(logits, filled(cotangents[0])))
            outputs = program.run(rebuild(floats), prepare=walked(sweep))
            return [*products(cotangents, outputs), *sweep.learned]

        floats, rebuild, cotangent = floats_of(state)
        if all(tap.at_input for tap in taps_of(attached.model).values()):
            return cotangent(gradient_by_pieces(surrogate, floats, filled(cotangents[0])))
        # Not of their sum: in a shard_map some of them are sums over the devices, and each counts once.
        numbers, pullback = jax.vjp(surrogate, floats)
        return cotangent(pullback([zeros_of(jax.typeof(one)) + 1 for one in numbers])[0])

    return program.finish(*relearned(keep, backward, program.states[0]))


def walked(walk: Walk) -> Callable[[Any], None]:
    """Lets a walk run the tapped blocks of a model."""

    return lambda model: set_taps(model, lambda tap: setattr(tap, "walk", walk))
