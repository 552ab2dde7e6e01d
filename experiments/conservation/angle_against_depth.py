"""The angle of feedback alignment's updates to the true gradient against depth and width, dense and convolutional.

Claim: random feedback aligns with the weights in shallow networks and loses its hold in deep and in convolutional ones,
the root cause that the methods of all papers here start from.

Command: ``python -m experiments run conservation_angle_against_depth``.

All hidden layers of a network have one width: 64 units or 8 channels times the factor. There is no normalisation and no
pooling, and only the first convolution has a stride, 2. All learn MNIST averaged to 14 x 14 pixels by Adam at one rate
for as many steps, so that angles are compared at equal time, not at equal accuracy. An angle is of a layer's kernel on
512 training images after the last epoch.

Verdict: half of it. In dense networks the first layer's angle is much the same up to a middle depth; in the deepest and
in thin ones it is a right angle within its error, and width beyond the middle one helps little. In convolutional
networks FA's is a right one within its error at every depth, and so is DFA's but for two middle depths, where it is a
little less; seeds lie far to either side. Most likely kernels, which all positions share, cannot carry to the layer
above what feedback differs in from position to position. Accuracy falls with depth before that angle turns: in dense
networks from the second depth on, in convolutional ones from the third.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from operator import itemgetter
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

import jaxfa
from experiments.common import experiment, plots
from experiments.common.experiment import Arm, Experiment, Histories, Page, Study, Table, load
from experiments.common.metrics import shown
from experiments.common.task import Task
from experiments.models.networks import MLP

RULES: dict[str, tuple[Callable[[], jaxfa.Rule], str]] = {
    "FA": (jaxfa.fa, plots.VERMILLION),
    "DFA": (jaxfa.dfa, plots.BLUE),
    "BP": (jaxfa.backprop, plots.GREY),
}
WIDTHS = {"dense": 64, "convolutional": 8}
LINES = {"dense": "-", "convolutional": (0, (3, 2))}
CAPTION = (
    "Angles of the hidden layers' updates to the true gradient: (a) of the first layer by the network's depth, (b) of "
    "the first layer by its width, (c) of each layer of the deepest network by its distance from the output. (d) Test "
    "accuracy by depth. Solid lines are dense networks, dashed lines convolutional ones; bars are deviations of seeds."
)


class Convolutions(nnx.Module):
    """3x3 convolutions of one width with ReLU, the first strided, and a linear head."""

    def __init__(self, depth: int, width: int, *, rngs: nnx.Rngs) -> None:
        first = nnx.Conv(1, width, (3, 3), strides=2, rngs=rngs)
        self.layers = nnx.List([first, *(nnx.Conv(width, width, (3, 3), rngs=rngs) for _ in range(1, depth))])
        self.head = nnx.Linear(49 * width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, 14, 14, 1)`` to logits ``(N, 10)``."""
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x.reshape(len(x), -1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """The networks, and for how long they learn."""

    depths: tuple[int, ...] = (1, 2, 4, 8)
    """How many hidden layers the networks of middle width have."""
    factors: tuple[float, ...] = (0.25, 1.0, 4.0)
    """The factors on the middle width, for networks of one depth."""
    depth: int = 4
    """The depth of the networks of other widths."""

    arms = ("depths", "factors")

    @property
    def sizes(self) -> list[tuple[int, float]]:
        """The depth and the factor of every network."""
        return list(dict.fromkeys([*product(self.depths, (1.0,)), *product((self.depth,), self.factors)]))


def arms(config: Config) -> Iterator[Arm]:
    """Every rule in every network."""
    dataset = load(config, "mnist", 2)
    for kind, rule, size in product(WIDTHS, RULES, config.sizes):
        make = partial(_network, kind, size[0], max(1, round(size[1] * WIDTHS[kind])))
        task = Task(make, RULES[rule][0](), optax.adam(config.learning_rate), dataset, config.batch)
        name = _name(kind, rule, size)
        yield Arm(name, name, None, task)


def _network(kind: str, depth: int, width: int, rngs: nnx.Rngs) -> nnx.Module:
    if kind == "dense":
        return MLP((14, 14, 1), 10, (width,) * depth, rngs=rngs)
    return Convolutions(depth, width, rngs=rngs)


def _name(kind: str, rule: str, size: tuple[int, float]) -> str:
    return f"{kind}-{rule.lower()}-{size[0]}-{size[1]:g}"


def study(config: Config, histories: Histories) -> Study:
    """What came of every network."""
    last = {name: _read(found[-1]) for name, found in histories.items()}
    rows = [
        [
            "network, depth x width",
            *(f"{rule}: {what}" for what in ("first layer", "mean", "accuracy") for rule in RULES),
        ]
    ]
    for kind, (depth, factor) in product(WIDTHS, config.sizes):
        found = [last[_name(kind, rule, (depth, factor))] for rule in RULES]
        angles = [[f"{shown(of(one), 0)}°" for one, _ in found] for of in (itemgetter(0), np.mean)]
        rows.append(
            [f"{kind}, {depth} x {factor * WIDTHS[kind]:g}", *angles[0], *angles[1], *(shown(a, 1) for _, a in found)]
        )
    return Study(_figure(config, last), CAPTION, [Table("Angles and accuracies", rows)], _findings(config, last))


def _findings(config: Config, last: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[tuple[str, str]]:
    """How random feedback stands in the deepest networks and in the shallowest."""
    found, ends = [], (max(config.depths), min(config.depths))
    for kind in WIDTHS:
        deep, shallow = (last[_name(kind, "FA", (depth, 1.0))][0].mean() for depth in ends)
        said = (
            f"from the true gradient: FA in {kind} networks of {ends[0]} hidden layers, mean of these; of {ends[1]}: "
        )
        found.append((f"{deep:.0f}°", f"{said}{shallow:.0f}°."))
    return found


def _read(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The hidden layers' angles, ``(layers, seeds)``, and the accuracies, ``(seeds,)``."""
    return np.array(list(record["angle"].values())[:-1], float), 100 * np.array(record["test_accuracy"])


def _figure(config: Config, last: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    drawn = Figure(figsize=(11.6, 3.0), layout="constrained")
    grid = drawn.subplots(1, 4)
    for (kind, line), (rule, (_, color)) in product(LINES.items(), RULES.items()):
        depths = [last[_name(kind, rule, (depth, 1.0))] for depth in config.depths]
        widths = [last[_name(kind, rule, (config.depth, factor))] for factor in config.factors]
        deepest = depths[-1][0]
        panels: list[tuple[Any, Any]] = [
            (config.depths, [angles[0] for angles, _ in depths]),
            (config.factors, [angles[0] for angles, _ in widths]),
            (range(len(deepest), 0, -1), deepest),
            (config.depths, [accuracy for _, accuracy in depths]),
        ]
        for axes, (x, values) in zip(grid, panels, strict=True):
            bars = {"linestyle": line, "color": color, "marker": "o", "ms": 3, "label": f"{rule}, {kind}"}
            axes.errorbar(x, np.mean(values, 1), np.std(values, 1), **bars)
    labels = ("depth", f"factor on the width, depth {config.depth}", "layers to the output", "depth")
    titles = (
        "(a) first layer's angle (°)",
        "(b) first layer's angle (°)",
        "(c) angle in the deepest (°)",
        "(d) accuracy (%)",
    )
    for axes, label, title in zip(grid, labels, titles, strict=True):
        plots.log_axis(axes, config.factors if axes is grid[1] else config.depths, xlabel=label, title=title)
    plots.legend_below(drawn, 6)
    return drawn


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(epochs=4, images=3000, test_images=2000, batch=50, seeds=9),
        "paper": Config(depths=(1, 2, 4, 8, 16), factors=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0), epochs=20, seeds=5),
    },
    Page("Where does random feedback lose its hold?"),
    arms,
    study,
)
