"""What a training step costs in floating-point operations: counted on the compiled program, and by theory."""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from experiments.common.task import Task
from experiments.common.trainer import Trainer
from jaxfa.measure.diagnostics import flops


class Count(NamedTuple):
    """Operations of one step on one batch, by XLA's count.

    Attributes:
      forward: of the loss.
      backward: of its gradient and the feedback's signals, without the forward pass.
      update: of the optimizer.
    """

    forward: float
    backward: float
    update: float

    @property
    def step(self) -> float:
        """The operations of all three."""
        return sum(self)


class Product(NamedTuple):
    """One layer as a matrix product.

    Attributes:
      rows: examples times places.
      inputs: channels times window.
      outputs: channels.
      feedback: whether its error returns by the rule; False is by backpropagation, None not at all: the first layer.
    """

    rows: int
    inputs: int
    outputs: int
    feedback: bool | None = True


def count(task: Task) -> Count:
    """The operations of a task's training step, without shuffling and augmentation.

    Args:
      task: what is trained.

    Returns:
      A :class:`Count`.
    """
    trainer = Trainer(task, [0])
    state: Any = jax.eval_shape(trainer.begin, jax.random.key(0))[1]
    images, labels = (array[: task.batch] for array in trainer.data)
    batch = state.rest, jax.eval_shape(trainer.inputs, images), labels
    optimizer = trainer.optimizer()

    def loss(learned: Any, rest: Any, x: jax.Array, labels: jax.Array) -> Any:
        model = trainer.model(state._replace(params=learned[0], feedback=learned[1], rest=rest), copy=True)
        model.train()
        value = task.loss(model(x), labels)
        return value, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def update(signals: Any, state: Any, learned: Any) -> Any:
        updates, state = optimizer.update(signals, state, learned)
        return optax.apply_updates(learned, updates), state

    learned = state.params, state.feedback
    forward, both = flops(loss, learned, *batch), flops(jax.value_and_grad(loss, has_aux=True), learned, *batch)
    return Count(forward, both - forward, flops(update, learned, state.optimizer, learned))


def dense(batch: int, sizes: tuple[int, ...]) -> list[Product]:
    """The products of a fully connected network of these widths, all with feedback but the first."""
    return [Product(batch, n, m, True if i else None) for i, (n, m) in enumerate(pairwise(sizes))]


def vgg(batch: int, side: int, widths: tuple[int, ...], classes: int) -> list[Product]:
    """The products of :class:`experiments.models.vgg.VGG`: feedback in the convolutions, backpropagation above."""
    channels = (3, *(width for width in widths for _ in range(2)))
    convs = [
        Product(batch * (side // 2 ** (i // 2)) ** 2, 9 * channels[i], channels[i + 1], True if i else None)
        for i in range(len(channels) - 1)
    ]
    middle = max(widths[-1] // 2, classes)
    return [*convs, Product(batch, widths[-1], middle, False), Product(batch, middle, classes, False)]


def theory(products: list[Product], fraction: float | None, *, learn_p: bool = True, learn_q: bool = True) -> float:
    """Operations of the backward pass: ``4 N n m`` a layer by backpropagation, by feedback of rank ``r``

    ``2 N n m`` for the weights, ``2 N m r + 2 N n r`` for the error, ``2 N m r`` for Oja's rule, and ``2 n m r`` for
    Hebb's, which is a product of the weights' gradient. Terms in ``r^2`` and all that is pointwise are left out.

    Args:
      products: the network's.
      fraction: ``r / m``; None is backpropagation, 0.0 the weights' gradients alone, the floor.
      learn_p: whether ``P`` learns.
      learn_q: whether ``Q`` learns.

    Returns:
      How many operations.
    """
    total = 0.0
    for rows, n, m, feedback in products:
        total += 2 * rows * n * m
        if feedback is None:
            continue
        if fraction is None or not feedback:
            total += 2 * rows * n * m
            continue
        r = min(max(1, round(fraction * m)), n, m) if fraction else 0
        total += 2 * rows * r * (n + m) + learn_p * 2 * rows * m * r + learn_q * 2 * n * m * r
    return total
