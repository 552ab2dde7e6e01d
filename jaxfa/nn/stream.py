"""Streaming: a model of tapped blocks that learns in a second forward pass, in the memory of its largest block.

The forward pass keeps nothing but its inputs. When the output error is known the model runs once more, and every tapped
block forms its update as it runs and drops its activations at once: direct feedback's promise of no activation storage,
for blocks of any shapes. (For stacks of equal blocks without Flax, see :func:`jaxfa.direct_stack`.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxfa.base import Rule, is_direct
from jaxfa.nn.tap import Tap, taps_of
from jaxfa.nn.variables import Feedback, modules_of, split_arrays
from jaxfa.ops import deliver, error_wire, listen
from jaxfa.stack import after


class Block(NamedTuple):
    """What a block computes with.

    Attributes:
      params: its parameters.
      feedback: its tap's feedback.
      rest: its other state.
      arrays: the arrays among its arguments.
    """

    params: Any
    feedback: Any
    rest: Any
    arrays: list[jax.Array]


Run = Callable[[Block], tuple[jax.Array, Any]]  # a block's output, and its state afterwards


def _run(graphdef: Any, own_call: Callable[..., Any], rebuild: Callable[..., Any], block: Block) -> Any:
    copy = nnx.merge(graphdef, *block[:3], copy=True)
    args, kwargs = rebuild(block.arrays)
    return own_call(copy, *args, **kwargs), nnx.state(copy, nnx.Not(nnx.Any(nnx.Param, Feedback)))


class Walk:
    """A forward pass block by block. Hashable, so that a tap may hold it as a static attribute.

    Attributes:
      known: what the next block waits for. Otherwise the compiler might draw dropout's masks for all blocks first.
    """

    def __init__(self, known: Any) -> None:
        self.known = known

    def visit(self, tap: Tap, module: Any, own_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the block at a tap returns, as a constant; it changes its state."""
        arrays, rebuild = split_arrays((args, kwargs))
        # Copied, since a split shares its variables with the module, whose state the block is about to change.
        graphdef, params, feedback, rest = jax.tree.map(lambda a: a, nnx.split(module, nnx.Param, Feedback, ...))
        run = partial(_run, graphdef, own_call, rebuild)
        out, changed = self.learn(run, tap, Block(params, feedback, rest, arrays))
        nnx.update(module, changed)
        return lax.stop_gradient(out)

    def learn(self, run: Run, tap: Tap, block: Block) -> Any:
        """Runs a block as it is: the output error is not known yet."""
        del tap
        self.known, changed = run(self.waiting(block))
        return self.known, changed

    def waiting(self, block: Block) -> Block:
        """The block, its parameters and inputs as constants, after what is known."""
        params, feedback, rest, arrays = block
        rest, arrays = after((rest, lax.stop_gradient(arrays)), self.known)
        return Block(lax.stop_gradient(params), feedback, rest, arrays)


class Sweep(Walk):
    """A second pass, in which every block learns as it runs.

    Attributes:
      e: the output error.
      gradients: what each parameter inside a tapped block learns, by its path.
      signals: what each tap's feedback learns, by its path.
      errors: the sum of the products of every block's inputs with the errors at them, held fixed: its gradient is the
        error of what comes before the blocks, and of nothing where that is another block.
    """

    def __init__(self, e: jax.Array) -> None:
        super().__init__(e)
        self.e = e
        self.gradients: dict[str, jax.Array] = {}
        self.signals: dict[str, Any] = {}
        self.errors: Any = 0.0

    def learn(self, run: Run, tap: Tap, block: Block) -> Any:
        now = self.waiting(block)

        def forward(params: Any, arrays: Any) -> Any:
            return run(now._replace(params=params, arrays=arrays))

        out, vjp, changed = jax.vjp(forward, now.params, now.arrays, has_aux=True)
        with jax.named_scope(f"tap[{tap.scope}]"):
            delta, signal = deliver((out, tap.feedback.get_value()), after(self.e, self.known))
        learned, errors = vjp(delta)
        for array, error in zip(block.arrays, errors, strict=True):
            if jnp.issubdtype(array.dtype, jnp.inexact):
                self.errors += jnp.vdot(error, array)
        self._add(tap.path, learned, signal)
        self.known = learned, signal
        return out, changed

    def _add(self, path: str, learned: Any, signal: Any) -> None:
        for own, gradient in _flat(learned).items():
            name = f"{path}/{own}"
            self.gradients[name] = self.gradients.get(name, 0) + gradient
        before = self.signals.get(path)
        self.signals[path] = signal if before is None else jax.tree.map(jnp.add, before, signal)


