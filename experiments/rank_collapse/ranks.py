"""How many directions a layer's activations, errors and gradients span: measured along a training."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxfa.nn
from experiments.common.trainer import State, Trainer
from experiments.rank_collapse.spectra import Trajectory


def ranks(
    trainer: Trainer, *, probe: int, blocks: tuple[str, ...], epochs: int = 0, every: int = 1
) -> Callable[[State], dict[str, Any]]:
    """What measures the loss on a probe and the effective ranks, ``{kind: {layer: (seeds,)}}``.

    Within a batch, the probe: ``error`` and ``channels``, the loss's gradient in a layer's output, as a row per image
    or per image and pixel; ``activations``, what a block hands on behind its ReLU, likewise per pixel, their mean not
    taken off, since no gradient does; ``gradient`` of a kernel as a matrix ``(inputs, outputs)``. Along the
    ``trajectory``: of the last gradients, a row per step.

    Args:
      trainer: of dense layers and convolutions, whose optimizer begins with
        :func:`experiments.rank_collapse.spectra.remember`.
      probe: how many training images the ranks within a batch are of, the first, unaugmented.
      blocks: the modules at the paths that begin with one of these hand activations on.
      epochs: how many there will be.
      every: epochs from one measurement to the next, counted back from the last; before the first step there is one,
        too, and after other epochs none.
    """
    images = tuple(array[:probe] for array in trainer.data)
    signals_of = trainer.of_seeds(lambda state, x, y: _signals(trainer, state, x, y, blocks), (0, None, None))

    def measure(state: State) -> dict[str, Any]:
        epoch = int(state.step[0]) // trainer.steps
        if epoch and (epochs - epoch) % every:
            return {}
        loss, found = jax.device_get(signals_of(state, *images))
        (last,) = (one for one in jax.tree.leaves(state.optimizer, is_leaf=_is_trajectory) if _is_trajectory(one))
        matrices = found | {"trajectory": _by_layer(last.rows)}
        order = [row.layer for row in trainer.coverage.rows]  # a transfer sorts dictionaries
        return {
            "probe_loss": loss,
            "rank": {
                kind: {
                    layer: np.array([*map(effective_rank, layers[layer])])
                    for layer in sorted(layers, key=lambda layer: _place(order, layer))
                }
                for kind, layers in matrices.items()
            },
        }

    return measure


def _place(order: list[str], path: str) -> int:
    """Where a layer, or the last one of a block, stands in the forward pass."""
    return max((i for i, layer in enumerate(order) if f"{layer}/".startswith(f"{path}/")), default=0)


def effective_rank(matrix: Any) -> float:
    """Roy and Vetterli's, from the Gram matrix of the shorter side: no singular vectors, and double precision."""
    matrix = np.asarray(matrix, float)
    gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
    sigma = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _signals(
    trainer: Trainer, state: State, images: jax.Array, labels: jax.Array, blocks: tuple[str, ...]
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """The loss on the probe, and matrices by kind and layer."""
    x = trainer.inputs(images)

    def loss(model: Any) -> jax.Array:
        return trainer.task.loss(model(x), labels)

    def objective(params: Any) -> jax.Array:
        model = trainer.model(state._replace(params=params), copy=True)
        model.train()
        return loss(model)

    model = trainer.model(state, copy=True)
    model.train()
    errors = jaxfa.nn.layer_errors(model, loss)
    plain = jaxfa.nn.plain(model)
    _, outputs = nnx.capture(plain, nnx.Intermediate, method_outputs=nnx.Intermediate)(x)
    behind = {_path(path[:-1]): leaf[0] for path, leaf in nnx.to_flat_state(outputs)}
    value, gradient = jax.value_and_grad(objective)(state.params)
    return value, {
        "error": {layer: error.reshape(len(error), -1) for layer, error in errors.items()},
        "channels": {layer: error.reshape(-1, error.shape[-1]) for layer, error in errors.items()},
        "activations": {
            path: nnx.relu(one).reshape(-1, one.shape[-1])
            for path, one in behind.items()
            if path.rpartition("/")[0] in blocks
        },
        "gradient": {layer: one.reshape(-1, one.shape[-1]) for layer, one in _by_layer(gradient).items()},
    }


def _by_layer(tree: Any) -> dict[str, jax.Array]:
    """The arrays of a tree that are called ``kernel``, by their layer's path in the model."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
    found = ((name.partition("model/")[2], leaf) for name, leaf in named)
    return {name.removesuffix("/kernel"): leaf for name, leaf in found if name.endswith("/kernel")}


def _path(keys: Any) -> str:
    return "/".join(map(str, keys))


def _is_trajectory(node: Any) -> bool:
    return isinstance(node, Trajectory)
