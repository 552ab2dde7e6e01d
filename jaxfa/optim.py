"""Optax transformations: one optimizer for the parameters and the feedback."""

from typing import Any

import jax
import optax

from jaxfa.base import Rule, is_feedback


def optimizer(tx: optax.GradientTransformation, rule: Rule) -> optax.GradientTransformation:
    """One optax transformation for parameters and feedback: ``tx`` for the one, the rule's for the other.

    Nothing in ``tx`` (weight decay, momentum, clipping) touches a feedback, except where the rule asks for it
    (Kolen-Pollack).

    Args:
      tx: the optimizer of the parameters.
      rule: the rule that made the feedback.

    Returns:
      A transformation of any tree that holds both, such as the pair ``(params, feedback)`` or the state that
      ``nnx.Optimizer`` passes it; a feedback is recognised by its class.

    Raises:
      TypeError: if ``rule`` is not a :class:`jaxfa.Rule`.
      ValueError: by ``init``, if the rule's feedback learns and the tree holds none.

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
    alike = not isinstance(rule.transform, optax.GradientTransformation)
    for_params, for_feedback = rule.transform(tx) if alike else (tx, rule.transform)
    both = optax.with_extra_args_support(optax.partition({"params": for_params, "feedback": for_feedback}, _labels))

    def init(tree: Any) -> Any:
        tree = _unboxed(tree)
        learns = rule.transform is not Rule._field_defaults["transform"]
        if learns and not any(map(is_feedback, jax.tree.leaves(tree, is_leaf=is_feedback))):
            raise ValueError(
                "This rule's feedback learns, but the optimizer was given none. Pass it the pair (params, feedback), "
                "or make it as nnx.Optimizer(model, tx, wrt=(nnx.Param, jaxfa.nn.Feedback))."
            )
        return both.init(tree)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        found, state = both.update(_unboxed(updates), state, _unboxed(params), **extra)
        return jax.tree.unflatten(jax.tree.structure(updates), jax.tree.leaves(found)), state

    return optax.GradientTransformationExtraArgs(init, update)


def decayed(tx: optax.GradientTransformation, weight_decay: float) -> optax.GradientTransformation:
    """``tx`` followed by ``w <- (1 - lambda) w``, not multiplied by the learning rate, for whatever has two axes."""
    return optax.chain(tx, optax.add_decayed_weights(-weight_decay, mask=_is_matrix))


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _unboxed(tree: Any) -> Any:
    # Flax's variables are boxes around values. nnx.Optimizer shows them to `init` and not to `update`, nnx.split to
    # both; the optimizer's state is always made for the values.
    def is_box(node: Any) -> bool:
        return hasattr(node, "get_value")

    return jax.tree.map(lambda node: node.get_value() if is_box(node) else node, tree, is_leaf=is_box)


def _labels(tree: Any) -> Any:
    return jax.tree.map(lambda node: "feedback" if is_feedback(node) else "params", tree, is_leaf=is_feedback)
