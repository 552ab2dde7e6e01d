"""The compiled functions of a training: all seeds at once, the data set on the device, augmentation inside the step.

Every random choice is a function of a seed's key and the step's number, so that a resumed run draws what the killed one
would have drawn, and either shape of the loop draws the same. Their results are the same to the bit, but for
convolutions on a CPU, which XLA computes in another way inside a loop.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import jaxfa
import jaxfa.nn
from experiments.augment import crop_and_flip
from experiments.data import Dataset, channel_moments
from experiments.seeds import side_by_side

Loop = Literal["auto", "step", "scan"]

# What a seed's key is folded with: one stream per purpose.
_MODEL, _FEEDBACK, _ORDER, _AUGMENT, _REFINE = range(5)
_PROBE = 512
_CHUNK = 1000


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of logits ``(N, classes)`` and whole-number labels ``(N,)``."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Task(NamedTuple):
    """What is trained.

    Attributes:
      make: ``rngs -> module``, an NNX model from images to logits.
      rule: a :class:`jaxfa.Rule`.
      optimizer: the optax transformation of the parameters; the rule's own joins it.
      data: a :class:`Dataset`.
      batch: examples per step.
      at: where the rule goes, as for :func:`jaxfa.nn.attach`.
      allow: the layers that may stay with backpropagation, likewise.
      loss: ``(logits, labels) -> scalar``.
      augment: ``(key, images) -> images``, for natural images alone: those of a data set that says so.
      calibrate: what the optimizer is wrapped in, such as ``functools.partial(jaxfa.calibrate, every=100)``.
      steps: steps of an epoch; by default as many as its images fill.
      between: ``(state, epoch) -> state``, run on the host at each epoch's end; it may change shapes, as pruning does.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    rule: jaxfa.Rule
    optimizer: optax.GradientTransformation
    data: Dataset
    batch: int
    at: tuple[str, ...] | None = None
    allow: tuple[str, ...] = ()
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy
    augment: Callable[[jax.Array, jax.Array], jax.Array] = crop_and_flip
    calibrate: Callable[..., optax.GradientTransformationExtraArgs] | None = None
    steps: int | None = None
    between: Callable[[Any, int], Any] | None = None


class State(NamedTuple):
    """All that changes during training; every array has the seeds as its first axis."""

    params: Any
    feedback: Any
    rest: Any
    optimizer: Any
    key: jax.Array
    step: jax.Array


