"""How a feedback learns, in words, and what is said if the phase in which it does was forgotten."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfa.base import DirectFeedback, LayerFeedback, Rule, keep


class Phase:
    """Whether a rule's own phase ran on a model, or was missed and told.

    A static attribute, that of one model equal to that of another, so that equal models share traced programs; a
    program notes it on the model that it was traced with.
    """

    def __init__(self) -> None:
        self.is_settled = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Phase)

    def __hash__(self) -> int:
        return hash(Phase)


def phase_of(rule: Rule) -> Phase | None:
    """That of a model; None for a rule that has no phase of its own."""
    return None if rule.refine is keep else Phase()


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


def quiet(attached: Any, error: Any = None) -> Any:
    """A copy that says nothing when it is differentiated: what is measured is no step.

    Of a call whose error has a known shape it need not be traced for that.
    """
    copy = nnx.clone(attached)
    copy.phase = nnx.static(None)
    copy.error = nnx.static(error and jax.typeof(jnp.zeros(error.shape, error.dtype)))
    return copy


def remind(attached: Any, outputs: Any) -> Any:
    """The outputs; if the rule's own phase never ran on the model, their first gradient warns."""
    phase = attached.phase
    if phase is None or phase.is_settled:
        return outputs
    name = getattr(attached.rule.refine, "__qualname__", "This rule").partition(".")[0]

    def mark(leaf: Any) -> Any:
        return _reminder(name, phase, leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf

    return jax.tree.map(mark, outputs, is_leaf=lambda node: isinstance(node, nnx.Module | nnx.Variable))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reminder(name: str, phase: Phase, y: jax.Array) -> jax.Array:
    del name, phase
    return y


def _forward(name: str, phase: Phase, y: jax.Array) -> tuple[jax.Array, None]:
    # This rule of the forward pass runs, or is traced, where there is a gradient to come, and nowhere else.
    if not phase.is_settled:
        phase.is_settled = True
        warnings.warn(
            f"{name} learns its feedback in a phase of its own, which never ran before this gradient: call "
            f"model.refine(key, x) before each step.",
            stacklevel=2,
        )
    return y, None


def _backward(name: str, phase: Phase, residuals: None, e: jax.Array) -> tuple[jax.Array]:
    del name, phase, residuals
    return (e,)


_reminder.defvjp(_forward, _backward)
