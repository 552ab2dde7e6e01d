"""Receptive fields of a model retina: oriented with full feedback, centre and surround with feedback of low rank.

Claim (Hanut and Kadmon 2025, after Lindsey et al. 2019): the fewer dimensions the error has that reaches the retina,
the less its receptive fields prefer an orientation, until they are centre and surround.

Command: ``python -m experiments run ldfa_retina``

The network sees grey CIFAR-10: convolutions that are the retina, convolutions that are the visual cortex, and two fully
connected layers. One layer alone has low-rank feedback with learned ``P`` and ``Q``: the first of the cortex, which
sends the error to the retina; all others learn by backpropagation. The preset ``cpu`` halves images and widths.

A receptive field is the mean gradient over test images, in the image, of the middle unit of a retinal output channel
before its ReLU. Two numbers describe it, see ``receptive_fields``: its orientation selectivity, 0 if it
prefers none and 1 for a grating, and its radial symmetry, 1 for centre and surround and less for an edge. Both are also
shown before training, since chance makes oriented fields, too.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxfa
from experiments.common import checkpoint, data, records
from experiments.common.experiment import Arm, Experiment, Histories, Page, Study, Table, Training, prepare
from experiments.common.metrics import shown
from experiments.common.optimizers import adam
from experiments.common.task import Task
from experiments.common.trainer import State, Trainer
from experiments.ldfa import receptive_fields
from experiments.ldfa.arms import low_rank
from experiments.ldfa.receptive_fields import Result
from experiments.models.retina import Retina

PROBES = 256
CAPTION = (
    "Receptive fields of the retina's first output channels, first seed, each to its own scale: blue excites, red "
    "inhibits. Right, every unit of every seed, and the mean over units. The numbers are means and deviations over "
    "units; accuracy's are over seeds."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Training):
    """The network, the ranks, and for how long."""

    ranks: tuple[int, ...] = (16, 4, 2, 1)
    """Ranks of the error that reaches the retina."""
    retina: tuple[int, ...] = (16, 16)
    """The retina's channels."""
    cortex: tuple[int, ...] = (16,)
    """The cortex's channels."""
    hidden: int = 256
    """Units of the first fully connected layer."""
    window: int = 7
    """The side of every kernel, in pixels."""
    halvings: int = 1
    """How often the images are halved, by the mean of four pixels."""
    images: int | None = 10_000
    """How many of the training images to take; None takes all."""
    test_images: int | None = 2_000
    """How many of the test images to take; None takes all."""
    epochs: int = 6
    """Passes over the training images."""
    batch: int = 64
    """How many examples a step has."""
    learning_rate: float = 1e-3
    """The learning rate of Adam; each epoch multiplies it by 0.975."""
    weight_decay: float = 5e-5
    """The weight of the L2 penalty on the weights and on Q."""
    feedback_rate: float = 0.1
    """The learning rate of P, the projection of the error."""
    seeds: int = 2
    """How many trainings each rank has."""

    arms = ("ranks",)

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_below_one(self, "hidden", "window", "batch")
        if not self.ranks or min(self.ranks) < 1 or max(self.ranks) > self.cortex[0]:
            raise ValueError(f"ranks must be from 1 to the cortex's {self.cortex[0]} channels, got {self.ranks}.")


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation and every rank, seed by seed: side by side, XLA:CPU's wide convolutions are ten times slower."""
    dataset = grey(data.load("cifar10", config.data), config)
    for rank in (None, *config.ranks):
        for seed in range(config.seed, config.seed + config.seeds):
            yield Arm(
                f"{_name(rank)}-seed-{seed}".replace(" ", "-"),
                _name(rank),
                rank,
                task(config, dataset, rank),
                seeds=[seed],
            )


def _name(rank: int | None) -> str:
    return "backpropagation" if rank is None else f"rank {rank}"


