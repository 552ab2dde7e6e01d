"""LDFA where the output has many dimensions: an autoencoder of MNIST, light or dark for every pixel.

Claim (ours; Hanut and Kadmon 2025 leave such outputs open): the rank that suffices follows the dimension of the error,
here that of the digits' own variation and not of ten classes.

Command: ``python -m experiments run ldfa_autoencoder``.

Accuracy is over pixels, 14 x 14 of them, binary at half the brightness; to call all dark is right for most. The narrow
layer has ``hidden[1]`` units, which bounds what any rank can carry past it. The dimension of the output's error is its
participation ratio, a row per training image, a column per pixel.

Verdict: half of it. The number of classes is too low a rank, and a higher one gains much. But what suffices is not the
dimension of the output's error, which by backpropagation is higher than every rank here: beyond the width of the narrow
layer a rank gains next to nothing, most likely since no error has more dimensions below that layer, and no rank reaches
backpropagation. A random ``Q`` behind a ``P`` that learns is level at the number of classes, and behind at higher
ranks; fixed factors are behind at every rank.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import jaxfa
from experiments.common import data, plots
from experiments.common.experiment import Arm, Experiment, Histories, Page, Study, Table, load
from experiments.common.metrics import shown
from experiments.common.trainer import State, Trainer
from experiments.ldfa.arms import Varied, bp, by_rank
from experiments.models.autoencoder import Autoencoder
from experiments.models.networks import Shape

PROBES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Varied):
    """The network, the ranks, and for how long."""

    hidden: tuple[int, ...] = (128, 32, 128)
    """Units of the hidden layers."""


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation; every variant and rank."""
    dataset = pixels(load(config, "mnist", config.shrink))

    def make(shape: Shape, classes: int, rngs: nnx.Rngs) -> Autoencoder:
        return Autoencoder(shape, config.hidden, rngs=rngs)

    plain = bp(config, dataset, make, weight_decay=0.0, decay=0.95)
    yield from by_rank(config, plain._replace(measure=output_error))


def pixels(dataset: data.Dataset) -> data.Dataset:
    """The images, every pixel labelled 1 where it is light."""

    def light(images: Any) -> Any:
        return (images.reshape(len(images), -1) > 127).astype(jnp.int32)

    labels = {"train_labels": light(dataset.train_images), "test_labels": light(dataset.test_images)}
    return dataset._replace(**labels, classes=2)


def output_error(trainer: Trainer) -> Callable[[State], dict[str, Any]]:
    """What measures the dimension of the output's error on the first training images, ``(seeds,)``."""

    def of_dark(state: State, images: jax.Array, labels: jax.Array) -> jax.Array:
        model = trainer.model(state, copy=True)
        model.eval()
        return jax.nn.softmax(model(trainer.inputs(images)))[..., 0] - (labels == 0)

    errors_of, probe = trainer.of_seeds(of_dark, (0, None, None)), [array[:PROBES] for array in trainer.data]

    def measure(state: State) -> dict[str, Any]:
        return {"error_dimension": np.array([*map(jaxfa.diagnostics.participation_ratio, errors_of(state, *probe))])}

    return measure


def study(config: Config, histories: Histories) -> Study:
    """Accuracy against the rank, beside the dimension of the output's error."""
    chosen = [arm for arm in arms(config) if arm.name in histories]
    last = {arm.name: histories[arm.name][-1] for arm in chosen}
    accuracy = {name: 100 * np.array(one["test_accuracy"]) for name, one in last.items()}
    dimension = {name: np.array(one["error_dimension"]) for name, one in last.items()}
    rows = [["arm", "accuracy, %", "dimension of the output's error"]]
    for arm in chosen:
        name = arm.group if arm.x is None else f"{arm.group}, rank {arm.x:g}"
        rows.append([name, shown(accuracy[arm.name], 1), shown(dimension[arm.name], 1)])
    caption = (
        "Accuracy over the pixels of test images against the rank of the feedback, mean and deviation over seeds; "
        "grey is backpropagation, dotted the dimension of its output's error at the end of training."
    )
    findings = [(shown(dimension["bp"], 1), "is the dimension of the output's error, trained by backpropagation.")]
    return Study(figure(chosen, accuracy, dimension), caption, [Table("Accuracy", rows)], findings)


def figure(chosen: list[Arm], accuracy: dict[str, np.ndarray], dimension: dict[str, np.ndarray]) -> Figure:
    """A line for every variant."""
    drawn = Figure(figsize=(6.0, 3.0), layout="constrained")
    axes, lines = drawn.subplots(), dict.fromkeys(arm.group for arm in chosen if arm.x)
    axes.axhline(accuracy["bp"].mean(), color=plots.GREY, label="backpropagation")
    axes.axvline(dimension["bp"].mean(), color=plots.INK, linewidth=1, linestyle=":")
    for color, title in zip(plots.COLORS, lines, strict=False):
        line = [(arm.x, accuracy[arm.name].mean(), accuracy[arm.name].std()) for arm in chosen if arm.group == title]
        ranks, means, deviations = zip(*line, strict=True)
        axes.errorbar(ranks, means, deviations, fmt="o-", color=color, markersize=4, label=title)
    plots.log_axis(axes, sorted({arm.x for arm in chosen if arm.x}), xlabel="rank", ylabel="accuracy, %")
    plots.legend_below(drawn, 4)
    return drawn


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(
            ranks=(10, 32, 64),
            variants=("both", "local", "fixed"),
            shrink=2,
            epochs=8,
            images=10_000,
            test_images=2000,
            batch=100,
            learning_rate=2e-3,
        ),
        "full": Config(ranks=(1, 2, 4, 10, 32, 64, 128), hidden=(512, 64, 512), epochs=40),
    },
    Page("How many dimensions does the error of an image need?"),
    arms,
    study,
)
