"""Several trainings side by side, or in turns: on a CPU, where they convolve.

XLA:CPU runs the convolutions of several seeds at once far slower than those of one seed after another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def apart(state: Any, seeds: int) -> list[Any]:
    """The state of each seed by itself, from that of all, whose first axis is theirs."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(seeds)]


def take_turns(seeds: Sequence[int], program: Any) -> bool:
    """Whether the seeds of a program, a jaxpr, run one after the other."""
    return len(seeds) > 1 and jax.default_backend() == "cpu" and "conv_general_dilated" in str(program)


def side_by_side(function: Callable[..., Any], alone: bool, axes: Any = 0) -> Callable[..., Any]:
    """``jax.vmap`` over seeds; for a seed alone the function itself behind an axis of one.

    Without a batch axis a condition stays a branch, of which one side runs.

    Args:
      function: what one seed does.
      alone: whether there is one seed in a call.
      axes: as ``in_axes`` of ``jax.vmap``: 0 for what the seeds do not share, None for what they do.

    Returns:
      The function of all seeds, or of each in its turn: :func:`in_turn` takes it.
    """
    if not alone:
        return jax.vmap(function, axes)

    def call(*args: Any) -> Any:
        own = [arg if axis is None else jax.tree.map(lambda leaf: leaf[0], arg) for arg, axis in _pairs(args, axes)]
        return jax.tree.map(lambda leaf: leaf[None], function(*own))

    return call


def in_turn(function: Callable[..., Any], seeds: int, axes: Any = 0) -> Callable[..., Any]:
    """The function of all seeds, from a compiled one of :func:`side_by_side` for a seed alone.

    Args:
      function: of arrays whose first axis is that of the seeds; it is called once for each.
      seeds: how many there are.
      axes: 0 for what the seeds do not share, None for what they do.
    """

    def call(*args: Any) -> Any:
        pairs = _pairs(args, axes)
        each = [
            function(
                *(arg if axis is None else jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], arg) for arg, axis in pairs)
            )
            for i in range(seeds)
        ]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *each)

    return call


def _pairs(args: Sequence[Any], axes: Any) -> list[tuple[Any, Any]]:
    return list(zip(args, axes if isinstance(axes, tuple) else (axes,) * len(args), strict=True))
