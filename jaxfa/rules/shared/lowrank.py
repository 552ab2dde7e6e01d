"""What the low-dimensional rules share: ranks, projections, and Oja's rule for many outputs at once."""

import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfa.base import Alike, LayerFeedback, Operation, feedback_dataclass, is_feedback, transpose
from jaxfa.paths import matches
from jaxfa.rules.shared.outputs import counts_outputs_last
from jaxfa.varying import refuse_shards

Rank = int | float | Mapping[str, int | float]


@feedback_dataclass
class LowRank(LayerFeedback):
    """A fixed matrix of rank ``r`` in the place of the weights, kept and used as its two factors.

    Attributes:
      p: from the error, ``(m, r)``.
      q: to the input, as ``w`` with ``r`` outputs: ``(n, r)``, for a convolution HWIr.
    """

    p: jax.Array
    q: jax.Array

    def matrix(self, w: jax.Array) -> jax.Array:
        """The product, which a backward pass forms only where it is cheaper."""
        return jnp.tensordot(self.q, self.p.astype(w.dtype), (-1, -1))

    def transport(self, op: Operation, x: jax.Array, w: jax.Array, delta: jax.Array) -> jax.Array:
        check_outputs_last(op, x, w, self.q, delta)
        if not self.is_thinner(delta.size // delta.shape[-1]):
            return super().transport(op, x, w, delta)
        thin = jnp.tensordot(delta, self.p.astype(delta.dtype), 1)
        # A convolution's p is a 1x1 projection of the channels, and q keeps the window, the stride and the padding.
        return transpose(lambda x: op(x, self.q.astype(w.dtype)), x, thin)

    @property
    def projects(self) -> bool:
        """Whether the errors' product with ``p`` is made in any case, because ``p`` learns from it."""
        return False

    def is_thinner(self, errors: int) -> bool:
        """Whether the factors take so many errors back in fewer multiplications than their product, formed once."""
        (m, r), n = self.p.shape[-2:], self.q.size // self.q.shape[-1]
        product = errors * n * m + n * m * r + (errors * m * r if self.projects else 0)
        return errors * m * r + errors * r * n <= product


def check_rank(rank: Rank) -> None:
    """Refuses what is no rank."""
    values: list[Any] = list(rank.values()) if isinstance(rank, Mapping) else [rank]
    for value in values or [rank]:
        if not (_is_count(value) or _is_fraction(value)):
            raise ValueError(
                f"A rank is a whole number from 1, a fraction of a layer's outputs in (0, 1], or a dictionary of these "
                f"by globs of layer paths; got {value!r}."
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_fraction(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) and 0.0 < float(value) <= 1.0


def globs_of(rank: Rank, labels: str | None = None) -> tuple[str, ...]:
    """The globs of layer paths that a rule was given; ``"*"``, which is all that are left, may match nothing."""
    given = (*(rank if isinstance(rank, Mapping) else ()), *([labels] if labels else ()))
    return tuple(glob for glob in given if glob != "*")


def is_at(path: str, glob: str) -> bool:
    """Whether a glob matches a path or something above it; ``"*"`` matches all."""
    return glob == "*" or matches(path, (glob,), under=True)


def rank_at(rank: Rank, path: str, n: int, m: int) -> int:
    """The rank of one layer of ``n`` inputs and ``m`` outputs."""
    if isinstance(rank, Mapping):
        found = [value for glob, value in rank.items() if is_at(path, glob)]
        if not found:
            raise ValueError(
                f"No rank is given for the layer {path!r}: add it, or '*' for all others, to {rank!r}; without Flax, "
                f"call init with path=."
            )
        rank = found[0]
    return min(int(rank) if _is_count(rank) else max(1, round(rank * m)), n, m)


def oja(p: jax.Array, errors: jax.Array) -> jax.Array:
    """Oja's subspace rule: ``(C p - p p^T C p) / tr C`` with the errors' centred covariance ``C``.

    Its fixed points are bases of principal subspaces, of which the top one is stable. ``C`` is never formed: ``N`` rows
    cost ``4 N m r`` operations or, where the rank is high, ``6 N m r``, of which the transport of the same error shares
    ``2 N m r``.

    Args:
      p: the projection, ``(m, r)``.
      errors: ``(N, ..., m)``; all but the last axis count examples.

    Returns:
      The step, ``(m, r)``; zero if the errors do not vary, or their squares are too small or too large for numbers.

    Raises:
      ValueError: if there is one error alone, which has no covariance, or in a ``shard_map``.
    """
    refuse_shards(
        "Oja's rule needs the covariance of the whole batch, of which a device sees its own part alone. Shard the "
        "arrays under jit instead, where they are one batch, or choose learn_p=False."
    )
    wide = jnp.promote_types(p.dtype, jnp.float32)
    errors = errors.reshape(-1, errors.shape[-1]).astype(wide)
    rows = errors.shape[0]
    if rows < 2:
        raise ValueError(
            "Oja's rule needs the covariance of a batch of errors, and got one error alone. Give the layer a batch; "
            "vmap over seeds or layers, not over examples; or choose learn_p=False."
        )
    mean = errors.mean(0, keepdims=True)
    # The product with p is the one that carries the error back, which the compiler then makes only once.
    thin = errors @ p.astype(wide)
    thin = thin - thin.mean(0, keepdims=True)
    total = jnp.sum((errors - mean) ** 2)
    # Squares that are too small for a number, or too large, tell nothing.
    tells = (total > errors.size * jnp.finfo(wide).tiny) & jnp.isfinite(total)
    step = _towards(p.astype(wide), thin, errors, mean)
    return jnp.where(tells, step / jnp.where(tells, total, 1), 0).T.astype(p.dtype)


def _towards(p: jax.Array, thin: jax.Array, errors: jax.Array, mean: jax.Array) -> jax.Array:
    """``p^T C (1 - p p^T)`` of ``(N, m)`` errors, of which ``thin`` is their product with ``p``, centred."""
    (units, rank), rows = p.shape, len(errors)
    if rows * units < rank * (rows + units):
        # Where the rank is high for so few rows, what p misses of each error is the shorter way.
        return thin.T @ (errors - mean - thin @ p.T)
    # Nothing is written of the errors' size: where the thin side is centred, the other's mean drops out but for
    # rounding. Of the two orders of this product compilers are faster at the one with the thin side first.
    moved = thin.T @ errors - thin.sum(0)[:, None] * mean
    # p^T C p, from the shorter side: the batch's rows or the units.
    return moved - (moved @ p if rows > units else thin.T @ thin) @ p.T


def check_outputs_last(op: Operation, x: jax.Array, w: jax.Array, q: jax.Array, delta: jax.Array) -> None:
    """Refuses an operation of which ``op(x, q)`` with ``r`` outputs is not the same operation."""
    if not counts_outputs_last(op, x, w, delta.shape) or q.shape[:-1] != w.shape[:-1]:
        raise ValueError(
            f"A low-rank feedback needs weights (n, m) or (window..., n, m) whose last axis counts the outputs, as the "
            f"result's last axis does, and factors made for them by rule.init(key, w); got weights {w.shape}, an "
            f"error {delta.shape} and q {q.shape}. Convolutions in groups need a feedback for each group: "
            f"jaxfa.nn.attach makes them."
        )


def factors_learn(
    learn_p: bool, learn_q: bool, learning_rate: float, weight_decay: float, shape: Any = None
) -> Alike | optax.GradientTransformation | None:
    """How both factors learn: ``p`` by plain steps of Oja's rule, ``q`` as the weights of that shape do."""
    if not 0.0 <= weight_decay < 1.0:
        raise ValueError(f"weight_decay must be in [0, 1), got {weight_decay}.")
    if learn_q:
        return Alike("q", weight_decay, shape, learning_rate if learn_p else 0.0)
    return _projections_learn(learning_rate) if learn_p else None


def _projections_learn(learning_rate: float) -> optax.GradientTransformation:
    def step(signal: Any) -> Any:
        return replace(jax.tree.map(jnp.zeros_like, signal), p=-learning_rate * signal.p)

    return optax.stateless(lambda signals, _: jax.tree.map(step, signals, is_leaf=is_feedback))
