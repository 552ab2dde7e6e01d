"""A trainer that measures how many directions a layer's errors, gradients and updates span."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.seeds import side_by_side
from experiments.spectra import Trajectory
from experiments.task import Task
from experiments.trainer import Loop, State, Trainer

_entropy_rank = jax.jit(jaxfa.diagnostics.entropy_rank)
_participation_ratio = jax.jit(jaxfa.diagnostics.participation_ratio)


class RankTrainer(Trainer):
    """A :class:`Trainer` of dense layers and convolutions whose evaluation measures effective ranks, too.

    Args:
      task: what is trained; its optimizer begins and ends with :func:`experiments.spectra.remember`.
      seeds: as for a :class:`Trainer`.
      loop: likewise.
      probe: how many training images the ranks within a batch are of, the first, unaugmented.
    """

    def __init__(self, task: Task, seeds: Sequence[int], loop: Loop = "auto", *, probe: int) -> None:
        super().__init__(task, seeds, loop)
        self._probe = (self._train[0][:probe], self._train[1][:probe])
        self._measure = jax.jit(side_by_side(self._signals, seeds, (0, None)))

    def evaluate(self, state: State) -> dict[str, Any]:
        """As :meth:`Trainer.evaluate`, and the loss on the probe and the ranks, ``{kind: {layer: (seeds,)}}``.

        Within a batch, the probe: ``error``, the loss's gradient in a layer's output, a row per image; ``gradient`` and
        ``update``, of a kernel as a matrix ``(inputs, outputs)``, what the rule finds and what the optimizer would make
        of it. Along the trajectory, a row per step: ``gradients`` and ``updates``. All are Roy and Vetterli's effective
        ranks; ``participation`` holds the participation ratios of the last two.
        """
        loss, signals = self._measure(state, self._probe)
        found = filter(_is_trajectory, jax.tree.leaves(state.optimizer, is_leaf=_is_trajectory))
        trajectories = {name: _by_layer(one.rows) for name, one in zip(("gradients", "updates"), found, strict=True)}
        return super().evaluate(state) | {
            "probe_loss": np.asarray(loss),
            "rank": self._measured(_entropy_rank, signals | trajectories),
            "participation": self._measured(_participation_ratio, trajectories),
        }

    def _measured(self, rank: Callable[[jax.Array], jax.Array], kinds: dict[str, Any]) -> dict[str, Any]:
        """A rank of every seed's matrix, one at a time: a batched SVD can hang a machine of two cores."""
        order = [row.layer for row in self.coverage.rows]
        return {
            kind: {
                layer: np.array([float(rank(matrix)) for matrix in layers[layer]]) for layer in order if layer in layers
            }
            for kind, layers in kinds.items()
        }

    def _signals(self, state: State, probe: Any) -> tuple[jax.Array, dict[str, Any]]:
        """The loss on the probe, and each layer's error, gradient and update, as matrices."""
        x, learned = self._inputs(probe[0]), (state.params, state.feedback)

        def loss(model: Any) -> jax.Array:
            return self.task.loss(model(x), probe[1])

        def objective(learned: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(self._graph, *learned, state.rest, copy=True)
            model.train()
            return loss(model), jaxfa.nn.layer_errors(model, loss)

        (value, errors), signals = jax.value_and_grad(objective, has_aux=True)(learned)
        updates, _ = self._optimizer().update(signals, state.optimizer, learned)
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
