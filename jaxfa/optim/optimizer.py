"""One optax transformation for the parameters and the feedback."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfa.base import Rule, is_feedback
from jaxfa.optim.trees import join, nodes_of, split, unboxed
from jaxfa.optim.unattached import for_unattached

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
    """The state of :func:`optimizer`.

    Attributes:
      params: the state of the user's optimizer, as it would be without any feedback.
      feedback: the state of the feedback's learning.
    """

    params: Any
    feedback: Any


class Shared(NamedTuple):
    """In a feedback's state, what it shares with the parameters' state."""


def optimizer(tx: optax.GradientTransformation, rule: Rule) -> optax.GradientTransformationExtraArgs:
    """One optax transformation for parameters and feedback: ``tx`` for the one, the rule's for the other.

    ``tx`` is shown the parameters alone, in the structure that they have without feedback, so that masks, labels and
    norms are theirs. It touches a feedback only where the rule asks for it (Kolen-Pollack, LDFA). What the rule itself
    does to weights and feedback happens when ``tx`` takes a step, and not where it accumulates, skips or freezes.

    What makes steps of gradients (Adam, clipping, masks, labels, rates, decay) goes inside, in ``tx``: outside, it
    would change the rule's own steps, too. What deals with whole steps or batches (``optax.MultiSteps``,
    ``apply_if_finite``, ``lookahead``, ``schedule_free``, line searches) goes outside, around the result, or inside
    where no error says otherwise. What keeps copies of parameters or gradients outside, such as ``MultiSteps``, is
    given to a Flax model by :class:`jaxfa.nn.Optimizer`; ``nnx.Optimizer`` loses the structure of a feedback in these
    after the first step.

    Args:
      tx: the optimizer of the parameters.
      rule: the rule that made the feedback.

    Returns:
      A transformation of any tree that holds both, such as the pair ``(params, feedback)`` or the state that
      ``nnx.Optimizer`` passes it; a feedback is recognised by its class. Further arguments of ``update`` are of that
      tree, too: ``value_fn`` takes it, ``grad`` has its structure.

    Raises:
      TypeError: if ``rule`` is not a :class:`jaxfa.Rule`.
      ValueError: by ``init``, if the rule's feedback learns and the tree holds none, or ``tx`` has a wrapper that must
        go outside.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa, optax
      >>> rule, params = jaxfa.fa(), {"w": jnp.ones((3, 2))}
      >>> feedback = {"w": rule.init(jax.random.key(0), params["w"])}
      >>> tx = jaxfa.optimizer(optax.adamw(1e-3), rule)
      >>> state = tx.init((params, feedback))
      >>> signals = jax.tree.map(jnp.ones_like, (params, feedback))
      >>> updates, state = tx.update(signals, state, (params, feedback))
      >>> params, feedback = optax.apply_updates((params, feedback), updates)

    Source: Hessel et al., "Optax: composable gradient transformation and optimisation, in JAX!", 2020,
    https://github.com/google-deepmind/optax
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"jaxfa.optimizer(tx, rule) expects a jaxfa.Rule such as jaxfa.fa(), got {rule!r}.")
    transform = rule.transform
    if transform is None or isinstance(transform, optax.GradientTransformation):
        both = _apart(tx, transform)
    else:
        both = transform(tx)
    both = for_unattached(with_extra(tx), both)

    def init(tree: Any) -> OptimizerState:
        tree = unboxed(tree)
        if transform is not None and not any(map(is_feedback, nodes_of(tree))):
            raise ValueError(
                "This rule's feedback learns, but the optimizer was given none. Pass it the pair (params, feedback), "
                "or make it as nnx.Optimizer(model, tx, wrt=(nnx.Param, jaxfa.nn.Feedback))."
            )
        return both.init(split(tree))

    def update(updates: Any, state: OptimizerState, params: Any = None, **extra: Any) -> tuple[Any, OptimizerState]:
        boxed: Any = jax.tree.structure(updates)
        tree = unboxed(params)
        trees = {name: arg for name, arg in extra.items() if jax.tree.structure(arg) == boxed}
        extra |= {name: split(unboxed(arg))[0] for name, arg in trees.items()}
        if "value_fn" in extra:
            value_fn = extra["value_fn"]
            extra["value_fn"] = lambda params: value_fn(join(tree, params, split(tree)[1]))
        found, state = both.update(split(unboxed(updates)), state, split(tree), **extra)
        found = join(unboxed(updates), *found)
        leaves = jax.tree.leaves(found)  # twice as many from optax.lookahead
        return (jax.tree.unflatten(boxed, leaves) if len(leaves) == boxed.num_leaves else found), state

    return optax.GradientTransformationExtraArgs(init, update)


def _apart(tx: Any, own: optax.GradientTransformation | None) -> optax.GradientTransformationExtraArgs:
    """``tx`` for the parameters and, in its steps, ``own`` for the feedback; None leaves it fixed."""
    tx = with_extra(tx)

    def init(both: Any) -> OptimizerState:
        state = init_on(tx, both[0])
        if own is None:
            return OptimizerState(state, optax.EmptyState())
        refuse_accumulation(state)
        return OptimizerState(state, own.init(both[1]))

    def update(updates: Any, state: OptimizerState, both: Any, **extra: Any) -> tuple[Any, OptimizerState]:
        fixed = jax.tree.map(jnp.zeros_like, updates[1])
        if own is None:
            found, after = tx.update(updates[0], state.params, both[0], **extra)
            return (found, fixed), OptimizerState(after, state.feedback)
        found, after, steps = stepped(tx, updates[0], state.params, both[0], **extra)
        learned, kept = own.update(updates[1], state.feedback, both[1])
        moves = jnp.any(jnp.asarray(jax.tree.leaves(steps) or True))  # a step of zero is one: dkp's first is
        learned, kept = (
            jax.tree.map(lambda new, old: jnp.where(moves, new, old), new, old)
            for new, old in ((learned, fixed), (kept, state.feedback))
        )
        return (found, learned), OptimizerState(after, kept)

    return optax.GradientTransformationExtraArgs(init, update)


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

    A step may well be zero, and what is no step, such as a decay of frozen weights, may be not. So this asks ``tx``
    once more, for the opposite gradient, large enough to be seen behind a momentum and as finite as the true one.
    """
    found, after = tx.update(updates, state, params, **extra)
    probe, _ = tx.update(jax.tree.map(_opposite, updates), state, params, **extra)
    return found, after, jax.tree.map(lambda a, b: jnp.any(a != b), found, probe)


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
