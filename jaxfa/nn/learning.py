"""How a feedback learns, in words, and what is said if the phase in which it does was forgotten."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfa.base import DirectFeedback, LayerFeedback, Rule, keep

# Of rules with a phase of their own, what ran, or was missed and told. A rule is a value: it has no place for this.
_SEEN: set[Any] = set()


def how_it_learns(rule: Rule, feedback: Any) -> str:
    """How a rule's feedback learns, in words for a table."""
    if rule.refine is not keep:
        return "by refine"
    if type(feedback).learns:
        return type(feedback).learns
    if rule.transform is None:
        return "fixed"
    signals = type(feedback).signal not in (LayerFeedback.signal, DirectFeedback.signal)
    return "from the batch" if signals else "at every update"


def note_refined(rule: Rule) -> None:
    """Notes that a rule's own phase ran, or was traced into a program that runs it."""
    _SEEN.add(rule.refine)


def quiet(attached: Any) -> Any:
    """A copy that says nothing when it is differentiated: what is measured is no step."""
    copy = nnx.clone(attached)
    copy.reminds = False
    return copy


def remind(rule: Rule, outputs: Any) -> Any:
    """The outputs; if the rule's own phase never ran, their first gradient warns."""
    if rule.refine is keep or rule.refine in _SEEN:
        return outputs

    def mark(leaf: Any) -> Any:
        return _reminder(rule, leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf

    return jax.tree.map(mark, outputs, is_leaf=lambda node: isinstance(node, nnx.Module | nnx.Variable))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reminder(rule: Rule, y: jax.Array) -> jax.Array:
    del rule
    return y


def _forward(rule: Rule, y: jax.Array) -> tuple[jax.Array, None]:
    # This rule of the forward pass runs, or is traced, where there is a gradient to come, and nowhere else.
    if rule.refine not in _SEEN:
        _SEEN.add(rule.refine)
        name = getattr(rule.refine, "__qualname__", "This rule").partition(".")[0]
        warnings.warn(
            f"{name} learns its feedback in a phase of its own, which never ran before this gradient: call "
            f"model.refine(key, x) before each step.",
            stacklevel=2,
        )
    return y, None


def _backward(rule: Rule, residuals: None, e: jax.Array) -> tuple[jax.Array]:
    del rule, residuals
    return (e,)


_reminder.defvjp(_forward, _backward)