def check_streams(model: nnx.Module, rule: Rule) -> None:
    """Refuses what no sweep can teach block after block: other rules, and taps inside each other or inside a stack."""
    if not is_direct(rule) or rule.source is not None:
        raise ValueError("schedule='stream' is for direct rules whose error is the logits'; take schedule='stored'.")
    paths = list(taps_of(model))
    for path, (tap, stack) in taps_of(model).items():
        within = [other for other in paths if path.startswith(f"{other}/")]
        if tap.at_input or stack or within:
            reason = f"inside {within[0]!r}" if within else "in a stack of layers" if stack else "at a layer's input"
            raise ValueError(
                f"schedule='stream' teaches whole blocks one after the other, but the tap {path!r} is {reason}. Name "
                f"separate modules with at=; for stacked blocks there is jaxfa.direct_stack."
            )
    known = _flat(nnx.state(model, nnx.Param))
    for path, module in modules_of(model):
        shared = [own for own in _flat(nnx.state(module, nnx.Param)) if path in paths and f"{path}/{own}" not in known]
        if shared:
            raise ValueError(f"schedule='stream' needs blocks with parameters of their own; {path!r} shares {shared}.")


def call_streamed(model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.Array:
    """Runs a tapped model, keeping its inputs alone; its gradient is formed by a second forward sweep."""
    graphdef, params, feedback, rest = jax.tree.map(lambda a: a, nnx.split(model, nnx.Param, Feedback, ...))
    arrays, rebuild = split_arrays((args, kwargs))
    copy = walked(Walk(arrays), graphdef, lax.stop_gradient(params), feedback, rest)
    constant_args, constant_kwargs = rebuild(lax.stop_gradient(arrays))
    logits = copy(*constant_args, **constant_kwargs)
    nnx.update(model, nnx.state(copy, nnx.Not(nnx.Any(nnx.Param, Feedback))))
    tree = params, feedback, rest, arrays
    return lax.stop_gradient(logits) + listen(partial(_learn, graphdef, rebuild), error_wire(logits), tree)


def _learn(graphdef: Any, rebuild: Callable[..., Any], tree: Any, e: jax.Array) -> Any:
    params, feedback, rest, arrays = tree

    def surrogate(params: Any, arrays: Any) -> Any:
        sweep = Sweep(e)
        args, kwargs = rebuild(arrays)
        logits = walked(sweep, graphdef, params, feedback, rest)(*args, **kwargs)
        return jnp.vdot(e, logits) + sweep.errors, (sweep.gradients, sweep.signals)

    exact, (gradients, signals) = jax.grad(surrogate, argnums=(0, 1), has_aux=True, allow_int=True)(params, arrays)
    dparams = _map(lambda path, leaf: leaf + gradients.get(path, 0), exact[0])
    dfeedback = _map(lambda path, _: signals[path.removesuffix("/feedback_tap/feedback")], feedback)
    return dparams, dfeedback, jax.tree.map(jnp.zeros_like, rest), exact[1]


def walked(walk: Walk, graphdef: Any, *states: Any) -> Any:
    """A model whose tapped blocks are run by a walk."""
    model = nnx.merge(graphdef, *states, copy=True)
    for tap, _ in taps_of(model).values():
        tap.walk = walk
    return model


def _flat(state: Any) -> dict[str, Any]:
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _map(function: Callable[[str, Any], Any], state: Any) -> Any:
    leaves = nnx.to_flat_state(state)
    changed = [(path, leaf.replace(function("/".join(map(str, path)), leaf.get_value()))) for path, leaf in leaves]
    return nnx.from_flat_state(changed)