def study(config: Config, histories: Histories) -> Study:
    """The receptive fields before and after training."""
    results: dict[str, Result] = {}
    made = [arm for arm in arms(config) if arm.name in histories]
    for rank in (None, *config.ranks):
        before, after, accuracies = [], [], []
        for arm in (arm for arm in made if arm.x == rank):
            start = Trainer(arm.task, arm.seeds or (), config.loop).init()
            before.append(fields(config, arm.task.data, start))
            after.append(fields(config, arm.task.data, _end(config.out / arm.name, start)))
            accuracies += histories[arm.name][-1]["test_accuracy"]
        if len(after) == config.seeds:  # without a seed that diverged, a mean would flatter
            results = results or {"untrained": receptive_fields.describe(before)}
            results[_name(rank)] = receptive_fields.describe(after, accuracies)
    if not results:
        raise FloatingPointError(f"Nothing in {config.out} is left to draw: at every rank a seed diverged.")
    return Study(receptive_fields.figure(results), CAPTION, [Table("Receptive fields", _rows(results))])


def _end(folder: Path, start: State) -> State:
    with checkpoint.checkpoints(folder) as manager:
        return (checkpoint.restore(manager, start) or (0, start))[1]


def network(config: Config, dataset: data.Dataset, rngs: nnx.Rngs) -> Retina:
    """The network that fits a configuration and its images."""
    side, classes = dataset.train_images.shape[1], dataset.classes
    sizes = {name: getattr(config, name) for name in ("retina", "cortex", "hidden", "window")}
    return Retina(side, classes, **sizes, rngs=rngs)


def grey(dataset: data.Dataset, config: Config) -> data.Dataset:
    """The images that a configuration asks for, grey and halved, on the device."""

    def convert(images: np.ndarray) -> np.ndarray:
        light = images @ np.array([0.299, 0.587, 0.114], np.float32)
        for _ in range(config.halvings):
            light = light.reshape(len(light), light.shape[1] // 2, 2, light.shape[2] // 2, 2).mean((2, 4))
        return np.round(light).astype(np.uint8)[..., None]

    train, test = convert(dataset.train_images), convert(dataset.test_images)
    return prepare(config, dataset._replace(train_images=train, test_images=test, augmented=False))


def task(config: Config, dataset: data.Dataset, rank: int | None) -> Task:
    """What is trained: with low-rank feedback to the retina, or by backpropagation alone."""
    rule = low_rank(rank, config.feedback_rate) if rank else jaxfa.backprop()
    steps = len(dataset.train_labels) // config.batch
    return Task(
        make=lambda rngs: network(config, dataset, rngs),
        rule=rule,
        optimizer=adam(config.learning_rate, weight_decay=config.weight_decay, decay=0.975, steps=steps),
        data=dataset,
        batch=config.batch,
        at=("cortex/0",) if rank else None,
        allow=("*",) if rank else (),
    )


def fields(config: Config, dataset: data.Dataset, state: State) -> np.ndarray:
    """The receptive fields of one seed's retina, ``(channels, side, side)``."""
    graph, variables = nnx.split(network(config, dataset, nnx.Rngs(0)))
    nnx.replace_by_pure_dict(variables, jax.tree.map(lambda leaf: leaf[0], state.params["model"]))
    (mean,), (deviation,) = data.channel_moments(np.asarray(dataset.train_images))
    images = (jnp.asarray(dataset.test_images[:PROBES], jnp.float32) - mean) / deviation
    side = 1 + len(config.retina) * (config.window - 1)
    return np.asarray(receptive_fields.receptive_fields(nnx.merge(graph, variables).ganglion, images, side))


def _rows(results: dict[str, Result]) -> list[list[str]]:
    rows = [["error to the retina", "orientation selectivity", "radial symmetry", "units", "test accuracy, %"]]
    for name, one in results.items():
        seen = ~np.isnan(one.selectivity)
        accuracy = shown(100 * one.accuracy, 1) if len(one.accuracy) else ""
        described = [shown(values[seen]) for values in (one.selectivity, one.symmetry)]
        rows.append([name, *described, f"{seen.sum()} of {seen.size}", accuracy])
    return rows


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(),
        "paper": Config(
            ranks=(32, 16, 8, 4, 2, 1),
            retina=(32, 32),
            cortex=(32, 32, 32),
            hidden=1024,
            window=9,
            halvings=0,
            images=None,
            test_images=None,
            epochs=100,
            learning_rate=5e-4,
            seeds=5,
        ),
    },
    Page(
        "What does a retina see when its error has few dimensions?",
        "Receptive fields of a model retina by the rank of the error that reaches it. The paper: the fewer dimensions"
        " it has, the less the fields prefer an orientation, until they are centre and surround.",
        "Hanut and Kadmon 2025, after Lindsey et al. 2019",
    ),
    arms,
    study,
)
