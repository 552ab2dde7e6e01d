"""A row of the zoo: a model as its users write and call it, and what a direct rule needs to be told of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx


class Penalty(nnx.Variable):
    """A term of the loss that a model writes down in its forward pass."""


class Model(NamedTuple):
    """A row.

    Attributes:
      name: what its users call it.
      make: makes it from ``nnx.Rngs``.
      args: makes its positional arguments, since some of them are modules.
      at: sensible places for a direct rule to tap.
      kwargs: likewise its keyword arguments.
      method: the method that its users train it by.
      logits: which of several outputs is the source of the error.
      allow: what may pass errors on by backpropagation, so that ``at`` or a layer-wise rule holds.
      reference: the same model as a plain Python loop, and where to tap that.
    """

    name: str
    make: Callable[[nnx.Rngs], Any]
    args: Callable[[], tuple[Any, ...]]
    at: tuple[str, ...]
    kwargs: Callable[[], dict[str, Any]] = dict
    method: str = "__call__"
    logits: Callable[[Any], Any] | None = None
    allow: tuple[str, ...] = ()
    reference: tuple[Callable[[nnx.Rngs], Any], tuple[str, ...]] | None = None


def inputs(*shape: int, seed: int = 0) -> Any:
    """Standard normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape)


def tokens(*shape: int, below: int = 11, seed: int = 0) -> Any:
    """Whole numbers from 0."""
    return jax.random.randint(jax.random.key(seed), shape, 0, below)
