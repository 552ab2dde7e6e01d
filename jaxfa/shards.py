"""Batches in parts: what takes a statistic of a batch must have all of it."""

import jax

LAYER = "layer"  # the axis along which jaxfa itself lays out layers; every device along it has the whole batch


def refuse_shards(reason: str) -> None:
    """Refuses to run inside a ``shard_map`` that may have split the batch.

    Args:
      reason: why, and what to do instead.

    Raises:
      ValueError: if there is one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = [axis for axis in mesh.manual_axes if axis != LAYER and mesh.shape[axis] > 1]
    if axes:
        raise ValueError(f"Inside shard_map over {axes}: {reason}")