class Trainer:
    """The compiled functions of one task.

    Args:
      task: what is trained.
      seeds: one training each, side by side.
      loop: ``"step"`` runs one compiled step per batch from Python, ``"scan"`` many in one call; ``"auto"`` is the
        first on a CPU, where XLA runs convolutions inside loops 20 times slower, and the second elsewhere.

    Raises:
      ValueError: if a batch is larger than the training set.

    Attributes:
      steps: how many steps an epoch has.
      coverage: which layers the rule reaches, a printable table.
    """

    def __init__(self, task: Task, seeds: Sequence[int], loop: Loop = "auto") -> None:
        data = task.data
        self.task, self.seeds, most = task, tuple(seeds), len(data.train_labels) // task.batch
        if not most:
            raise ValueError(f"A batch of {task.batch} is more than the {len(data.train_labels)} training examples.")
        self.steps = most if task.steps is None else min(task.steps, most)
        self.scans = loop == "scan" or (loop == "auto" and jax.default_backend() != "cpu")
        moments = channel_moments(np.asarray(data.train_images))
        self._mean, self._deviation = (moment.reshape(1, 1, 1, -1) for moment in moments)
        self._train = (jnp.asarray(data.train_images), jnp.asarray(data.train_labels))
        self._test = (jnp.asarray(data.test_images), jnp.asarray(data.test_labels))
        self._graph, example = jax.eval_shape(self._init, jax.random.key(0))
        self.coverage = nnx.merge(self._graph, example.params, example.feedback, example.rest).coverage()
        self._start = jax.jit(side_by_side(self._init, seeds))
        self._shuffle = jax.jit(side_by_side(self._order, seeds))
        step = side_by_side(self._update, seeds, (0, 0, None))
        self._step = jax.jit(step, donate_argnums=0)
        self._scan = jax.jit(partial(_scan, step), static_argnums=3, donate_argnums=0)
        self._score = jax.jit(side_by_side(self._scores, seeds, (0, None, None)))
        self._align = jax.jit(side_by_side(self._alignment, seeds, (0, None)))

    def init(self) -> State:
        """The state before the first step."""
        keys = jnp.stack([jax.random.key(seed) for seed in self.seeds])
        return self._start(keys)[1]

    def shuffle(self, state: State) -> jax.Array:
        """The order of the training examples in a state's epoch, ``(seeds, steps, batch)``."""
        return self._shuffle(state)

    def advance(self, state: State, order: jax.Array, count: int) -> tuple[State, Any]:
        """Trains for ``count`` steps of one epoch, without waiting for them.

        Args:
          state: the state, which is consumed.
          order: the epoch's, from :meth:`shuffle`.
          count: how many steps; an epoch has ``self.steps``.

        Returns:
          The state and the losses, ``(count, seeds)``, as an array or as a list of its rows.
        """
        if self.scans:
            return self._scan(state, order, self._train, count)
        losses = []
        for _ in range(count):
            state, loss = self._step(state, order, self._train)
            losses.append(loss)
        return state, losses

    def evaluate(self, state: State) -> dict[str, Any]:
        """Measures a state on the test images, and its alignment on one fixed batch of training images; waits for both.

        Returns:
          ``test_accuracy``, ``test_loss`` and, by layer from first to last, ``angle`` and ``norm_ratio``: arrays
          ``(seeds,)``; how many ``calibrations`` there were, if any are made; and the ``rank`` of factored layers.
        """
        images, labels = self._test
        chunks = [slice(i, i + _CHUNK) for i in range(0, len(labels), _CHUNK)]
        correct, loss = zip(*(self._score(state, images[chunk], labels[chunk]) for chunk in chunks), strict=True)
        probe = (self._train[0][:_PROBE], self._train[1][:_PROBE])
        correct, loss, alignment = jax.device_get((sum(correct), sum(loss), self._align(state, probe)))
        # After the transfer, which sorts dictionaries: layers stand in the order of the forward pass.
        kernels = {row.layer: alignment[f"{row.layer}/kernel"] for row in self.coverage.rows}
        found = {
            "test_accuracy": correct / len(labels),
            "test_loss": loss / len(labels),
            "angle": {layer: found.angle for layer, found in kernels.items()},
            "norm_ratio": {layer: found.norm_ratio for layer, found in kernels.items()},
        }
        if self.task.calibrate:
            found["calibrations"] = jax.device_get(state.optimizer.calibrations)
        nodes = jax.tree.leaves(state.params, is_leaf=_is_factors)
        ranks = {node.name: np.full(len(self.seeds), node.s.shape[-1]) for node in nodes if _is_factors(node)}
        return found | ({"rank": {layer: ranks[layer] for layer in kernels if layer in ranks}} if ranks else {})

    def _attach(self, key: jax.Array) -> jaxfa.nn.Aligned:
        model = self.task.make(nnx.Rngs(jax.random.fold_in(key, _MODEL)))
        example = jax.ShapeDtypeStruct((self.task.batch, *self.task.data.train_images.shape[1:]), jnp.float32)
        rngs = nnx.Rngs(jax.random.fold_in(key, _FEEDBACK))
        task = self.task
        return jaxfa.nn.attach(model, task.rule, rngs=rngs, at=task.at, allow=task.allow, example=example)

    def _optimizer(self) -> optax.GradientTransformationExtraArgs:
        optimizer = jaxfa.optimizer(self.task.optimizer, self.task.rule)
        return self.task.calibrate(optimizer) if self.task.calibrate else optimizer

    def _init(self, key: jax.Array) -> tuple[Any, State]:
        graph, params, feedback, rest = _split(self._attach(key))
        optimizer = self._optimizer().init((params, feedback))
        return graph, State(params, feedback, rest, optimizer, key, jnp.zeros((), jnp.int32))

    def _order(self, state: State) -> jax.Array:
        """This epoch's order of the training examples, ``(steps, batch)``; the odd remainder waits for another."""
        key = jax.random.fold_in(jax.random.fold_in(state.key, _ORDER), state.step // self.steps)
        order = jax.random.permutation(key, len(self.task.data.train_labels))
        return order[: self.steps * self.task.batch].reshape(self.steps, self.task.batch)

    def _inputs(self, images: jax.Array) -> jax.Array:
        return (images.astype(jnp.float32) - self._mean) / self._deviation

    def _update(self, state: State, order: jax.Array, train: Any) -> tuple[State, jax.Array]:
        """One step of one seed."""
        batch = order[state.step % self.steps]
        images, labels = train[0][batch], train[1][batch]
        if self.task.data.augmented:
            images = self.task.augment(jax.random.fold_in(jax.random.fold_in(state.key, _AUGMENT), state.step), images)
        x = self._inputs(images)
        model = nnx.merge(self._graph, state.params, state.feedback, state.rest)
        model.train()
        model.refine(jax.random.fold_in(jax.random.fold_in(state.key, _REFINE), state.step), x)
        graph, params, feedback, rest = _split(model)

        def objective(learned: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graph, *learned, rest, copy=True)
            loss = self.task.loss(model(x), labels)
            return loss, _split(model)[3]

        learned = (params, feedback)
        (loss, rest), signals = jax.value_and_grad(objective, has_aux=True)(learned)
        extra = {"true_gradient": partial(self._true_gradient, model, x, labels)} if self.task.calibrate else {}
        updates, optimizer = self._optimizer().update(signals, state.optimizer, learned, **extra)
        params, feedback = optax.apply_updates(learned, updates)
        return State(params, feedback, rest, optimizer, state.key, state.step + 1), loss

    def _true_gradient(self, model: jaxfa.nn.Aligned, x: jax.Array, labels: jax.Array) -> Any:
        graph, params, rest = nnx.split(jaxfa.nn.plain(model), nnx.Param, ...)

        def objective(params: Any) -> jax.Array:
            return self.task.loss(nnx.merge(graph, params, rest, copy=True)(x), labels)

        return nnx.to_pure_dict(jax.grad(objective)(params))

    def _scores(self, state: State, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(self._graph, state.params, state.feedback, state.rest)
        model.eval()
        logits = model(self._inputs(images))
        return jnp.sum(logits.argmax(-1) == labels), self.task.loss(logits, labels) * len(labels)

    def _alignment(self, state: State, probe: Any) -> dict[str, Any]:
        model = nnx.merge(self._graph, state.params, state.feedback, state.rest)
        model.train()
        x = self._inputs(probe[0])
        return jaxfa.nn.alignment(model, lambda model: self.task.loss(model(x), probe[1]))


def _is_factors(node: Any) -> bool:
    return isinstance(node, jaxfa.Factors)


def _split(model: jaxfa.nn.Aligned) -> tuple[Any, Any, Any, Any]:
    """A model as its graph and three trees of bare arrays: parameters, feedback, and the rest, such as statistics."""
    graph, *trees = nnx.split(model, nnx.Param, jaxfa.nn.Feedback, ...)
    params, feedback, rest = map(nnx.to_pure_dict, trees)
    return graph, params, feedback, rest


def _scan(step: Callable[..., Any], state: State, order: jax.Array, train: Any, count: int) -> tuple[State, jax.Array]:
    return lax.scan(lambda state, _: step(state, order, train), state, length=count)
