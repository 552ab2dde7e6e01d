"""Weights kept as the factors of their singular value decomposition.

Dense weights ``(n, m)`` are ``u diag(s) v^T``. A convolution's kernel is one matrix from its first window axis and its
inputs to its other window axes and its outputs, ``(H C, W N)`` for HWIO, so that the two factors are two convolutions:
a vertical one with ``r`` outputs, then a horizontal one. (The slides of Roy et al. exchange the two factors, whose
sizes then do not fit; this is the split of Yang, Tang, Wen, Yan, Hu, Li, Li, Chen, "Learning Low-rank Deep Neural
Networks via Singular Vector Orthogonality Regularization and Singular Value Sparsification", 2020,
https://arxiv.org/abs/2004.09031.)
"""

import math
from dataclasses import field, replace
from functools import partial
from numbers import Integral
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfa.base import feedback_dataclass, is_feedback


@feedback_dataclass  # they stand beside feedback in trees, and within it
class Factors:
    """One layer's weights ``w = u diag(s) v^T``, a pytree of the three.

    It has the shape and dtype of ``w``, so that it goes wherever ``w`` goes.

    Attributes:
      u: from the inputs, ``(n, r)``; for a convolution HWIO, ``(H I, r)``.
      s: ``(r,)``.
      v: from the outputs, ``(m, r)``; for a convolution, ``(W O, r)``.
      shape: the shape of ``w``.
      name: the layer's, which its parameters, feedback and optimizer state have in common.
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array
    shape: tuple[int, ...] = field(metadata={"static": True})
    name: str = field(default="", metadata={"static": True})

    @property
    def ndim(self) -> int:
        """The number of axes of ``w``."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The factors' dtype."""
        return self.u.dtype

    def astype(self, dtype: Any) -> "Factors":
        """The factors in another dtype."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self)

    def dense(self) -> jax.Array:
        """The product ``w``, which no step of training forms."""
        w = (self.u * jnp.expand_dims(self.s, 0)) @ self.v.T
        height, *window, n, m = self.shape if self.ndim > 2 else (1, *self.shape)
        return jnp.moveaxis(w.reshape(height, n, *window, m), 1, -2).reshape(self.shape)

    def kernels(self) -> tuple[jax.Array, jax.Array]:
        """Two thin weights of the layer's own kind, run one after the other: ``u diag(s)`` and ``v^T``.

        Dense ``(n, r)`` and ``(r, m)``; of a convolution HWIO, ``(H, 1, I, r)`` and ``(1, W, r, O)``.
        """
        first, second = self.u * jnp.expand_dims(self.s, 0), self.v.T
        if self.ndim == 2:
            return first, second
        height, *window, n, m = self.shape
        second = jnp.moveaxis(second.reshape(-1, *window, m), 0, -2)
        return first.reshape(height, *[1] * len(window), n, -1), jnp.expand_dims(second, 0)


def is_factors(node: Any) -> TypeGuard[Factors]:
    """Whether a node of a tree is :class:`Factors`: the leaf test for trees that hold some."""
    return isinstance(node, Factors)


def factorise(w: jax.Array | Factors, rank: float | None = None, *, name: str = "") -> Factors:
    """The singular value decomposition of a layer's weights: ``w = u diag(s) v^T``, exact at full rank.

    On a CPU do not ``vmap`` it: two of jaxlib 0.10's batched decompositions can wait for each other for ever.

    Args:
      w: dense weights ``(n, m)`` or a convolution's kernel ``(window..., n, m)``; factors stay what they are.
      rank: how many of the largest singular values to keep: a whole number, or a fraction of full rank in (0, 1]
        (``1.0`` is all of them, ``1`` is one); None keeps all.
      name: the layer's, which its feedback and optimizer state will have, too; every layer needs its own.

    Returns:
      :class:`Factors`, with orthonormal columns ``u`` and ``v``.

    Raises:
      ValueError: if ``w`` has fewer than two axes, or the rank is none, or there is one for factors.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> w = jax.random.normal(jax.random.key(0), (3, 3, 4, 8))
      >>> factors = jaxfa.factored.factorise(w)
      >>> factors.u.shape, factors.v.shape, bool(jnp.allclose(factors.dense(), w, atol=1e-5))
      ((12, 12), (24, 12), True)

    Source: Yang et al., "Learning Low-rank Deep Neural Networks via Singular Vector Orthogonality Regularization and
    Singular Value Sparsification", 2020, https://arxiv.org/abs/2004.09031
    """
    if isinstance(w, Factors):
        if rank is not None:
            raise ValueError(
                f"The layer {w.name!r} is factored already, at rank {w.s.shape[-1]}; rank={rank!r} is for dense ones. "
                f"Leave rank out, or choose others with at=."
            )
        return w
    if w.ndim < 2:
        raise ValueError(f"factorise expects weights (n, m) or (window..., n, m), got {w.shape}.")
    height, *window, n, m = w.shape if w.ndim > 2 else (1, *w.shape)
    matrix = jnp.moveaxis(w.reshape(height, *window, n, m), -2, 1).reshape(height * n, math.prod(window) * m)
    u, s, vt = jnp.linalg.svd(matrix.astype(jnp.promote_types(w.dtype, jnp.float32)), full_matrices=False)
    r = rank_of(rank, len(s))
    return Factors(u[:, :r], s[:r], vt[:r].T, w.shape, name).astype(w.dtype)


def matched(b: Factors, w: Factors) -> Factors:
    """The same product ``b``, its columns in the places and of the signs that are nearest to those of ``w``.

    A decomposition leaves both open: ``(u_i, s_i, v_i)`` may stand anywhere, and two of the three may be negated. The
    columns of ``w`` choose one after the other, that of the largest ``s`` first, among what is left: each the ``i`` and
    the signs of the least ``|w.u - u_i|^2 + |w.s - s_i|^2 + |w.v - v_i|^2``. (The least sum of all would take some
    ``r^2`` steps one after the other, slow for a wide layer and more so on a GPU.)
    """
    own, to = wide(b), wide(w)
    of_u, of_v, of_s = to.u.mT @ own.u, to.v.mT @ own.v, jnp.expand_dims(to.s, -1) * jnp.expand_dims(own.s, -2)
    signs = ((1, 1), (1, -1), (-1, 1), (-1, -1))
    overlaps = jnp.stack([x * of_u + y * of_v + x * y * of_s for x, y in signs])  # (4, ..., w's, b's)
    size = (own.u**2).sum(-2) + own.s**2 + (own.v**2).sum(-2)
    index = _chosen(overlaps.max(0) - jnp.expand_dims(size, -2) / 2, jnp.argsort(-jnp.abs(to.s)))
    best = jnp.take_along_axis(overlaps.argmax(0), jnp.expand_dims(index, -1), -1)[..., 0]
    x, y = (jnp.array(sign, own.s.dtype)[best] for sign in zip(*signs, strict=True))
    own = take(own, index)
    u, v = own.u * jnp.expand_dims(x, -2), own.v * jnp.expand_dims(y, -2)
    return replace(own, u=u, s=own.s * x * y, v=v).astype(b.dtype)


def take(w: Factors, index: Any) -> Factors:
    """Some columns: ``index`` is ``(..., k)``."""
    index = jnp.asarray(index)

    def columns(a: jax.Array) -> jax.Array:
        return jnp.take_along_axis(a, jnp.expand_dims(index, -2), -1)

    # By jax.tree, since an optimizer's state may hold optax's MaskedNode, which has no leaves, in an array's place.
    u, v = jax.tree.map(columns, (w.u, w.v))
    return replace(w, u=u, s=jax.tree.map(lambda s: jnp.take_along_axis(s, index, -1), w.s), v=v)


def wide(w: Factors) -> Factors:
    """The factors in single precision or more."""
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


@partial(jnp.vectorize, signature="(r,r),(r)->(r)")
def _chosen(nearness: jax.Array, order: jax.Array) -> jax.Array:
    """A column for each row: in this order, each takes the nearest that is left."""
    nearness = jnp.nan_to_num(nearness)

    def choose(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, is_left = state
        column = jnp.argmax(jnp.where(is_left, nearness[order[i]], -jnp.inf))
        return index.at[order[i]].set(column), is_left.at[column].set(False)

    return lax.fori_loop(0, order.size, choose, (jnp.zeros_like(order), jnp.ones(order.shape, bool)))[0]


def rank_of(rank: float | None, full: int) -> int:
    """The number of singular values of ``full`` that a rank keeps, as for :func:`factorise`."""
    if rank is None:
        return full
    whole, flag = isinstance(rank, Integral), isinstance(rank, bool | np.bool_)
    if flag or not (rank >= 1 if whole else 0 < rank <= 1):
        raise ValueError(f"A rank is a whole number from 1, or a fraction in (0, 1] of full rank; got {rank!r}.")
    return min(int(rank) if whole else max(1, round(rank * full)), full)


def orthonormal_factors(tree: Any) -> Any:
    """A mask for ``optax.masked``: true of the ``u`` and ``v`` of all weights' factors, false of everything else.

    Args:
      tree: any tree, such as the parameters.

    Returns:
      A tree of booleans of its structure.

    Example:
      >>> import jax.numpy as jnp, jaxfa, optax
      >>> params = {"w": jaxfa.factored.factorise(jnp.eye(3)), "b": jnp.zeros(3)}
      >>> tx = optax.chain(optax.adam(1e-3), optax.masked(jaxfa.factored.stiefel(), jaxfa.factored.orthonormal_factors))
      >>> jaxfa.factored.orthonormal_factors(params)["w"].s
      False

    Source: as :func:`factorise`.
    """

    def mark(node: Any) -> Any:
        none = jax.tree.map(lambda _: False, node)
        return replace(none, u=True, v=True) if is_factors(node) and jax.tree.leaves(node) else none

    return jax.tree.map(mark, tree, is_leaf=lambda node: is_factors(node) or is_feedback(node))
