"""Checkpoints of arrays by orbax: renamed when complete, so that a kill at any moment leaves the last one whole."""

from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

import jaxfa

Checkpoints: TypeAlias = ocp.CheckpointManager


def checkpoints(folder: Path) -> Checkpoints:
    """A manager of a run's checkpoints, to be used in a ``with`` statement; keeps the last two."""
    options = ocp.CheckpointManagerOptions(
        # Not asynchronous: the next step donates the very buffers that a thread would still be writing.
        max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )  # fmt: skip
    where, handler = (folder / "checkpoints").absolute(), ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(where, options=options, item_handlers=handler)


def save(manager: Checkpoints, epoch: int, state: Any) -> None:
    """Saves a state.

    Args:
      manager: from :func:`checkpoints`.
      epoch: how many epochs have been trained.
      state: a tree of arrays and PRNG keys.
    """
    manager.save(epoch, args=ocp.args.StandardSave(_by_path(state)))


def restore(manager: Checkpoints, like: Any) -> tuple[int, Any] | None:
    """Restores the last checkpoint.

    Args:
      manager: from :func:`checkpoints`.
      like: a state of the same structure, shapes and dtypes; factors may have lost columns since.

    Returns:
      The epoch and the state, or None if there is no checkpoint.

    Raises:
      ValueError: if the checkpoint is damaged or of another network, method or number of seeds.
    """
    epoch = manager.latest_step()
    if epoch is None:
        return None
    found = _read(manager, epoch)
    like = _shrunk(like, found)
    expected = _by_path(like)
    _check_same(_folder(manager, epoch), found, expected)
    keys = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key), like)
    arrays = jax.tree.unflatten(jax.tree.structure(like), [found[path] for path in expected])
    return epoch, jax.tree.map(lambda is_key, a: jax.random.wrap_key_data(a) if is_key else a, keys, arrays)


def restore_placed(manager: Checkpoints, like: Any) -> tuple[int, Any] | None:
    """Restores the last checkpoint on the devices of now; each process reads what its own devices hold.

    Args:
      manager: from :func:`checkpoints`.
      like: a tree of ``jax.ShapeDtypeStruct`` with shardings, which may be others than those it was saved with.

    Returns:
      The epoch (or step) and the state, or None if there is no checkpoint.

    Raises:
      ValueError: if the checkpoint is damaged or of another network.
    """
    epoch = manager.latest_step()
    if epoch is None:
        return None
    expected = _by_path(like)
    # Read by shape, orbax would pad or cut an array of another network.
    _check_same(_folder(manager, epoch), manager.item_metadata(epoch), expected)
    found = _read(manager, epoch, expected)
    return epoch, jax.tree.unflatten(jax.tree.structure(like), [found[path] for path in expected])


def _folder(manager: Checkpoints, epoch: int) -> Path:
    return Path(manager.directory) / str(epoch)


def _read(manager: Checkpoints, epoch: int, placed: Any = None) -> Any:
    try:
        return manager.restore(epoch, args=ocp.args.StandardRestore(placed))
    except jax.errors.JaxRuntimeError:
        raise  # of another process, which died, not of the file
    # Orbax and tensorstore tell of a damaged file by a dozen exception types.
    except Exception as error:
        raise ValueError(
            f"The checkpoint {_folder(manager, epoch)} is damaged ({type(error).__name__}). Delete that folder to go "
            f"on from the one before it, or start again with --fresh."
        ) from error


def _shrunk(like: Any, found: dict[str, Any]) -> Any:
    """The state with the ranks of the checkpoint, where layers are factored."""

    def cut(path: Any, node: Any) -> Any:
        there = found.get(f"{jax.tree_util.keystr(path)}.s")
        if not isinstance(node, jaxfa.factored.Factors) or there is None:
            return node
        return jax.tree.map(lambda leaf: leaf[..., : there.shape[-1]], node)

    return jax.tree_util.tree_map_with_path(cut, like, is_leaf=lambda node: isinstance(node, jaxfa.factored.Factors))


def _by_path(state: Any) -> dict[str, jax.Array]:
    """A flat dictionary: its names and shapes tell a checkpoint of another configuration from a damaged one."""

    def raw(leaf: jax.Array) -> jax.Array:
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return {jax.tree_util.keystr(path): raw(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def _check_same(where: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    def shapes(tree: dict[str, Any]) -> dict[str, str]:
        return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in tree.items()}

    there, here = shapes(found), shapes(expected)
    for path in {**here, **there}:
        if there.get(path) != here.get(path):
            raise ValueError(
                f"The checkpoint {where} is not of this run: {path} is {there.get(path, 'missing')}, expected "
                f"{here.get(path, 'no such array')}. Choose another --out, or start again with --fresh."
            )


def last_state(folder: Path, start: Any) -> Any:
    """The state after a run's last epoch, from its checkpoint; ``start``, of the same shapes, where there is none."""
    with checkpoints(folder) as manager:
        return (restore(manager, start) or (0, start))[1]
