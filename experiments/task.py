"""What a training is of: a network, a rule, an optimizer and a data set, as values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.augment import crop_and_flip
from experiments.data import Dataset


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of logits ``(..., classes)`` and whole-number labels ``(...)``, of images or tokens."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Task(NamedTuple):
    """What is trained.

    Attributes:
      make: ``rngs -> module``, an NNX model from images, or other inputs, to logits.
      rule: a :class:`jaxfa.Rule`.
      optimizer: the optax transformation of the parameters; the rule's own joins it.
      data: a :class:`Dataset`.
      batch: examples per step.
      at: where the rule goes, as for :func:`jaxfa.nn.attach`.
      allow: the layers that may stay with backpropagation, likewise.
      loss: ``(logits, labels) -> scalar``.
      augment: ``(key, images) -> images``, for natural images alone: those of a data set that says so.
      inputs: ``raw -> inputs``, what the model gets of the data set's; by default images, normalised by channel.
      calibrate: what the optimizer is wrapped in, such as ``functools.partial(jaxfa.calibrate, every=100)``.
      steps: steps of an epoch; by default as many as its images fill.
      between: ``(state, epoch) -> state``, run on the host at each epoch's end; it may change shapes, as pruning does.
      prepare: what to do to the attached model before the first step, such as :func:`jaxfa.nn.align`.
      diagnostics: whether every epoch's record has what :func:`experiments.diagnosis.diagnose` measures.
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
    inputs: Callable[[jax.Array], jax.Array] | None = None
    calibrate: Callable[..., optax.GradientTransformationExtraArgs] | None = None
    steps: int | None = None
    between: Callable[[Any, int], Any] | None = None
    prepare: Callable[[jaxfa.nn.Attached], None] | None = None
    diagnostics: bool = False
