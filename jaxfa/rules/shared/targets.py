"""What a classification's output error tells of its targets, for rules that learn from these."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxfa.rules.shared.projection import shared_axes
from jaxfa.varying import refuse_shards


def examples_in(h: jax.Array, e: jax.Array, examples: float | None, rule: str) -> float:
    """By what the loss divides its sum: ``examples``, or how many the error has.

    Raises:
      ValueError: if neither tells, in a ``shard_map``.
    """
    if examples is not None:
        return examples
    refuse_shards(
        f"{rule} reads the targets off the error's signs, which do not tell by what the loss is divided. Say "
        f"{rule}(examples=...), how many the loss averages over: those of all devices if it is summed or averaged "
        f"over them, those of one if the gradients are; or shard the arrays under jit instead."
    )
    return math.prod(e.shape[: shared_axes(h, e)])


def check_examples(examples: float | None, rule: str) -> None:
    """Refuses a number of examples that is none."""
    if examples is not None and not examples > 0:
        raise ValueError(f"{rule} needs examples > 0, how many the loss averages over, or None; got {examples}.")


def targets(h: jax.Array, e: jax.Array, examples: float) -> jax.Array:
    """One-hot targets, of ``e``'s shape, of a mean softmax cross-entropy whose error is ``e = (softmax - y) / N``.

    An example's target is where its error is negative. An example without error, fitted to the last bit or of weight 0,
    has none. An example whose target can't be told has NaN: whoever learns from it sees that nothing was learned.

    Args:
      h: the activation that learns, which shares the axes of the examples.
      e: the output error, ``(N, ..., C)``.
      examples: ``N``, by which the loss divides.

    Raises:
      ValueError: if the error is of no classes; outside of ``jit``, if a target can't be told, and why.
    """
    check_classes(h, e)
    # What rounding leaves of a sum that is zero, or of an error that is.
    slack = math.sqrt(jnp.finfo(e.dtype).eps) / examples
    e = e.astype(jnp.promote_types(e.dtype, jnp.float32))
    negative = e < 0
    count, sizes = negative.sum(-1), jnp.abs(e).sum(-1)
    hard = ((count == 1) & (jnp.abs(e.sum(-1)) <= slack)) | ((count == 0) & (sizes <= slack))
    mean = jnp.abs(e).max(-1) <= 1 / examples + slack
    _say(jnp.isfinite(sizes), _NOT_FINITE)
    _say(mean | ~hard, _SUMMED.format(examples))
    _say(hard, _UNTOLD.format("softmax cross-entropy of the logits"))
    return jnp.where((hard & mean)[..., None], negative.astype(e.dtype), jnp.nan)


def signed_targets(e: jax.Array, examples: float) -> jax.Array:
    """The same of a softmax or sigmoid cross-entropy, of which an example may have several classes, or none.

    That labels are soft is told by a softmax's errors alone, whose sum is zero: two of them are negative. The sum of
    sigmoids' errors is zero by chance, but not for all examples; so the whole batch is NaN, or nothing.
    """
    slack, tiny = (math.sqrt(jnp.finfo(dtype).eps) for dtype in (e.dtype, jnp.float32))
    e = e.astype(jnp.promote_types(e.dtype, jnp.float32))
    negative = e < 0
    sizes, mean = jnp.abs(e).sum(-1), jnp.abs(e).max(-1) <= (1 + slack) / examples
    learns = sizes > tiny / examples
    soft = learns & (negative.sum(-1) > 1)
    hard = ~(soft.any() & (~learns | (jnp.abs(e.sum(-1)) <= tiny * sizes)).all()) | (learns.sum() < 2)
    _say(jnp.isfinite(sizes), _NOT_FINITE)
    _say(mean, _SUMMED.format(examples))
    _say(hard, _UNTOLD.format("cross-entropy of one softmax, or of sigmoids,"))
    return jnp.where(hard & mean[..., None], negative.astype(e.dtype), jnp.nan)


def check_classes(h: Any, e: Any) -> None:
    """Refuses logits of no classes, or of other examples and tokens than an activation's.

    Raises:
      ValueError: if they are.
    """
    if len(e.shape) != shared_axes(h, e) + 1 or e.shape[-1] < 2:
        raise ValueError(
            f"A local loss needs logits (N, ..., C) of two classes or more, one target for each example or token of "
            f"the activation; got an error {e.shape} for an activation {h.shape}. Tap a module before the axis of "
            f"tokens is merged or averaged, or say with logits= which of the outputs are a classifier's."
        )


_NOT_FINITE = (
    "The output error is not finite, so that it tells no targets: look for NaN or infinity in the batch, then in the "
    "weights and the logits."
)
_SUMMED = (
    "The output error is larger than that of a cross-entropy averaged over {:g} examples, as which it is read: average "
    "the loss over the batch, or say with examples= by what it is divided, where the rule takes that."
)
_UNTOLD = (
    "The output error does not tell the targets, from which this rule learns: take the mean {} with hard labels (no "
    "smoothing, no mixing, no other loss), or a rule that uses the error itself, such as jaxfa.dfa()."
)


def _say(holds: jax.Array, reason: str) -> None:
    """Raises for a reason, where values are there to tell; in a traced program there are none."""
    if not isinstance(holds, jax.core.Tracer) and not holds.all():
        raise ValueError(reason)
