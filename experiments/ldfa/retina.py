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

Measured with the preset ``cpu`` (16 x 16 pixels, 10,000 images, 6 epochs; 2 seeds of 16 units; mean +- std over units,
of the accuracy over seeds), in 21 min on two cores that others kept busy:

===============  ===========  ==========  =============
error            selectivity  symmetry    test accuracy
===============  ===========  ==========  =============
untrained        .14 +- .06   .07 +- .04
backpropagation  .34 +- .19   .12 +- .10  45.7 +- 0.5
rank 16          .39 +- .20   .17 +- .13  44.2 +- 0.6
rank 4           .34 +- .20   .14 +- .08  43.7 +- 0.7
rank 2           .36 +- .21   .18 +- .14  42.4 +- 2.7
rank 1           .29 +- .17   .15 +- .10  40.5 +- 1.1
===============  ===========  ==========  =============

At this size the claim does not show: rank 1 is the least selective of the trained ones, but by a quarter of a standard
deviation, and no rank makes fields of centre and surround. Much of a field is still its random start after so few
steps. The preset ``paper`` has not been run; its optimizer and epochs are ours, those of the paper being unknown.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxfa
from experiments.common import checkpoint, data, figures, records, sweep
from experiments.common.optimizers import adam
from experiments.common.task import Task
from experiments.common.trainer import State
from experiments.ldfa import receptive_fields
from experiments.ldfa.receptive_fields import Result
from experiments.models.retina import Retina

PROBES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(sweep.Options):
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
    out: Path = Path("runs/ldfa_retina")
    """The folder of the results; a run that was killed goes on from its last checkpoint there."""

    arms = ("ranks",)

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_below_one(self, "hidden", "window", "batch")
        if not self.ranks or min(self.ranks) < 1 or max(self.ranks) > self.cortex[0]:
            raise ValueError(f"ranks must be from 1 to the cortex's {self.cortex[0]} channels, got {self.ranks}.")


PRESETS = {
    "cpu": Config(),
    "paper": Config(
        ranks=(32, 16, 8, 4, 2, 1), retina=(32, 32), cortex=(32, 32, 32), hidden=1024, window=9, halvings=0,
        images=None, test_images=None, epochs=100, learning_rate=5e-4, seeds=5, out=Path("runs/ldfa_retina-paper"),
    ),
}  # fmt: skip


def run(config: Config) -> Path:
    """Trains a retina by backpropagation and at every rank, writes the figure and the table.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.

    Raises:
      ValueError: if the folder holds another configuration's results.
      FileNotFoundError: if CIFAR-10 is not there.
      FloatingPointError: if every training diverged.
    """
    dataset = grey(data.load("cifar10", config.data), config)
    identity = sweep.open_run(config)
    results: dict[str, Result] = {}
    for rank in (None, *config.ranks):
        name = "backpropagation" if rank is None else f"rank {rank}"
        before, after, accuracies = [], [], []
        # One after the other: vectorised over seeds, XLA:CPU's wide convolutions are ten times slower.
        for seed in range(config.seed, config.seed + config.seeds):
            alone, folder = dataclasses.replace(config, seed=seed, seeds=1), f"{name}-seed-{seed}".replace(" ", "-")
            for trained in sweep.train_each(alone, identity, {folder: task(config, dataset, rank)}):
                start = trained.trainer.init()
                with checkpoint.checkpoints(config.out / folder) as manager:
                    _, end = checkpoint.restore(manager, start) or (0, start)
                before.append(fields(config, dataset, start))
                after.append(fields(config, dataset, end))
                accuracies += trained.history[-1]["test_accuracy"]
        if len(after) == config.seeds:  # without a seed that diverged, a mean would flatter
            results = results or {"untrained": receptive_fields.describe(before)}
            results[name] = receptive_fields.describe(after, accuracies)
    figures.refuse_nothing(config.out, results)
    return _write(config, results)


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
    return sweep.prepare(config, dataset._replace(train_images=train, test_images=test, augmented=False))


def task(config: Config, dataset: data.Dataset, rank: int | None) -> Task:
    """What is trained: with low-rank feedback to the retina, or by backpropagation alone."""
    # The decay is the optimizer's L2 penalty, for Q as for the weights, so that the rule adds none.
    rule = jaxfa.ldfa(rank, learning_rate=config.feedback_rate, weight_decay=0.0) if rank else jaxfa.backprop()
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


def _write(config: Config, results: dict[str, Result]) -> Path:
    numbers = {
        name: {
            "selectivity": one.selectivity.tolist(),
            "symmetry": one.symmetry.tolist(),
            "accuracy": one.accuracy.tolist(),
        }
        for name, one in results.items()
    }
    records.write_json(config.out / "results.json", numbers)
    rows = [["error to the retina", "orientation selectivity", "radial symmetry", "units", "test accuracy, %"]]
    for name, one in results.items():
        seen = ~np.isnan(one.selectivity)
        accuracy = figures.estimate(100 * one.accuracy, 1) if len(one.accuracy) else ""
        described = [figures.estimate(values[seen]) for values in (one.selectivity, one.symmetry)]
        rows.append([name, *described, f"{seen.sum()} of {seen.size}", accuracy])
    with figures.style():
        drawn = receptive_fields.figure(results)
    caption = (
        "Receptive fields of the retina's first output channels, first seed, each to its own scale: blue excites, red "
        "inhibits. Right, every unit of every seed, and the mean over units. The numbers are means and deviations over "
        "units; accuracy's are over seeds."
    )
    return figures.write(
        config.out, drawn, title="Receptive fields by the rank of the error", caption=caption, table=rows
    )
