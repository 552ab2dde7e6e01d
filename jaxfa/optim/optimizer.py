"""One optax transformation for the parameters and the feedback."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfa.base import Alike, Local, Rule, is_feedback
from jaxfa.optim.alike import alike
from jaxfa.optim.local import local
from jaxfa.optim.steps import OptimizerState, init_on, refuse_accumulation, stepped, with_extra
from jaxfa.optim.trees import join, learns_from_gradients, maker_of, nodes_of, split, unboxed
from jaxfa.optim.unattached import for_unattached


def optimizer(tx: optax.GradientTransformation, rule: Rule) -> optax.GradientTransformationExtraArgs:
    """One optax transformation for parameters and feedback: ``tx`` for the one, the rule's for the other.

    ``tx`` is shown the parameters alone, in the structure that they have without feedback, so that masks, labels and
    norms are theirs. It touches a feedback only where the rule asks for it (Kolen-Pollack, LDFA). What the rule itself
    does to weights and feedback happens when ``tx`` takes a step, and not where it accumulates, skips or freezes.

    What makes steps of gradients (Adam, clipping, masks, labels, rates, decay) goes inside, in ``tx``. What deals with
    whole steps or batches (``optax.MultiSteps``, ``apply_if_finite``, line searches) goes outside, around the result,
    or inside where no error says otherwise; a Flax model's is then made by :class:`jaxfa.nn.Optimizer`.

    Args:
      tx: the optimizer of the parameters.
      rule: the rule that made the feedback.

    Returns:
      A transformation of any tree that holds both, such as the pair ``(params, feedback)`` or what ``nnx.Optimizer``
        passes it. Further arguments of ``update`` are of that tree, too: ``value_fn`` takes it, ``grad`` has its
        structure.

    Raises:
      TypeError: if ``rule`` is not a :class:`jaxfa.Rule`.
      ValueError: by ``init``, if the rule's feedback learns and the tree holds none, if the tree holds feedback of a
        rule that learns and this one's does not, or if ``tx`` has a wrapper that must go outside; by ``update``, if the
        gradient was not taken in that feedback.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa, optax
      >>> rule, w = jaxfa.fa(), jnp.ones((3, 2))
      >>> both = w, rule.init(jax.random.key(0), w)
      >>> tx = jaxfa.optimizer(optax.adamw(1e-3), rule)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, both), tx.init(both), both)
      >>> w, feedback = optax.apply_updates(both, updates)

    Source: Hessel et al., "Optax: composable gradient transformation and optimisation, in JAX!", 2020,
    https://github.com/google-deepmind/optax
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"jaxfa.optimizer(tx, rule) expects a jaxfa.Rule such as jaxfa.fa(), got {rule!r}.")
    both = for_unattached(with_extra(tx), of_pair(tx, rule))

    def init(tree: Any) -> OptimizerState:
        tree = unboxed(tree)
        if rule.transform is not None and not any(map(is_feedback, nodes_of(tree))):
            raise ValueError(
                "This rule's feedback learns, but the optimizer was given none. Pass it the pair (params, feedback), "
                "or make it as nnx.Optimizer(model, tx, wrt=(nnx.Param, jaxfa.nn.Feedback))."
            )
        _check_learning(rule, tree)
        return both.init(split(tree))

    def update(updates: Any, state: OptimizerState, params: Any = None, **extra: Any) -> tuple[Any, OptimizerState]:
        boxed: Any = jax.tree.structure(updates)
        tree = unboxed(params)
        _check_feedback(unboxed(updates), tree)
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


def _check_feedback(updates: Any, params: Any) -> None:
    """Refuses a gradient that was not taken in the feedback that the optimizer was made with."""
    expected, got = (sum(map(is_feedback, nodes_of(tree))) for tree in (params, updates))
    if params is not None and expected != got:
        raise ValueError(
            f"The optimizer was made with {expected} feedbacks, and the gradient has {got}: differentiate in the "
            f"variables that the optimizer steps on. With nnx.Optimizer(model, tx, wrt=learned) that is "
            f"nnx.grad(loss, argnums=nnx.DiffState(0, learned)), where learned = (nnx.Param, jaxfa.nn.Feedback)."
        )


def _check_learning(rule: Rule, tree: Any) -> None:
    """Refuses a rule that leaves feedback as it is, for feedback that another one made to learn."""
    learning = {type(node).__name__ for node in nodes_of(tree) if is_feedback(node) and learns_from_gradients(node)}
    if rule.transform is None and learning:
        raise ValueError(
            f"jaxfa.optimizer was given {maker_of(rule.init)}, which leaves all feedback as it is, and a "
            f"{', '.join(sorted(learning))}, which learns: give it the rule of jaxfa.nn.attach."
        )


def of_pair(tx: optax.GradientTransformation, rule: Rule) -> optax.GradientTransformationExtraArgs:
    """The transformation of the pair ``(params, feedback)`` that a rule makes of the parameters' optimizer."""
    transform = rule.transform
    if isinstance(transform, Alike):
        return alike(tx, *transform)
    if isinstance(transform, Local):
        return local(tx, transform)
    if transform is None or isinstance(transform, optax.GradientTransformation):
        return _apart(tx, transform)
    return transform(tx)


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
