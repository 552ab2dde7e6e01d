"""What rules share that draw anew at every update: a seed and a step in the feedback, and what advances the step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

_SHIFTS = (0, 8, 16, 24)


class Redrawn:
    """A feedback whose numbers are drawn from a seed and a step, never stored.

    ``jax.grad`` refuses integer leaves, so that the seed and the step are kept as their bytes: numbers below 256, exact
    in every float type to which mixed-precision code may cast a tree, bfloat16 included.

    Attributes:
      seed_bytes: the bytes of this layer's seed, ``(4,)``.
      step_bytes: the bytes of the number of updates so far, ``(4,)``.
    """

    seed_bytes: jax.Array
    step_bytes: jax.Array

    @property
    def seed(self) -> jax.Array:
        """This layer's seed, an integer."""
        return _number(self.seed_bytes)

    @property
    def step(self) -> jax.Array:
        """The number of updates so far, an integer."""
        return _number(self.step_bytes)


def first_bytes(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bytes of a seed, drawn, and of the first step."""
    return _bytes(jax.random.bits(key, (), jnp.uint32)), jnp.zeros(4, jnp.float32)


def _bytes(number: jax.Array) -> jax.Array:
    return jnp.stack([number >> shift & 255 for shift in _SHIFTS], -1).astype(jnp.float32)


def _number(its_bytes: jax.Array) -> jax.Array:
    parts = its_bytes.astype(jnp.uint32)
    return sum((parts[..., i] << shift for i, shift in enumerate(_SHIFTS)), jnp.zeros((), jnp.uint32))


def _count(feedback: Any) -> Any:
    return jax.tree.map(jnp.array, feedback)


def _advance(signals: Any, counted: Any, feedback: Any = None) -> tuple[Any, Any]:
    """The count is the state's own, of which the feedback is told: what else wrappers do to its bytes is undone."""

    def tick(own: Any) -> Any:
        return dataclasses.replace(own, step_bytes=_bytes(own.step + 1).astype(own.step_bytes.dtype))

    if feedback is None:
        raise ValueError("This rule's steps are told to its feedback: call update(updates, state, (params, feedback)).")
    counted = jax.tree.map(tick, counted, is_leaf=lambda node: isinstance(node, Redrawn))
    return jax.tree.map(lambda new, old: (new - old).astype(old.dtype), counted, feedback), counted


redraw = optax.GradientTransformation(_count, _advance)
