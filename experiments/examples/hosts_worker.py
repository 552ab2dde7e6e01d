"""The process of :mod:`experiments.examples.hosts` that trains; started by it, with the same arguments."""

import hashlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfa
from experiments.common import checkpoint, data
from experiments.examples.hosts import REFUSED, Config
from jaxfa import stacks

_PIXELS, _CLASSES = 64, 10
_RULE = jaxfa.dfa()


def connect(config: Config) -> None:
    """Finds the other processes, if there are any; to be called before JAX looks for devices.

    Args:
      config: says how.
    """
    if config.cluster:
        jax.distributed.initialize(heartbeat_timeout_seconds=config.heartbeat)
    elif config.coordinator:
        jax.distributed.initialize(
            config.coordinator, config.processes, config.process, heartbeat_timeout_seconds=config.heartbeat
        )


def mesh_of(config: Config) -> Mesh:
    """All devices of all processes, ``data x layer``.

    Args:
      config: says how many stages there are.

    Returns:
      The mesh.

    Raises:
      ValueError: if the devices cannot be divided so.
    """
    devices = jax.device_count()
    if devices % config.layer:
        raise ValueError(f"{devices} devices cannot be divided into --layer {config.layer} stages.")
    return stacks.mesh(data=devices // config.layer, layer=config.layer)


def train(config: Config, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Trains from the last checkpoint on.

    Args:
      config: what is trained.
      mesh: where; every process has to run this with the same mesh.

    Yields:
      At the start and after each checkpoint ``step``, ``loss`` of the last batch (at the start None) and ``sha256`` of
      the parameters.

    Raises:
      ValueError: if the checkpoint is damaged or of another network, or the mesh cannot hold the network.
    """
    step, digits = _step(config, mesh), data.load("digits")
    like = abstract(config, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, like)
    with checkpoint.checkpoints(config.out) as manager:
        for old in manager.all_steps() if config.fresh else ():
            manager.delete(old)
        found = checkpoint.restore_placed(manager, like)
        first, state = found or (0, jax.jit(lambda: _create(config), out_shardings=where)())
        yield {"step": first, "loss": None, "sha256": fingerprint(state, mesh)}
        for done in range(first + 1, config.steps + 1):
            state, loss = step(state, *_batch(config, mesh, digits, done))
            if done % config.every == 0 or done == config.steps:
                checkpoint.save(manager, done, state)
                yield {"step": done, "loss": float(loss), "sha256": fingerprint(state, mesh)}


def abstract(config: Config, mesh: Mesh) -> Any:
    """The shapes, dtypes and places of the state on a mesh.

    Args:
      config: what is trained.
      mesh: where.

    Returns:
      A tree of ``jax.ShapeDtypeStruct``.
    """

    def placed(leaf: Any) -> Any:
        # What there is for every layer, momentum included, has three axes, and nothing else has.
        where = NamedSharding(mesh, P("layer") if leaf.ndim == 3 else P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(placed, jax.eval_shape(lambda: _create(config)))


def _optimizer(config: Config) -> optax.GradientTransformation:
    return jaxfa.optimizer(optax.sgd(config.learning_rate, momentum=0.9), _RULE)


def _create(config: Config) -> dict[str, Any]:
    *keys, last = jax.random.split(jax.random.key(config.seed), 4)
    shapes = {"stem": (_PIXELS, config.width), "stack": (config.layers, config.width, config.width)}
    shapes["head"] = config.width, _CLASSES
    params = {
        name: jax.random.normal(key, shape) / shape[-2] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    # Small enough that the residual stream stays of order one at every depth.
    params["stack"] /= config.layers
    h, logits = jnp.zeros((1, config.width)), jnp.zeros((1, _CLASSES))
    feedback = jax.vmap(lambda key: _RULE.init(key, h, logits))(jax.random.split(last, config.layers))
    learned = params, feedback
    return {"learned": learned, "optimizer": _optimizer(config).init(learned)}


def _step(config: Config, mesh: Mesh) -> Any:
    tx = _optimizer(config)

    def loss_of(learned: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        params, feedback = learned
        wire = jnp.zeros((len(x), _CLASSES), x.dtype)
        h, wire = stacks.pipeline(
            lambda w, h: h + jnp.tanh(h @ w), params["stack"], x @ params["stem"], wire, feedback,
            mesh=mesh, microbatches=config.microbatches, schedule=jaxfa.stacks.stream,
        )  # fmt: skip
        return optax.softmax_cross_entropy_with_integer_labels(h @ params["head"] + wire, y).mean()

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(state["learned"], x, y)
        updates, optimizer = tx.update(grads, state["optimizer"], state["learned"])
        return {"learned": optax.apply_updates(state["learned"], updates), "optimizer": optimizer}, loss

    where = jax.tree.map(lambda leaf: leaf.sharding, abstract(config, mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=(where, NamedSharding(mesh, P())))


def _batch(config: Config, mesh: Mesh, digits: data.Dataset, number: int) -> list[jax.Array]:
    """Batch ``number``, drawn from its number alone; each process makes only what its own devices hold."""
    rows = np.random.default_rng([config.seed, number]).choice(len(digits.train_images), config.batch, replace=False)
    x = digits.train_images[rows].reshape(config.batch, _PIXELS) / 16
    arrays = x.astype(jax.dtypes.canonicalize_dtype(float)), digits.train_labels[rows]
    spread = NamedSharding(mesh, P("data"))
    return [jax.make_array_from_callback(one.shape, spread, one.__getitem__) for one in arrays]


def fingerprint(state: dict[str, Any], mesh: Mesh) -> str:
    """A hash of all parameters, bit for bit.

    Args:
      state: of the training.
      mesh: where it is.

    Returns:
      The SHA-256, in hexadecimal.
    """
    # No process has all parameters: each is sent them for this.
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(state["learned"])
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(whole))).hexdigest()


def _end_with_the_watcher() -> None:
    os.read(0, 1)
    os._exit(1)


def main(args: list[str]) -> None:
    """Trains; then, or when it can't, ends the process.

    Args:
      args: the command line, without the program's name.
    """
    threading.Thread(target=_end_with_the_watcher, daemon=True).start()
    try:
        config = tyro.cli(Config, args=args)
        connect(config)
        for record in train(config, mesh_of(config)):
            if jax.process_index() == 0:
                print(json.dumps(record), flush=True)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        _stop(REFUSED)
    except Exception:
        traceback.print_exc()
        _stop(1)


def _stop(status: int) -> None:
    # Not by an exception: JAX would first wait for the other processes, which may be dead, or wait for this one.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
