"""The compiled functions of a training: seeds side by side, the data set on the device, augmentation inside the step.

Every random choice is a function of a seed's key and the step's number, so that a resumed run draws what the killed one
would have drawn, and either shape of the loop draws the same, to the bit but for convolutions inside loops on a CPU.
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
from experiments.common import diagnosis
from experiments.common.data import normalize
from experiments.common.programs import jit_step
from experiments.common.seeds import in_turn, side_by_side, take_turns
from experiments.common.task import Task

Loop = Literal["auto", "step", "scan"]

# What a seed's key is folded with: one stream per purpose.
_MODEL, _FEEDBACK, _ORDER, _AUGMENT, _REFINE = range(5)
_PROBE = 512
_CHUNK = 1000


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
        first on a CPU, where XLA runs convolutions inside loops far slower, and the second elsewhere.

    Raises:
      ValueError: if a batch is larger than the training set.

    Attributes:
      steps: how many steps an epoch has.
      data: the training images and labels.
      inputs: ``raw -> inputs``, what the model gets of them.
      coverage: which layers the rule reaches, a printable table.
    """

    def __init__(self, task: Task, seeds: Sequence[int], loop: Loop = "auto") -> None:
        data = task.data
        self.task, self.seeds, most = task, tuple(seeds), len(data.train_labels) // task.batch
        if not most:
            raise ValueError(f"A batch of {task.batch} is more than the {len(data.train_labels)} training examples.")
        self.steps = most if task.steps is None else min(task.steps, most)
        self.scans = loop == "scan" or (loop == "auto" and jax.default_backend() != "cpu")
        self.inputs = task.inputs or normalize(np.asarray(data.train_images))
        self.data = (jnp.asarray(data.train_images), jnp.asarray(data.train_labels))
        self._test = (jnp.asarray(data.test_images), jnp.asarray(data.test_labels))
        self._graph, example = jax.eval_shape(self.begin, jax.random.key(0))
        self.coverage = nnx.merge(self._graph, example.params, example.feedback, example.rest).coverage()
        # Run once a seed: compiling it well would take many times longer than running it.
        self._start = jax.jit(self.begin, compiler_options={"xla_backend_optimization_level": 1})
        self._turns = take_turns(seeds, jax.make_jaxpr(self._scores)(example, *(array[:1] for array in self._test)))
        self._shuffle = self.of_seeds(self._order)
        step = self._together(self._update, (0, 0, None))
        self._step, self._scan = jit_step(step), jit_step(partial(_scan, step), static_argnums=3)
        self._advance = self._each(self._scan if self.scans else self._steps_of, (0, 0, None, None))
        self._score = self.of_seeds(self._scores, (0, None, None))
        self._align = self.of_seeds(self._alignment, (0, None))
        self._measures = [hook(self) for hook in (task.diagnostics and diagnosis.measure, task.measure) if hook]

    def of_seeds(self, function: Callable[..., Any], axes: Any = 0) -> Callable[..., Any]:
        """What one seed does, compiled for all; axes are 0 for what they do not share, None for what they do."""
        return self._each(jax.jit(self._together(function, axes)), axes)

    def _together(self, function: Callable[..., Any], axes: Any) -> Callable[..., Any]:
        return side_by_side(function, self._turns or len(self.seeds) == 1, axes)

    def _each(self, function: Callable[..., Any], axes: Any) -> Callable[..., Any]:
        return in_turn(function, len(self.seeds), axes) if self._turns else function

    def init(self) -> State:
        """The state before the first step."""
        # One seed after the other: jaxlib 0.10.2's batched decompositions, of which factored layers are made, can hang.
        each = [self._start(jax.random.key(seed))[1] for seed in self.seeds]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def shuffle(self, state: State) -> jax.Array:
        """The order of the training examples in a state's epoch, ``(seeds, steps, batch)``."""
        return self._shuffle(state)

    def advance(self, state: State, order: jax.Array, count: int) -> tuple[State, jax.Array]:
        """Trains for ``count`` steps of one epoch, without waiting for them.

        Args:
          state: the state, which is consumed.
          order: the epoch's, from :meth:`shuffle`.
          count: how many steps; an epoch has ``self.steps``.

        Returns:
          The state and the losses, ``(seeds, count)``.
        """
        return self._advance(state, order, self.data, count)

    def _steps_of(self, state: State, order: jax.Array, data: Any, count: int) -> tuple[State, jax.Array]:
        losses = []
        for _ in range(count):
            state, loss = self._step(state, order, data)
            losses.append(loss)
        return state, jnp.stack(losses, -1)

    def evaluate(self, state: State) -> dict[str, Any]:
        """Measures a state on the test images, and its alignment on one fixed batch of training images; waits for both.

        Returns:
          ``test_accuracy``, ``test_loss`` and, by layer from first to last, ``angle`` and ``norm_ratio``: arrays
          ``(seeds,)``; how many ``calibrations`` there were, if any are made; the ``rank`` of every factored layer, if
          there is one; and the diagnostics, if asked for.
        """
        (images, labels), rows = self._test, self._rows(_CHUNK)
        chunks = [slice(i, i + rows) for i in range(0, len(labels), rows)]
        correct, loss = zip(*(self._score(state, images[chunk], labels[chunk]) for chunk in chunks), strict=True)
        probe = tuple(array[: self._rows(_PROBE)] for array in self.data)
        correct, loss, alignment = jax.device_get((sum(correct), sum(loss), self._align(state, probe)))
        # After the transfer, which sorts dictionaries: layers stand in the order of the forward pass.
        layers = [row.layer for row in self.coverage.rows if f"{row.layer}/kernel" in alignment]
        kernels = {layer: alignment[f"{layer}/kernel"] for layer in layers}
        return {
            "test_accuracy": correct / labels.size,
            "test_loss": loss / labels.size,
            "angle": {layer: found.angle for layer, found in kernels.items()},
            "norm_ratio": {layer: found.norm_ratio for layer, found in kernels.items()},
            **({"calibrations": jax.device_get(state.optimizer.calibrations)} if self.task.calibrate else {}),
            **self._ranks(state),
            **{name: value for measure in self._measures for name, value in measure(state).items()},
        }

    def _ranks(self, state: State) -> dict[str, Any]:
        ranks = jaxfa.factored.ranks(state.params)
        layers = [row.layer for row in self.coverage.rows if row.layer in ranks]
        return {"rank": {layer: np.full(len(self.seeds), ranks[layer]) for layer in layers}} if layers else {}

    def _rows(self, predictions: int) -> int:
        """How many examples hold so many predictions, one or one per token each; a training batch always fits."""
        return max(self.task.batch, predictions // self.data[1][0].size)

    def _attach(self, key: jax.Array) -> jaxfa.nn.Attached:
        model = self.task.make(nnx.Rngs(jax.random.fold_in(key, _MODEL)))
        example = jax.eval_shape(lambda raw: self.inputs(raw[: self.task.batch]), self.data[0])
        rngs, task = nnx.Rngs(jax.random.fold_in(key, _FEEDBACK)), self.task
        aligned = jaxfa.nn.attach(model, task.rule, rngs=rngs, at=task.at, allow=task.allow, example=example)
        if task.prepare is not None:
            task.prepare(aligned)
        return aligned

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """The task's, the rule's own with it."""
        optimizer = jaxfa.optimizer(self.task.optimizer, self.task.rule)
        return self.task.calibrate(optimizer) if self.task.calibrate else optimizer

    def model(self, state: State, *, copy: bool = False) -> jaxfa.nn.Attached:
        """One seed's model; a copy is safe inside of a transformation that did not make the state."""
        return nnx.merge(self._graph, state.params, state.feedback, state.rest, copy=copy)

    def begin(self, key: jax.Array) -> tuple[Any, State]:
        """One seed's graph and state before the first step."""
        graph, params, feedback, rest = _split(self._attach(key))
        optimizer = self.optimizer().init((params, feedback))
        return graph, State(params, feedback, rest, optimizer, key, jnp.zeros((), jnp.int32))

    def _order(self, state: State) -> jax.Array:
        """This epoch's order of the training examples, ``(steps, batch)``; the odd remainder waits for another."""
        key = jax.random.fold_in(jax.random.fold_in(state.key, _ORDER), state.step // self.steps)
        order = jax.random.permutation(key, len(self.task.data.train_labels))
        return order[: self.steps * self.task.batch].reshape(self.steps, self.task.batch)

    def _update(self, state: State, order: jax.Array, train: Any) -> tuple[State, jax.Array]:
        """One step of one seed."""
        batch = order[state.step % self.steps]
        images, labels = train[0][batch], train[1][batch]
        if self.task.data.augmented:
            images = self.task.augment(jax.random.fold_in(jax.random.fold_in(state.key, _AUGMENT), state.step), images)
        state, _, loss = self.learn(state, self.inputs(images), labels)
        return state, loss

    def learn(self, state: State, x: jax.Array, labels: jax.Array) -> tuple[State, Any, jax.Array]:
        """The state after a step on these examples, the step itself, and the loss before it."""
        model = self.model(state)
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
        updates, optimizer = self.optimizer().update(signals, state.optimizer, learned, **extra)
        params, feedback = optax.apply_updates(learned, updates)
        return State(params, feedback, rest, optimizer, state.key, state.step + 1), updates, loss

    def _true_gradient(self, model: jaxfa.nn.Attached, x: jax.Array, labels: jax.Array) -> Any:
        graph, params, rest = nnx.split(jaxfa.nn.plain(model), nnx.Param, ...)

        def objective(params: Any) -> jax.Array:
            return self.task.loss(nnx.merge(graph, params, rest, copy=True)(x), labels)

        return nnx.to_pure_dict(jax.grad(objective)(params))

    def _scores(self, state: State, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = self.model(state)
        model.eval()
        logits = model(self.inputs(images))
        return jnp.sum(logits.argmax(-1) == labels), self.task.loss(logits, labels) * labels.size

    def _alignment(self, state: State, probe: Any) -> dict[str, Any]:
        model = self.model(state)
        model.train()
        x = self.inputs(probe[0])
        return jaxfa.nn.alignment(model, lambda model: self.task.loss(model(x), probe[1]))


def _split(model: jaxfa.nn.Attached) -> tuple[Any, Any, Any, Any]:
    """A model as its graph and three trees of bare arrays: parameters, feedback, and the rest, such as statistics."""
    graph, *trees = nnx.split(model, nnx.Param, jaxfa.nn.Feedback, ...)
    params, feedback, rest = map(nnx.to_pure_dict, trees)
    return graph, params, feedback, rest


def _scan(step: Any, state: State, order: jax.Array, train: Any, count: int) -> tuple[State, jax.Array]:
    state, losses = lax.scan(lambda state, _: step(state, order, train), state, length=count)
    return state, losses.T
