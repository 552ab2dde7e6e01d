"""What a classification's output error tells of its targets with the logits, for rules that learn from these.

An example that has the weight ``c`` in the loss, ``1 / N`` in a mean, has the error ``e = c (p - y)`` with the
predictions ``p`` and the hard label ``y``. So ``e / p`` is ``c`` for every class but the target, whose ``e`` is not
positive: of smoothed or mixed labels, and of other losses, it is not the same for all. The part ``-c y`` of the error
is what the rules are given in the place of ``e``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxfa.rules.shared.projection import shared_axes


def softmax_targets(logits: jax.Array, e: jax.Array) -> jax.Array:
    """``-c y`` of a softmax cross-entropy, ``(N, ..., C)``.

    An example whose error is zero, fitted but for rounding or of weight 0, has none. An example whose target can't be
    told has NaN: whoever learns from it sees that nothing was learned.

    Args:
      logits: ``(N, ..., C)``.
      e: the output error, ``(N, ..., C)``.

    Raises:
      ValueError: outside of ``jit``, if a target can't be told, and why.
    """
    t, told = _by_softmax(*_wide(logits, e))
    return _told(t, told, logits, e, "softmax cross-entropy")


def sigmoid_targets(logits: jax.Array, e: jax.Array) -> jax.Array:
    """The same of a sigmoid cross-entropy, of which an example may have several classes, or none."""
    t, told = _by_sigmoid(*_wide(logits, e))
    return _told(t, told, logits, e, "sigmoid cross-entropy")


def weighted(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One-hot targets ``(N, ..., C)`` and the examples' weights ``(N, ...)`` of what :func:`softmax_targets` gives."""
    t = check_targets(t)
    # NaN in both: a product with a truth value the compiler makes a choice, which would drop it.
    return jnp.where(jnp.isnan(t), t, t < 0), -t.sum(-1)


def check_targets(t: jax.Array) -> jax.Array:
    """Targets as they are given to a rule; NaN for an error that was not read.

    Raises:
      ValueError: outside of ``jit``, if it was not.
    """
    are = t <= 0
    _say(are | jnp.isnan(t), _UNREAD)
    return jnp.where(are.all(-1, keepdims=True), t, jnp.nan)


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


def _wide(logits: jax.Array, e: jax.Array) -> tuple[jax.Array, jax.Array, float]:
    """Both in single precision at least, and by what rounding changes them."""
    dtype = jnp.promote_types(jnp.promote_types(logits.dtype, e.dtype), jnp.float32)
    return logits.astype(dtype), e.astype(dtype), float(max(jnp.finfo(one.dtype).eps for one in (logits, e)))


def _by_softmax(logits: jax.Array, e: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """``-c y``, and whether ``e`` is ``c (p - y)``."""
    p = jax.nn.softmax(logits)
    # The target's ratio is the least; where it is likely, rounding may have taken the sign of its error.
    ratio = jnp.where((e < 0) | (p > 0.5), e / jnp.maximum(p, jnp.finfo(p.dtype).tiny), jnp.inf)
    y = jax.nn.one_hot(jnp.argmin(ratio, -1), p.shape[-1], dtype=p.dtype)
    others = jnp.sum(p * (1 - y), -1, keepdims=True)
    c, fitted = _weight(jnp.sum(e * (1 - y), -1, keepdims=True), others)
    apart = jnp.where(y > 0, -others, p)  # p - 1 would be rounded
    return -c * y, fitted | _is_part(c, apart, e, eps, jnp.where(y > 0, 1, others))


def _by_sigmoid(logits: jax.Array, e: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The same of sigmoids; a class without error may have no weight."""
    y = e < 0
    apart = jnp.where(e != 0, jnp.where(y, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits)), 0)
    c, fitted = _weight(*(jnp.abs(one).sum(-1, keepdims=True) for one in (e, apart)))
    return -c * y, fitted | _is_part(c, apart, e, eps, jnp.ones_like(apart))


def _weight(error: jax.Array, apart: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An example's weight in the loss, zero where it is fitted so well that rounding hides it; and where that is."""
    fitted = apart <= 4 * jnp.finfo(apart.dtype).eps
    return jnp.where(fitted, 0, error / jnp.where(fitted, 1, apart)), fitted[..., 0]


def _is_part(c: jax.Array, apart: jax.Array, e: jax.Array, eps: float, rounded: jax.Array) -> jax.Array:
    """Whether ``e`` is ``c`` times what predictions and labels are apart, each rounded beside a number of that size."""
    return jnp.all(jnp.abs(e - c * apart) <= c * (math.sqrt(eps) * jnp.abs(apart) + 4 * eps * rounded), -1)


_NOT_FINITE = (
    "The output error is not finite, so that it tells no targets: look for NaN or infinity in the batch, then in the "
    "weights and the logits."
)
_UNTOLD = (
    "The output error does not tell the targets, from which this rule learns: take the {} of the logits as the model "
    "returns them (no temperature, no mask), with hard labels (no smoothing, no mixing) and any weights of examples; "
    "or a rule that uses the error itself, such as jaxfa.dfa()."
)
_UNREAD = (
    "This rule learns from targets, and was given the output error: add the wire to the logits by "
    "jaxfa.with_wire(logits, wire, feedback), which reads the targets off the error."
)


def _told(t: jax.Array, told: jax.Array, logits: jax.Array, e: jax.Array, loss: str) -> jax.Array:
    _say(jnp.isfinite(e) & jnp.isfinite(logits), _NOT_FINITE)
    _say(told, _UNTOLD.format(loss))
    return jnp.where(told[..., None], t, jnp.nan).astype(e.dtype)


def _say(holds: jax.Array, reason: str) -> None:
    """Raises for a reason, where values are there to tell; in a traced program there are none."""
    if not isinstance(holds, jax.core.Tracer) and not holds.all():
        raise ValueError(reason)
