"""White noise of many layers, from so little that it can be drawn again and need not be kept."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxfa.base import Initializer

_BITS = 32


class Noise(Protocol):
    """What perturbs: arrays of variance 1, made of seeds that are small beside them. A seed is for one array."""

    def seeds(self, key: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
        """What arrays of these shapes are made of, independent of each other."""

    def made(self, seed: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """The array of a seed, always the same."""

    def signs(self, seed: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Signs of a seed of which no noise is made; whatever the noise is."""


@dataclasses.dataclass(frozen=True)
class Signs:
    """An initializer of -1 and 1: white noise from one bit each, much cheaper than normal draws."""

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return self.made(self.seeds(key, [shape])[0], shape, dtype)

    def seeds(self, key: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
        """The bits, 32 a word. One draw for all: each would take longer to compile than a layer."""
        words = [-(-math.prod(shape) // _BITS) for shape in shapes]
        return jnp.split(jax.random.bits(key, (sum(words),), jnp.uint32), np.cumsum(words)[:-1])

    def made(self, seed: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """The bits as signs."""
        bits = seed[:, None] >> jnp.arange(_BITS, dtype=jnp.uint32)[None] & 1
        return (1 - 2 * bits.astype(dtype)).ravel()[: math.prod(shape)].reshape(shape)

    signs = made


class Keyed(NamedTuple):
    """Any initializer's noise, whose seeds are keys."""

    initializer: Initializer

    def seeds(self, key: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
        """A key for each."""
        return list(jax.random.split(key, len(shapes)))

    def made(self, seed: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """The initializer's draw."""
        return self.initializer(seed, shape, dtype)

    def signs(self, seed: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """The key's signs."""
        return random_signs(seed, shape, dtype)


random_signs = Signs()


def noise_of(perturbation: Initializer) -> Noise:
    """An initializer's noise."""
    return perturbation if isinstance(perturbation, Signs) else Keyed(perturbation)
