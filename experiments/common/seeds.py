"""Several trainings side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


def side_by_side(function: Callable[..., Any], seeds: Sequence[int], axes: Any = 0) -> Callable[..., Any]:
    """``jax.vmap`` over seeds; for a single one the function itself behind an axis of one.

    Without a batch axis a condition stays a branch, of which one side runs, and XLA:CPU keeps its fast convolutions.

    Args:
      function: what one seed does.
      seeds: all seeds.
      axes: as ``in_axes`` of ``jax.vmap``: 0 for what the seeds do not share, None for what they do.

    Returns:
      The function of all seeds.
    """
    if len(seeds) > 1:
        return jax.vmap(function, axes)

    def call(*args: Any) -> Any:
        each = axes if isinstance(axes, tuple) else (axes,) * len(args)
        pairs = zip(args, each, strict=True)
        own = [arg if axis is None else jax.tree.map(lambda leaf: leaf[0], arg) for arg, axis in pairs]
        return jax.tree.map(lambda leaf: leaf[None], function(*own))

    return call
