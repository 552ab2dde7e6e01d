"""What the LDFA experiments share: the rule, the rate of ``P``, the fully connected network, arms by rank."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jaxfa
from experiments.common import experiment
from experiments.common.augment import flip_and_rotate
from experiments.common.data import Dataset
from experiments.common.experiment import Arm
from experiments.common.optimizers import adam
from experiments.common.task import Task
from experiments.models.networks import MLP

# The rate of P, chosen by accuracy on the validation split (width 256, 8000 images, 6 epochs, batch 128; all layers of
# rank 10, or 4): .01 39.6 (32.1), .1 41.0 (36.5), .3 43.0 (35.6), .5 44.0 (35.6); bp 46.7. Learning the last layer's P
# from the labels gave 39.2 (33.2) at .1. Three seeds, two for .3, standard deviations up to 1.6.
FEEDBACK_RATE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """The rate of the feedback; it was tuned in ldfa_rank_mlp alone."""

    feedback_rate: float = FEEDBACK_RATE
    """The learning rate of P, the projection of the error."""


def low_rank(rank: float, rate: float = FEEDBACK_RATE, *, learn_p: bool = True, learn_q: bool = True) -> jaxfa.Rule:
    """Low-rank feedback whose decay is the optimizer's L2 penalty, for Q as for the weights, so that it adds none."""
    return jaxfa.ldfa(rank, learn_p=learn_p, learn_q=learn_q, learning_rate=rate, weight_decay=0.0)


def by_rank(
    name: str,
    group: str,
    rules: Mapping[Any, jaxfa.Rule],
    plain: Task,
    *,
    published: Mapping[Any, float] | None = None,
    at: tuple[str, ...] | None = None,
    allow: tuple[str, ...] = (),
    reference: str | None = None,
    axis: str = "rank",
) -> Iterator[Arm]:
    """Arms that differ in their rank alone.

    Args:
      name: the arms' names begin with it.
      group: what the report calls them.
      rules: the rule of each rank.
      plain: the same training by backpropagation.
      published: the published number of each rank.
      at: where the rule goes.
      allow: the layers that may stay with backpropagation.
      reference: the name of the arm that they are compared with.
      axis: what a rank counts.
    """
    for rank, rule in rules.items():
        task = plain._replace(rule=rule, at=at, allow=allow)
        yield Arm(f"{name}-{rank:g}", group, rank, task, (published or {}).get(rank), reference, axis)


def mlp(config: experiment.Config, dataset: Dataset, *, width: int, degrees: float) -> Task:
    """Backpropagation in the paper's fully connected network, three hidden layers of a width, images turned."""
    shape, classes = dataset.train_images.shape[1:], dataset.classes
    steps = len(dataset.train_labels) // config.batch
    return Task(
        make=lambda rngs: MLP(shape, classes, (width,) * 3, normalised=True, rngs=rngs),
        rule=jaxfa.backprop(),
        optimizer=adam(config.learning_rate, weight_decay=4e-4, decay=0.975, steps=steps, amsgrad=True),
        data=dataset,
        batch=config.batch,
        augment=partial(flip_and_rotate, degrees=degrees),
    )
