"""Sign-symmetric feedback: the error returns through the signs of the weights, with magnitudes of its own.

Liao, Leibo, Poggio, "How Important is Weight Symmetry in Backpropagation?", 2016, https://arxiv.org/abs/1510.05067;
the three variants as named by Moskovitz, Litwin-Kumar, Abbott, "Feedback alignment in deep convolutional networks",
2018, https://arxiv.org/abs/1812.06488
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers

from jaxfa.base import Initializer, LayerFeedback, LayerRule, feedback_dataclass
from jaxfa.rules.shared.redrawn import Redrawn, first_bytes, redraw


@feedback_dataclass
class SignFeedback(LayerFeedback):
    """``b = magnitude sign(w)``.

    Attributes:
      magnitude: a number (uSF), or an array of ``w``'s shape (frSF).
    """

    magnitude: jax.Array

    def matrix(self, w: jax.Array) -> jax.Array:
        return self.magnitude.astype(w.dtype) * jnp.sign(w)


@feedback_dataclass
class RedrawnSignFeedback(Redrawn, LayerFeedback):
    """``b = |M_t| sign(w)`` with ``M_t`` drawn anew at every step ``t`` from a counter, never stored.

    Attributes:
      seed_bytes: the bytes of this layer's seed, ``(4,)``.
      step_bytes: the bytes of the number of updates so far, ``(4,)``.
      bound: the largest magnitude.
      quantile: inverse distribution function of ``|M| / bound``.
    """

    learns: ClassVar[str] = "drawn at every update"
    seed_bytes: jax.Array
    step_bytes: jax.Array
    bound: float = dataclasses.field(metadata={"static": True})
    quantile: Callable[[jax.Array], jax.Array] = dataclasses.field(metadata={"static": True})

    def matrix(self, w: jax.Array) -> jax.Array:
        uniform = _counter_uniform(w.shape, self.seed, self.step)
        return (self.bound * self.quantile(uniform)).astype(w.dtype) * jnp.sign(w)


def usf(*, scale: float = 1.0) -> LayerRule:
    """Uniform sign-concordant feedback: ``b = c sign(w)``, ``c = scale sqrt(2 / (fan_in + fan_out))``.

    Args:
      scale: factor on Glorot's standard deviation ``c``, the published constant.

    Returns:
      A :class:`jaxfa.LayerRule`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> w = jnp.array([[-3.0, 0.5]])
      >>> jaxfa.usf(scale=1.5**0.5).init(jax.random.key(0), w).matrix(w)
      Array([[-1.,  1.]], dtype=float32)

    Source: Moskovitz et al., "Feedback alignment in deep convolutional networks", 2018,
    https://arxiv.org/abs/1812.06488
    """
    return LayerRule(lambda key, w: SignFeedback(jnp.asarray(scale * _glorot_deviation(w.shape), w.dtype)))


def frsf(*, distribution: Initializer | None = None, scale: float = 1.0) -> LayerRule:
    """Fixed random-magnitude sign-concordant feedback: ``b = |M| sign(w)``, ``M`` drawn once.

    Args:
      distribution: an initializer ``(key, shape, dtype) -> M``; Glorot's uniform one by default, as in BioTorch.
      scale: factor on the drawn ``M``.

    Returns:
      A :class:`jaxfa.LayerRule`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> w = jnp.array([[-3.0, 0.5]])
      >>> jnp.sign(jaxfa.frsf().init(jax.random.key(0), w).matrix(w))
      Array([[-1.,  1.]], dtype=float32)

    Source: as :func:`usf`.
    """
    draw = distribution or initializers.glorot_uniform()
    return LayerRule(lambda key, w: SignFeedback(scale * jnp.abs(draw(key, w.shape, w.dtype))))


def _uniform(u: jax.Array) -> jax.Array:
    return u


def brsf(*, quantile: Callable[[jax.Array], jax.Array] = _uniform, scale: float = 1.0) -> LayerRule:
    """Batchwise random-magnitude sign-concordant feedback: ``b = |M_t| sign(w)``, ``M_t`` new at every step.

    ``|M_t|`` is ``bound quantile(u)``, ``u`` uniform on [0, 1), ``bound = scale sqrt(6 / (fan_in + fan_out))``: with
    the default that is the magnitude of Glorot's uniform distribution. ``u`` is a hash of (seed, step, position), some
    ten integer operations that fuse into the backward pass; a call of the library's generator costs as much as the
    layer's matrix product. The step advances with each update of :func:`jaxfa.optimizer`.

    Args:
      quantile: inverse distribution function of the magnitudes, from [0, 1) to the range of ``|M| / bound``.
      scale: factor on the bound.

    Returns:
      A :class:`jaxfa.LayerRule`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> w = jnp.array([[-3.0, 0.5]])
      >>> jnp.sign(jaxfa.brsf().init(jax.random.key(0), w).matrix(w))
      Array([[-1.,  1.]], dtype=float32)

    Source: as :func:`usf`.
    """

    def init(key: jax.Array, w: jax.Array) -> RedrawnSignFeedback:
        bound = scale * math.sqrt(3.0) * _glorot_deviation(w.shape)
        return RedrawnSignFeedback(*first_bytes(key), bound, quantile)

    return LayerRule(init, transform=redraw)


def _glorot_deviation(shape: tuple[int, ...]) -> float:
    window = math.prod(shape[:-2])
    return math.sqrt(2.0 / (window * (shape[-2] + shape[-1])))


def _counter_uniform(shape: tuple[int, ...], seed: jax.Array, step: jax.Array) -> jax.Array:
    """Uniform numbers on [0, 1) of 24 bits, a pure function of seed, step and position."""
    position = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    stream = _mix(_mix(seed) + step)
    bits = _mix(_mix(position + stream) ^ stream)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _mix(z: jax.Array) -> jax.Array:
    # The finaliser of MurmurHash3 (Appleby, 2011) behind a Weyl step: every input bit reaches every output bit.
    z = z * jnp.uint32(0x9E3779B9) + jnp.uint32(0x6A09E667)
    z = (z ^ (z >> 16)) * jnp.uint32(0x85EBCA6B)
    z = (z ^ (z >> 13)) * jnp.uint32(0xC2B2AE35)
    return z ^ (z >> 16)
