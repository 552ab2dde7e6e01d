"""A model that learns in a second pass, on an input that the error changes: from what it changes in each layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax

from jaxfa.delivery import filled
from jaxfa.nn.model.cotangents import floats_of, products, relearned
from jaxfa.nn.model.program import Program, method_of
from jaxfa.nn.passes.output import OutputError
from jaxfa.nn.passes.stream import Walk, walked
from jaxfa.nn.taps.tap import Tap
from jaxfa.varying import zeros_of


class First(Walk):
    """The first pass.

    Attributes:
      seen: what comes to every tap, in the order of its calls.
    """

    def __init__(self) -> None:
        super().__init__(())
        self.seen: dict[str, list[jax.Array]] = {}

    def check(self, tap: Tap) -> None:
        try:
            super().check(tap)
        except ValueError:
            raise ValueError(
                f"The model calls {tap.path!r} inside a transformation (scan, vmap, remat, jit), where its two passes "
                f"cannot be compared: call it as it is, or name with at= the module around that."
            ) from None

    def visit(self, tap: Tap, module: Any, own_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return tap(own_call(module, *args, **kwargs))

    def entering(self, tap: Tap) -> dict[str, Callable[[jax.Array], jax.Array]]:
        return {name: partial(self.enter, tap, name, one) for name, one in tap.feedbacks().items()}

    def enter(self, tap: Tap, leaf: str, feedback: Any, h: jax.Array) -> jax.Array:
        """``h``, which is kept."""
        del feedback
        self.check(tap)
        self.seen.setdefault(tap.scope(leaf), []).append(h)
        return h


class Second(First):
    """The second pass, in which every layer learns as it runs.

    Attributes:
      e: the output error.
      first: what came to the taps in the first pass.
      learned: as for a sweep.
    """

    def __init__(self, e: jax.Array, first: dict[str, list[jax.Array]]) -> None:
        super().__init__()
        self.e = e
        self.first = {name: iter(calls) for name, calls in first.items()}
        self.learned: list[jax.Array] = []

    def enter(self, tap: Tap, leaf: str, feedback: Any, h: jax.Array) -> jax.Array:
        """``h`` as a constant, modulated or not; what it was made of learns from how it differs from the first."""
        first = next(self.first[tap.scope(leaf)])
        with jax.named_scope(f"tap[{tap.scope(leaf)}]"):
            if hasattr(feedback, "modulate"):
                return feedback.modulate(lax.stop_gradient(h), self.e)
            delta = feedback.difference(first, h, self.e)
        self.learned += products(delta, h)
        return lax.stop_gradient(h)


def call_modulated(attached: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a tapped model; its gradient is formed in a second pass, on a modulated input."""
    program = Program(attached.model, method_of(attached.method), args, kwargs)
    output = OutputError(attached, program)

    def keep(state: Any) -> Any:
        walk = First()
        found = program.run(state, prepare=walked(walk))
        return found, (state, walk.seen, output.keep(found[0]))

    def backward(kept: Any, cotangents: Any) -> Any:
        state, first, logits = kept

        def surrogate(floats: list[Any]) -> list[jax.Array]:
            walk = Second(output.of(logits, filled(cotangents[0])), first)
            outputs = program.run(rebuild(floats), prepare=walked(walk))
            return [*products(cotangents, outputs), *walk.learned]

        floats, rebuild, cotangent = floats_of(state)
        # Not of their sum: in a shard_map some of them are sums over the devices, and each counts once.
        numbers, pullback = jax.vjp(surrogate, floats)
        return cotangent(pullback([zeros_of(jax.typeof(one)) + 1 for one in numbers])[0])

    return program.finish(*relearned(keep, backward, program.states[0]))
