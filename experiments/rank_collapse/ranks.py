"""How many directions a layer's errors, gradients and updates span: measured of every epoch."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from threadpoolctl import threadpool_limits

import jaxfa
import jaxfa.nn
from experiments.common.seeds import side_by_side
from experiments.common.trainer import State, Trainer
from experiments.rank_collapse.spectra import Trajectory

_entropy_rank = jax.jit(jaxfa.diagnostics.entropy_rank)
_participation_ratio = jax.jit(jaxfa.diagnostics.participation_ratio)


def ranks(trainer: Trainer, *, probe: int) -> Callable[[State], dict[str, Any]]:
    """What measures the loss on a probe and the effective ranks, ``{kind: {layer: (seeds,)}}``.

    Within a batch, the probe: ``error``, the loss's gradient in a layer's output, a row per image; ``gradient`` and
    ``update``, of a kernel as a matrix ``(inputs, outputs)``, what the rule finds and what the optimizer would make
    of it. Along the trajectory, a row per step: ``gradients`` and ``updates``. All are Roy and Vetterli's effective
    ranks; ``participation`` holds the participation ratios of the last two.

    Args:
      trainer: of dense layers and convolutions, whose optimizer begins and ends with
        :func:`experiments.rank_collapse.spectra.remember`.
      probe: how many training images the ranks within a batch are of, the first, unaugmented.
    """
    images = tuple(array[:probe] for array in trainer.data)
    signals_of = jax.jit(side_by_side(lambda state, images: _signals(trainer, state, images), trainer.seeds, (0, None)))

    def measured(rank: Callable[[jax.Array], jax.Array], kinds: dict[str, Any]) -> dict[str, Any]:
        """A rank of every seed's matrix, one at a time: a batched SVD can hang a machine of two cores."""
        order = [row.layer for row in trainer.coverage.rows]
        return {
            kind: {
                layer: np.array([float(rank(matrix)) for matrix in layers[layer]]) for layer in order if layer in layers
            }
            for kind, layers in kinds.items()
        }

    def measure(state: State) -> dict[str, Any]:
        loss, signals = signals_of(state, images)
        found = filter(_is_trajectory, jax.tree.leaves(state.optimizer, is_leaf=_is_trajectory))
        trajectories = {name: _by_layer(one.rows) for name, one in zip(("gradients", "updates"), found, strict=True)}
        # LAPACK's threads spin while they wait, which on a shared machine makes seconds of a small SVD's milliseconds.
        with threadpool_limits(1):
            return {
                "probe_loss": np.asarray(loss),
                "rank": measured(_entropy_rank, signals | trajectories),
                "participation": measured(_participation_ratio, trajectories),
            }

    return measure


def _signals(trainer: Trainer, state: State, probe: Any) -> tuple[jax.Array, dict[str, Any]]:
    """The loss on the probe, and each layer's error, gradient and update, as matrices."""
    x, learned = trainer.inputs(probe[0]), (state.params, state.feedback)

    def loss(model: Any) -> jax.Array:
        return trainer.task.loss(model(x), probe[1])

    def objective(learned: Any) -> tuple[jax.Array, Any]:
        model = trainer.model(state._replace(params=learned[0], feedback=learned[1]), copy=True)
        model.train()
        return loss(model), jaxfa.nn.layer_errors(model, loss)

    (value, errors), signals = jax.value_and_grad(objective, has_aux=True)(learned)
    updates, _ = trainer.optimizer().update(signals, state.optimizer, learned)
    found = {"error": errors, "gradient": _kernels(signals, errors), "update": _kernels(updates, errors)}
    return value, found | {"error": {layer: error.reshape(len(error), -1) for layer, error in errors.items()}}


def _kernels(tree: Any, layers: Iterable[str]) -> dict[str, jax.Array]:
    """The kernels among a model's parameters, as matrices ``(inputs, outputs)``."""
    found = _by_layer(tree)
    return {layer: found[layer].reshape(-1, found[layer].shape[-1]) for layer in layers}


def _by_layer(tree: Any) -> dict[str, jax.Array]:
    """The arrays of a tree that are called ``kernel``, by their layer's path in the model."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    pairs = zip(names, (leaf for _, leaf in leaves), strict=True)
    return {
        name.partition("model/")[2].removesuffix("/kernel"): leaf for name, leaf in pairs if name.endswith("/kernel")
    }


def _is_trajectory(node: Any) -> bool:
    return isinstance(node, Trajectory)
