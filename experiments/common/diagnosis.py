"""What any training can log of its layers besides their angles: ranks, and what feedback alignment conserves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.common import seeds
from jaxfa.measure.conservation import half_square, imbalance, quantity
from jaxfa.measure.diagnostics import entropy_rank

_EXAMPLES = 256  # whose errors are decomposed, a row each


def measure(trainer: Any) -> Callable[[Any], dict[str, Any]]:
    """What measures :func:`diagnose` of every seed of a state, on the first training examples."""

    @jax.jit
    def one(state: Any, images: jax.Array, labels: jax.Array) -> dict[str, dict[str, jax.Array]]:
        x = trainer.inputs(images)
        first, (params, feedback) = trainer.begin(state.key)[1], trainer.learn(state, x, labels)[1]
        others = first._replace(rest=state.rest), state._replace(params=params, feedback=feedback)
        model, start, update = (trainer.model(each, copy=True) for each in (state, *others))
        model.train()
        return diagnose(model, start, update, lambda model: trainer.task.loss(model(x), labels))

    def every(state: Any) -> dict[str, Any]:
        # One seed after the other: jaxlib 0.10.2's batched decompositions can hang.
        each = seeds.apart(state, len(trainer.seeds))
        found = jax.device_get([one(seed, *(array[:_EXAMPLES] for array in trainer.data)) for seed in each])
        found = jax.tree.map(lambda *values: np.stack(values), *found)
        layers = [row.layer for row in trainer.coverage.rows]
        return {name: {layer: of[layer] for layer in layers if layer in of} for name, of in found.items()}

    return every


def diagnose(
    model: jaxfa.nn.Attached, start: jaxfa.nn.Attached, update: jaxfa.nn.Attached, loss: Callable[[Any], jax.Array]
) -> dict[str, dict[str, jax.Array]]:
    """Measures every layer of one training at one moment. Under ``vmap`` its decompositions would be batched.

    Args:
      model: the model.
      start: the model before the first step.
      update: the model with its next step in the place of its parameters.
      loss: ``model -> scalar`` on a batch.

    Returns:
      By quantity, then by layer, a scalar:

      - ``error_rank``: the effective rank (Roy and Vetterli's) of the error that arrives, a row for every example;
      - ``update_rank``: the same of the step of the kernel, a column for every unit;
      - ``drift``: how far what is conserved has moved, ``sum_j |Q_j - Q_j(0)| / sum_j 1/2 |w_j(0)|^2``: under plain
        gradient descent, by the steps' finite size alone;
      - ``imbalance``: by how much the rule's gradient itself breaks the law, ``sum_j |imbalance_j| / sum_j |<w_j,
        dw_j>|``: zero, to rounding, where the network and the rule keep it, whatever the optimizer does.

      The last two for the layers that :func:`jaxfa.nn.consecutive_layers` finds.
    """
    gradient = nnx.clone(model)
    nnx.update(gradient, nnx.grad(loss)(nnx.clone(model)))
    links, first, steps = (jaxfa.nn.consecutive_layers(one) for one in (model, start, gradient))
    errors = jaxfa.nn.layer_errors(model, loss)
    leaves = nnx.to_flat_state(nnx.state(update.model, nnx.Param))
    kernels = {"/".join(map(str, path)): leaf[...] for path, leaf in leaves}
    matrices = {layer: kernels[f"{layer}/kernel"] for layer in errors}
    return {
        "error_rank": {layer: entropy_rank(error.reshape(len(error), -1)) for layer, error in errors.items()},
        "update_rank": {layer: entropy_rank(step.reshape(-1, step.shape[-1])) for layer, step in matrices.items()},
        "drift": {layer: _drift(link, first[layer]) for layer, link in links.items()},
        "imbalance": {layer: _imbalance(link, steps[layer]) for layer, link in links.items()},
    }


def _drift(link: jaxfa.nn.ConsecutiveLayers, first: jaxfa.nn.ConsecutiveLayers) -> jax.Array:
    moved = quantity(link.pair, link.feedback) - quantity(first.pair, first.feedback)
    return jnp.abs(moved).sum() / half_square(first.pair).sum()


def _imbalance(link: jaxfa.nn.ConsecutiveLayers, step: jaxfa.nn.ConsecutiveLayers) -> jax.Array:
    own = step.pair._replace(above=jnp.zeros_like(step.pair.above))
    both = (imbalance(link.pair, one, link.feedback) for one in (step.pair, own))
    above, below = (jnp.abs(found).sum() for found in both)
    return above / below
