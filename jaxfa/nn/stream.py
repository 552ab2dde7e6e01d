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
from flax.errors import TraceContextError
from jax import lax

from jaxfa.base import Rule, is_direct
from jaxfa.nn.tap import Tap, taps_of
from jaxfa.nn.variables import Feedback, modules_of, split_arrays
from jaxfa.ops import deliver, error_wire, listen
from jaxfa.stack import after


class Inputs(NamedTuple):
    """What a block computes with.

    Attributes:
      params: its floats, of whatever type of variable.
      feedback: its tap's feedback.
      rest: its other state, such as keys.
      arrays: the arrays among its arguments.
    """

    params: Any
    feedback: Any
    rest: Any
    arrays: list[jax.Array]


Run = Callable[[Inputs], tuple[jax.Array, Any]]  # a block's output, and its state afterwards


def _run(graphdef: Any, own_call: Callable[..., Any], rebuild: Callable[..., Any], block: Inputs) -> Any:
    copy = nnx.merge(graphdef, *block[:3], copy=True)
    args, kwargs = rebuild(block.arrays)
    return own_call(copy, *args, **kwargs), changed_state(copy, block.params, block.rest)


def changed_state(model: nnx.Module, *before: Any) -> Any:
    """What of a model's state is not as it was; the rest may be of an outer trace, in which no one may write it."""
    known = {id(leaf) for leaf in jax.tree.leaves(before)}
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(Feedback)))
    return nnx.from_flat_state(
        [(path, leaf) for path, leaf in state if any(id(one) not in known for one in jax.tree.leaves(leaf))]
    )


def split_model(model: nnx.Module) -> tuple[Any, Any, Any, Any]:
    """A graph, and the states of floats, feedback and the rest; copies, since the model's own are about to change."""
    graphdef, *states = nnx.split(model, _is_float, Feedback, ...)
    return graphdef, *jax.tree.map(lambda a: a, states)


def _is_float(path: Any, variable: Any) -> bool:
    del path
    leaves = jax.tree.leaves(variable)
    return not isinstance(variable, Feedback) and all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves)


