"""What a rule's learning needs of the user's optimizer: when it steps, and a second state beside its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfa.jaxprs.dependence import Depends, depend
from jaxfa.order import after

# What keeps a copy of the parameters, or searches along its own step, would undo or overlook a step made after it.
_NOT_INSIDE = (
    optax.LookaheadState,
    optax.contrib.ScheduleFreeState,
    optax.contrib.SAMState,
    optax.ScaleByLBFGSState,
    optax.ScaleByBacktrackingLinesearchState,
    optax.ScaleByZoomLinesearchState,
)
_ACCUMULATES = (optax.MultiStepsState, optax.ApplyEvery)


class OptimizerState(NamedTuple):
    """The state of :func:`jaxfa.optimizer`.

    Attributes:
      params: the state of the user's optimizer, as it would be without any feedback.
      feedback: the state of the feedback's learning.
    """

    params: Any
    feedback: Any


class Shared(NamedTuple):
    """What a feedback's state shares with the parameters' state."""


def with_extra(tx: Any) -> optax.GradientTransformationExtraArgs:
    """``tx``, which may be ``optax.MultiSteps`` itself, as a transformation that takes any argument."""
    return optax.with_extra_args_support(tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx)


def init_on(tx: optax.GradientTransformation, params: Any) -> Any:
    """``tx.init(params)``, with an error that tells which trees fit.

    Raises:
      ValueError: if ``tx`` does not take these parameters.
    """
    try:
        return tx.init(params)
    except ValueError as error:
        raise ValueError(
            f"{error}\nThis is what the optimizer said when shown the parameters alone, without feedback. If its masks "
            f"or labels are trees, they need the parameters' own structure, which for a Flax model is that of "
            f"nnx.as_pure(nnx.state(model, nnx.Param)), before or after jaxfa.nn.attach; functions of a tree fit any."
        ) from error


def moved(step: jax.Array) -> jax.Array:
    """Whether a step is not zero."""
    return jnp.any(step != 0)


def stepped(tx: Any, updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any, Any]:
    """``tx.update``, and a tree of which leaves it takes a step on: those whose update depends on their gradient.

    A step may well be zero, and what is no step, such as a decay of frozen weights, may be not. Compiled, the program
    tells, unless that is decided as it runs, such as by a rate of zero. Then this asks ``tx`` once more, for the
    opposite gradient, large enough to be seen behind a momentum and as finite as the true one.

    It asks before ``tx`` takes the step: a state that is still to be read can't be written where it lies, and would be
    copied.
    """

    def ask(g: Any) -> tuple[Any, Any]:
        return tx.update(g, state, params, **extra)

    again = False
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((updates, state, params))):
        program, (found, _) = jax.make_jaxpr(ask, return_shape=True)(updates)
        known = _known(depend(program), found, updates)
        if known is not None:
            return *ask(updates), known
        # The step is computed anew, which is cheap but for products of matrices, as Muon's.
        again = "dot_general" not in str(program)
    first, probe = ask(updates), ask(jax.tree.map(_opposite, updates))
    steps = jax.tree.map(lambda a, b: jnp.any(a != b), first[0], probe[0])
    if again:
        first = ask(_after(updates, steps))
    return *first, steps


def _known(results: list[Depends], steps: Any, updates: Any) -> Any:
    """Of which leaves the steps, the first of the results, depend on their own gradients; None if it is not known."""
    structure: Any
    leaves, structure = jax.tree.flatten(steps)
    own = [(one.must >> i & 1, one.may >> i & 1) for i, one in enumerate(results[: len(leaves)])]
    if structure != jax.tree.structure(updates) or any(must != may for must, may in own):
        return None
    return jax.tree.unflatten(structure, [np.asarray(must == 1) for must, _ in own])


def _after(updates: Any, steps: Any) -> Any:
    """The gradients, bit for bit, but not before it is known which are stepped on."""
    one = after(jnp.ones(()), [step.astype(jnp.float32) for step in jax.tree.leaves(steps)])
    return jax.tree.map(lambda g: g * one.astype(g.dtype), updates)


def _opposite(g: jax.Array) -> jax.Array:
    sign = jnp.where(g > 0, 1, -1).astype(g.dtype)
    return jnp.where(jnp.isfinite(g), -1024 * (g + sign), g)


def own_state(state: Any, theirs: Any, paths: list[Any]) -> Any:
    """What a second state of ``tx`` has of its own beside a first, ``theirs``: the arrays kept for the leaves at paths.

    All else, such as counts and injected rates, is one for both: ``theirs``.
    """
    shared = dict(jax.tree_util.tree_leaves_with_path(theirs))

    def keep(path: Any, leaf: Any) -> Any:
        own = jnp.ndim(leaf) > 0 and any(path[len(path) - len(end) :] == end for end in paths)
        return leaf if own or path not in shared else Shared()

    return jax.tree_util.tree_map_with_path(keep, state)


def whole_state(own: Any, theirs: Any) -> Any:
    """The inverse of :func:`own_state`."""
    shared = dict(jax.tree_util.tree_leaves_with_path(theirs))

    def is_shared(node: Any) -> bool:
        return isinstance(node, Shared)

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: shared[path] if is_shared(leaf) else leaf, own, is_leaf=is_shared
    )


def refuse_inside(state: Any) -> None:
    """Refuses optimizers that would undo what a rule does to the weights after their step.

    Raises:
      ValueError: if the state is of such a one.
    """
    if found := _first(state, _NOT_INSIDE):
        raise ValueError(
            f"This rule changes the weights after the optimizer's step, which what has a {found} inside "
            f"jaxfa.optimizer would undo: put it outside, such as optax.lookahead(jaxfa.optimizer(tx, rule), ...) or "
            f"optax.chain(jaxfa.optimizer(tx, rule), line_search)."
        )


def refuse_accumulation(state: Any) -> None:
    """Refuses optimizers that accumulate, beside a feedback that learns from each batch.

    Raises:
      ValueError: if the state is of such a one.
    """
    if found := _first(state, _ACCUMULATES):
        raise ValueError(
            f"This rule's feedback learns by a transformation of its own, to which what has a {found} inside "
            f"jaxfa.optimizer gives no mean over batches: put it outside, "
            f"optax.MultiSteps(jaxfa.optimizer(tx, rule), every_k_schedule)."
        )


def _first(state: Any, kinds: tuple[Any, ...]) -> str | None:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return next((type(node).__name__ for node in nodes if isinstance(node, kinds)), None)
