"""How a feedback learns, in words, and what is said if what it learns by never comes."""

import warnings
from functools import partial
from typing import Any

import jax
from flax import nnx

from jaxfa.base import Rule, keep
from jaxfa.nn.model.leaves import at_leaves, named_floats
from jaxfa.nn.model.variables import Feedback
from jaxfa.optim.trees import learns_from_gradients, maker_of, nodes_of


class Phase:
    """Whether a model's feedback got what it learns by: the rule's own phase, or a gradient; or was told that not.

    A static attribute, that of one model equal to that of another, so that equal models share traced programs; a
    program notes it on the model that it was traced with.

    Attributes:
      is_settled: whether the rule's own phase ran, or its want was told.
      is_learned: whether the feedback was differentiated, or its want was told.
      looks: how many gradients outside of ``jit`` were of the parameters alone.
    """

    def __init__(self) -> None:
        self.is_settled, self.is_learned, self.looks = False, False, 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Phase)

    def __hash__(self) -> int:
        return hash(Phase)


def how_it_learns(rule: Rule, feedback: Any) -> str:
    """How a rule's feedback learns, in words for a table."""
    if rule.refine is not keep:
        return "by refine"
    if type(feedback).learns:
        return type(feedback).learns
    if rule.transform is None:
        return "fixed"
    return "from the batch" if learns_from_gradients(feedback) else "at every update"


def quiet(attached: Any, *, is_run: bool = True) -> Any:
    """A copy that says nothing when it is differentiated: what is measured is no step; what is never run, in no order.

    Args:
      attached: the model.
      is_run: whether the copy's gradient will be run, or looked at alone.
    """
    copy = nnx.clone(attached)
    copy.phase, copy.in_turn = nnx.static(None), is_run
    return copy


def remind(attached: Any, outputs: Any) -> Any:
    """The outputs, whose gradient warns of feedback that never learns: for want of its phase, or of a gradient."""
    phase, rule = attached.phase, attached.rule
    if phase is None:
        return outputs
    refine = "" if phase.is_settled or rule.refine is keep else _REFINE.format(maker_of(rule.refine))
    nodes = [] if phase.is_learned else nodes_of(nnx.as_pure(nnx.state(attached, Feedback)))
    learning = [node for node in nodes if how_it_learns(rule, node) not in ("fixed", "by refine")]
    ways = [how_it_learns(rule, node) for node in learning[:1]]
    ways = [f"is {way}" if way.startswith("drawn") else f"learns {way}" for way in ways]
    learns = _DIFFERENTIATE.format(maker_of(rule.init), *ways) if ways else ""
    if not (refine or learns):
        return outputs
    floats = _reminder(phase, refine, learns, named_floats(outputs), learning)
    return at_leaves(outputs, {name: partial(_instead, leaf) for name, leaf in floats.items()})


def _instead(new: jax.Array, old: jax.Array) -> jax.Array:
    del old
    return new


_REFINE = (
    "{} learns its feedback in a phase of its own, which never ran before this gradient: call model.refine(key, x) "
    "before each step."
)
_DIFFERENTIATE = (
    "The feedback of {} {}, but this gradient is of other variables alone, so that a step by it leaves the feedback "
    "as it is: train with learned = (nnx.Param, jaxfa.nn.Feedback), nnx.grad(loss, "
    "argnums=nnx.DiffState(0, learned)) and nnx.Optimizer(model, jaxfa.optimizer(tx, rule), wrt=learned)."
)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _reminder(phase: Phase, refine: str, learns: str, outputs: Any, feedback: Any) -> Any:
    del phase, refine, learns, feedback
    return outputs


def _forward(phase: Phase, refine: str, learns: str, outputs: Any, feedback: Any) -> tuple[Any, None]:
    # This rule of the forward pass runs, or is traced, where there is a gradient to come, and nowhere else.
    if refine and not phase.is_settled:
        phase.is_settled = True
        warnings.warn(refine, stacklevel=2)
    values = jax.tree.map(lambda leaf: leaf.value, outputs)
    if learns and not phase.is_learned:
        # A step under jit is traced but once. Outside, one gradient may be taken to look at it.
        is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
        is_learned = any(leaf.perturbed for leaf in jax.tree.leaves(feedback))
        phase.looks += not is_learned
        phase.is_learned = is_learned or is_traced or phase.looks > 1
        if phase.is_learned and not is_learned:
            warnings.warn(learns, stacklevel=2)
    return values, None


def _backward(phase: Phase, refine: str, learns: str, residuals: None, errors: Any) -> tuple[Any, None]:
    del phase, refine, learns, residuals
    return errors, None


_reminder.defvjp(_forward, _backward, symbolic_zeros=True)
