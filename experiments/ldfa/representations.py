"""What low-rank feedback makes of hidden layers: their likeness to backpropagation's, against the rank of the error.

Claim (ours; Hanut and Kadmon 2025 show receptive fields alone): the higher the rank, the more alike are the hidden
layers to those of backpropagation from the same start; a fixed feedback's are less so at the same rank.

Command: ``python -m experiments run ldfa_representations``.

Likeness is linear CKA on test images, layer by layer: 1 where one layer's activations are a rotation of the other's.
Two backpropagations from other starts are the measure of what is alike by the task alone. The network is that of
``ldfa_rank_mlp``.

Verdict: the first half holds. The second holds in no layer but the first, and there not at every rank, and in the last
at the highest rank alone: below that rank fixed feedback leaves the last hidden layer more like backpropagation's than
learned feedback does, most likely since feedback that has learned drives that layer along the few directions that it
carries, by which it ends less like backpropagation's than it began.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import jaxfa.nn
from experiments.common import plots, seeds
from experiments.common.checkpoint import last_state
from experiments.common.experiment import Arm, Experiment, Histories, Page, Study, Table, finished, load
from experiments.common.metrics import shown
from experiments.common.trainer import Trainer
from experiments.ldfa.arms import VariantName, Varied, by_rank, mlp

PROBES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Varied):
    """The network, the ranks, and for how long."""

    variants: tuple[VariantName, ...] = ("both", "fixed")
    """How P and Q learn."""
    width: int = 512
    """Units of a hidden layer."""


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation; every variant and rank."""
    yield from by_rank(config, mlp(config, load(config, "cifar10", config.shrink), width=config.width, degrees=10.0))


def study(config: Config, histories: Histories) -> Study:
    """How alike hidden layers are to backpropagation's of the same seed."""
    chosen = finished(config, arms(config), histories)
    layers = {arm.name: representations(config, arm) for arm in chosen}
    layers["untrained"], bp = representations(config, chosen[0], trained=False), layers["bp"]
    # Backpropagation's own is with that of the next seed.
    pairs = {name: zip(own, bp if name != "bp" else [*bp[1:], bp[0]], strict=True) for name, own in layers.items()}
    found = {name: np.array([[*map(cka, own, true)] for own, true in both]) for name, both in pairs.items()}
    rows = [["arm", *(f"hidden layer {i + 1}" for i in range(len(bp[0]))), "test accuracy, %"]]
    rows.append(["untrained", *map(shown, found["untrained"].T), ""])
    for arm in chosen:
        accuracy = 100 * np.array(histories[arm.name][-1]["test_accuracy"])
        name = "backpropagation, another start" if arm.name == "bp" else f"{arm.group}, rank {arm.x:g}"
        rows.append([name, *map(shown, found[arm.name].T), shown(accuracy, 1)])
    caption = (
        "Linear CKA of a hidden layer's activations with those of backpropagation from the same start, on test images, "
        "against the rank of the error, mean and deviation over seeds; grey, two backpropagations from other starts."
    )
    numbers = {name: values.tolist() for name, values in found.items()}
    tables = [Table("Likeness to backpropagation", rows)]
    return Study(figure(chosen, found), caption, tables, findings(chosen, found), numbers)


def findings(chosen: list[Arm], found: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """For every variant how alike the last hidden layer is at the highest rank and at the lowest."""
    told = []
    for group in dict.fromkeys(arm.group for arm in chosen[1:]):
        members = sorted((arm.x, found[arm.name][:, -1].mean()) for arm in chosen[1:] if arm.group == group)
        (low, least), (high, most) = members[0], members[-1]
        said = f"is the likeness of the last hidden layer at rank {high:g}, {group}; at rank {low:g}: {least:.2f}."
        told.append((f"{most:.2f}", said))
    return [*told, (f"{found['bp'][:, -1].mean():.2f}", "is that of two backpropagations from other starts.")]


def representations(config: Config, arm: Arm, *, trained: bool = True) -> list[list[np.ndarray]]:
    """For every seed, each hidden layer's activations on test images, ``(images, units)``."""
    trainer = Trainer(arm.task, range(config.seed, config.seed + config.seeds), config.loop)
    start, x = trainer.init(), trainer.inputs(arm.task.data.test_images[:PROBES])
    state = last_state(config.out / arm.name, start) if trained else start
    return [hidden(jaxfa.nn.plain(trainer.model(one)), x) for one in seeds.apart(state, config.seeds)]


def hidden(model: Any, x: Any) -> list[np.ndarray]:
    """Each hidden layer's activations in a normalised :class:`experiments.models.networks.MLP`."""
    model.eval()
    x, found = x.reshape(len(x), -1), []
    for layer, norm in zip(model.layers, model.norms, strict=True):
        x = nnx.relu(norm(layer(x)))
        found.append(np.asarray(x))
    return found


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of two layers' activations, ``|Y^T X|^2 / (|X^T X| |Y^T Y|)``.

    Source: Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited", 2019,
    https://arxiv.org/abs/1905.00414
    """
    x, y = (one - one.mean(0, keepdims=True) for one in (x, y))
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def figure(chosen: list[Arm], found: dict[str, np.ndarray]) -> Figure:
    """A panel for every hidden layer."""
    drawn = Figure(figsize=(9.0, 2.7), layout="constrained")
    for i, axes in enumerate(drawn.subplots(1, found["bp"].shape[1], sharey=True, squeeze=False)[0]):
        axes.axhline(found["bp"][:, i].mean(), color=plots.GREY, label="another start")
        for color, title in zip(plots.COLORS, dict.fromkeys(arm.group for arm in chosen[1:]), strict=False):
            line = [(arm.x, found[arm.name][:, i]) for arm in chosen[1:] if arm.group == title]
            ranks, values = zip(*line, strict=True)
            mean, spread = np.mean(values, 1), np.std(values, 1)
            axes.errorbar(ranks, mean, spread, fmt="o-", color=color, markersize=4, label=title)
        ranks = sorted({float(arm.x) for arm in chosen if arm.x})
        plots.log_axis(axes, ranks, title=f"hidden layer {i + 1}", xlabel="rank", ylim=(0, 1))
    plots.legend_below(drawn, 3)
    return drawn


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(ranks=(1, 4, 10), shrink=2, width=128, epochs=8, images=8000, batch=128),
        "full": Config(ranks=(1, 4, 10, 32, 128), epochs=160, batch=32, learning_rate=6e-4, seeds=5),
    },
    Page("Does low-rank feedback make the same hidden layers?"),
    arms,
    study,
)