class Walk:
    """A forward pass block by block. Hashable, so that a tap may hold it as a static attribute.

    Attributes:
      known: what the next block waits for. Otherwise the compiler might draw dropout's masks for all blocks first.
    """

    def __init__(self, known: Any) -> None:
        self.known = known
        self.trace = nnx.Variable(())

    def visit(self, tap: Tap, module: Any, own_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the block at a tap returns, as a constant; it changes its state."""
        try:
            self.trace.set_value(())  # Flax refuses in any other trace than the walk's own
        except TraceContextError:
            raise ValueError(
                f"The model calls its tapped block {tap.path!r} inside a transformation (remat, jit, scan, cond): take "
                f"schedule='stored', or call it as it is, since in other schedules it runs once more anyway."
            ) from None
        arrays, rebuild = split_inputs(f"The tapped block {tap.path!r}", args, kwargs)
        graphdef, params, feedback, rest = split_model(module)
        run = partial(_run, graphdef, own_call, rebuild)
        out, changed = self.learn(run, tap, Inputs(params, feedback, rest, arrays))
        nnx.update(module, changed)
        return lax.stop_gradient(out)

    def learn(self, run: Run, tap: Tap, block: Inputs) -> Any:
        """Runs a block as it is: the output error is not known yet."""
        del tap
        self.known, changed = run(self.waiting(block))
        return self.known, changed

    def waiting(self, block: Inputs) -> Inputs:
        """The block, its parameters and inputs as constants, after what is known."""
        params, feedback, rest, arrays = block
        rest, arrays = after((rest, lax.stop_gradient(arrays)), self.known)
        return Inputs(lax.stop_gradient(params), feedback, rest, arrays)


class Sweep(Walk):
    """A second pass, in which every block learns as it runs.

    Attributes:
      e: the output error.
      gradients: what each parameter inside a tapped block learns, by its path.
      signals: what each feedback learns, by its variable's identity, as taps may share it.
      errors: the sum of the products of every block's inputs with the errors at them, held fixed: its gradient is the
        error of what comes before the blocks, and of nothing where that is another block.
    """

    def __init__(self, e: jax.Array) -> None:
        super().__init__(e)
        self.e = e
        self.gradients: dict[str, jax.Array] = {}
        self.signals: dict[int, Any] = {}
        self.errors: Any = 0.0

    def learn(self, run: Run, tap: Tap, block: Inputs) -> Any:
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
        self._add(tap, learned, signal)
        self.known = learned, signal
        return out, changed

    def _add(self, tap: Tap, learned: Any, signal: Any) -> None:
        for own, gradient in _flat(learned).items():
            name = f"{tap.path}/{own}"
            self.gradients[name] = self.gradients.get(name, 0) + gradient
        before = self.signals.get(id(tap.feedback))
        self.signals[id(tap.feedback)] = signal if before is None else jax.tree.map(jnp.add, before, signal)


def split_inputs(who: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As :func:`split_arrays`; refuses inputs whose state a run would change, which running twice would lose."""
    stateful = nnx.Variable | nnx.Module | nnx.Rngs | nnx.RngStream
    leaves = jax.tree.leaves((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, stateful))
    if any(isinstance(leaf, stateful) for leaf in leaves):
        raise ValueError(
            f"{who} gets an argument with state of its own, such as nnx.Rngs, which only schedule='stored' knows. Keep "
            f"it inside the block: nnx.Dropout(rate, rngs=rngs)."
        )
    return split_arrays((args, kwargs))


def check_streams(model: nnx.Module, rule: Rule, schedule: str) -> None:
    """Refuses what no sweep can teach block after block: other rules, and taps inside each other or inside a stack."""
    if not is_direct(rule) or rule.source is not None:
        raise ValueError(f"schedule={schedule!r} is for direct rules whose error is the logits'; take 'stored'.")
    paths = list(taps_of(model))
    for path, (tap, stack) in taps_of(model).items():
        within = [other for other in paths if path.startswith(f"{other}/")]
        if tap.at_input or stack or within:
            reason = f"inside {within[0]!r}" if within else "in a stack of layers" if stack else "at a layer's input"
            raise ValueError(
                f"schedule={schedule!r} teaches whole blocks, each by itself, but the tap {path!r} is {reason}. Name "
                f"separate modules with at= (SSA, whose at= chooses layers to factor, always taps their inputs: take "
                f"schedule='stored'); for stacked blocks there is jaxfa.direct_stack."
            )
    known = _flat(nnx.state(model, _is_float))
    for path, module in modules_of(model):
        shared = [own for own in _flat(nnx.state(module, _is_float)) if path in paths and f"{path}/{own}" not in known]
        if shared:
            raise ValueError(f"schedule={schedule!r} needs blocks with weights of their own; {path!r} shares {shared}.")


def call_streamed(model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.Array:
    """Runs a tapped model, keeping its inputs alone; its gradient is formed by a second forward sweep."""
    graphdef, params, feedback, rest = split_model(model)
    arrays, rebuild = split_inputs("The streamed model", args, kwargs)
    constants = lax.stop_gradient(params)
    copy = walked(Walk(arrays), graphdef, constants, feedback, rest)
    constant_args, constant_kwargs = rebuild(lax.stop_gradient(arrays))
    logits = copy(*constant_args, **constant_kwargs)
    nnx.update(model, changed_state(copy, constants, rest))
    tree = params, feedback, rest, arrays
    return lax.stop_gradient(logits) + listen(partial(_learn, graphdef, rebuild), error_wire(logits), tree)


def _learn(graphdef: Any, rebuild: Callable[..., Any], tree: Any, e: jax.Array) -> Any:
    params, feedback, rest, arrays = tree

    def surrogate(params: Any, arrays: Any) -> Any:
        sweep = Sweep(e)
        args, kwargs = rebuild(arrays)
        model = walked(sweep, graphdef, params, feedback, rest)
        logits = model(*args, **kwargs)
        signals = {path: sweep.signals.get(id(tap.feedback)) for path, (tap, _) in taps_of(model).items()}
        return jnp.vdot(e, logits) + sweep.errors, (sweep.gradients, signals)

    exact, (gradients, signals) = jax.grad(surrogate, argnums=(0, 1), has_aux=True, allow_int=True)(params, arrays)
    dparams = _map(lambda path, leaf: leaf + gradients.get(path, 0), exact[0])

    def signal(path: str, own: Any) -> Any:
        found = signals[path.removesuffix("/feedback_tap/feedback")]
        return jax.tree.map(jnp.zeros_like, own) if found is None else found  # a block that did not run

    dfeedback = _map(signal, feedback)
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
