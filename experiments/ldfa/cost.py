"""What low-dimensional feedback saves: operations of the backward pass and of a step, and operations to an accuracy.

Claim (Hanut and Kadmon 2025): up to 20 % less computation; operations to a given accuracy against the rank make a U.

Command: ``python -m experiments run ldfa_cost``

Operations are XLA's count on the compiled step (:func:`jaxfa.diagnostics.flops`): forward, backward with the signals of
``P`` and ``Q``, update. Two networks at the published sizes: a fully connected one, and a VGG-like one whose classifier
keeps backpropagation. No rule can go below the floor, the weights' gradients alone: half of backpropagation's
backward where every layer sends an error, more in a network whose first layer, which sends none, is the widest. What
a step takes of time, ``steps`` measures.

To an accuracy: operations per step times steps to the first epoch at whose end the test accuracy reaches one target,
the same for every rank. The published count lets each run aim at 0.9 of its own final accuracy, which favours ranks
that end low.

Verdict: half of it. A backward pass of low rank costs less. Operations to an accuracy make a U: the lowest ranks do not
reach the target, and beyond the cheapest rank every seed takes as many steps, which cost more. But the bottom of the U
saves nothing: no rank gets there with fewer operations than backpropagation, which is there epochs earlier. Steps are
counted in whole epochs, a coarse grid.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jaxfa
from experiments.common import data, experiment, operations, plots
from experiments.common.bounds import FROM_ZERO, MAY_BE_EMPTY, SHARE, Bound
from experiments.common.experiment import Arm, Experiment, Histories, Page, Study, Table, load
from experiments.common.metrics import shown
from experiments.common.task import Task
from experiments.ldfa.arms import FEEDBACK_RATE, bp, low_rank, wide
from experiments.ldfa.vgg import ALLOW, AT, network

NetworkName = Literal["mlp", "vgg"]
PAPER: dict[str, Any] = {"batch": 128, "learning_rate": 6e-4}
LEARNED: dict[str, dict[str, bool]] = {
    "P and Q learned": {},
    "Q learned": {"learn_p": False},
    "P learned": {"learn_q": False},
    "both fixed": {"learn_p": False, "learn_q": False},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """The ranks, and what to reach."""

    networks: Annotated[tuple[NetworkName, ...], MAY_BE_EMPTY] = ("mlp", "vgg")
    """The networks whose steps are counted."""
    fractions: Annotated[tuple[float, ...], SHARE] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    """Ranks at which steps are counted, as fractions of each layer's outputs."""
    ranks: tuple[int, ...] = (2, 4, 10, 32, 64, 128)
    """Ranks at which the fully connected network is trained."""
    target: Annotated[float, Bound("an accuracy between 0 and 1", lambda share: 0 < share < 1)] = 0.42
    """The test accuracy to reach, from 0 to 1."""
    width: int = 512
    """Units of a hidden layer of the fully connected network."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each pair of convolutions in the VGG-like network."""
    feedback_rate: Annotated[float, FROM_ZERO] = FEEDBACK_RATE
    """The learning rate of P, the projection of the error."""
    arms = ("networks", "ranks", "target")

    def unread(self) -> tuple[str, ...]:
        """The sizes of what is not counted."""
        counted = (() if self.networks else ("fractions",)) + (() if "vgg" in self.networks else ("widths",))
        return (*super().unread(), *counted)


def arms(config: Config) -> Iterator[Arm]:
    """The fully connected network by backpropagation and at every rank."""
    dataset = load(config, "cifar10")
    yield Arm("bp", "Backpropagation", None, task(config, "mlp", dataset, None))
    for rank in config.ranks:
        yield Arm(f"rank-{rank}", "LDFA", rank, task(config, "mlp", dataset, low_rank(rank, config.feedback_rate)))


def study(config: Config, histories: Histories) -> Study:
    """Counts the steps of every network, and what it took to reach the target."""
    dataset, goal = load(config, "cifar10"), f"{100 * config.target:g} %"
    steps: dict[str, Any] = {name: step_costs(config, name, dataset) for name in config.networks}
    curve = reach(config, dataset, histories)
    caption = (
        "Operations of the backward pass as multiples of backpropagation's, against the rank as a fraction of each "
        "layer's outputs; dashed, what theory says, dotted, the weights' gradients alone. Right, operations to "
        f"{goal} test accuracy in the fully connected network, a point per seed that reached it; grey is "
        "backpropagation."
    )
    tables = [Table(f"{name}, backpropagation = 1", step_rows(one)) for name, one in steps.items()]
    numbers = {"steps": steps, "reach": curve}
    tables.append(Table(f"To {goal}", reach_rows(curve)))
    return Study(figure(steps, curve), caption, tables, list(findings(steps, curve, goal)), numbers)


def findings(steps: dict[str, Any], curve: dict[str, Any], goal: str) -> Iterator[tuple[str, str]]:
    """The least backward pass of every network, and what the cheapest rank spends to learn."""
    for name, one in steps.items():
        least = one["P and Q learned"]
        fraction = one["fractions"][int(np.argmin(least))]
        yield f"{min(least):.2f} x", f"backpropagation's operations of a backward pass: {name} at rank {fraction:g} m."
    reference = np.mean(_numbers(curve["bp"]["operations"]))
    spent = {name: _numbers(one["operations"]) / reference for name, one in curve.items()}
    reached = {name: ratios.mean() for name, ratios in spent.items() if name != "bp" and not np.isnan(ratios).any()}
    if reached:
        best = min(reached, key=reached.__getitem__)
        ours, theirs = (_shown(spent[name], 2) for name in (best, "bp"))
        said = f"backpropagation's operations to {goal}, at the cheapest rank: {best}; backpropagation's own: {theirs}."
        yield f"{ours} x", said


def task(config: Config, name: NetworkName, dataset: data.Dataset, rule: jaxfa.Rule | None) -> Task:
    """The training of one network by one rule; None is backpropagation."""
    make: Any = partial(network, config.widths) if name == "vgg" else partial(wide, config.width)
    plain = bp(config, dataset, make, weight_decay=4e-4, decay=0.975)
    if rule is None:
        return plain
    return plain._replace(rule=rule, at=AT, allow=ALLOW) if name == "vgg" else plain._replace(rule=rule)


def step_costs(config: Config, name: NetworkName, dataset: data.Dataset) -> dict[str, Any]:
    """One network's operations as multiples of backpropagation's, a number for each fraction."""
    sizes = (dataset.train_images[0].size, *[config.width] * 3, dataset.classes)
    products = operations.dense(config.batch, sizes)
    if name == "vgg":
        products = operations.vgg(config.batch, dataset.train_images.shape[1], config.widths, dataset.classes)
    whole, plain = operations.theory(products, None), operations.count(task(config, name, dataset, None))
    found: dict[str, Any] = {label: [] for label in (*LEARNED, "theory", "step")}
    for fraction, (label, learned) in product(config.fractions, LEARNED.items()):
        counted = operations.count(task(config, name, dataset, low_rank(fraction, config.feedback_rate, **learned)))
        found[label].append(counted.backward / plain.backward)
        if not learned:
            found["theory"].append(operations.theory(products, fraction) / whole)
            found["step"].append(counted.step / plain.step)
    return found | {"fractions": config.fractions, "floor": operations.theory(products, 0.0) / whole}


def reach(config: Config, dataset: data.Dataset, histories: Histories) -> dict[str, Any]:
    """Operations to the target accuracy by backpropagation and at every rank, one number or None per seed."""
    found: dict[str, Any] = {}
    for arm in arms(config):
        history = histories.get(arm.name)
        first: list[float | None] = [None] * config.seeds  # as by those that diverge
        if history:
            steps = np.array([record["step"] for record in history[1:]], float)
            reached = np.array([record["test_accuracy"] for record in history[1:]]) >= config.target
            first = [float(steps[i.argmax()]) if i.any() else None for i in reached.T]
        cost = operations.count(arm.task).step if history else 0.0
        accuracy = history[-1]["test_accuracy"] if history else [None] * config.seeds
        spent = [None if step is None else cost * step for step in first]
        found[arm.name] = {"rank": arm.x, "steps": first, "operations": spent, "accuracy": accuracy}
    return found


def step_rows(one: dict[str, Any]) -> list[list[str]]:
    """The table of a network's steps."""
    labels = (*LEARNED, "theory", "step")
    rows = [
        [f"{fraction:g} m", *(f"{one[label][i]:.3f}" for label in labels)]
        for i, fraction in enumerate(one["fractions"])
    ]
    floor = ["floor", f"{one['floor']:.3f}", *[""] * (len(labels) - 1)]
    return [["rank", *(f"backward, {label}" for label in LEARNED), *labels[-2:]], *rows, floor]


def reach_rows(curve: dict[str, Any]) -> list[list[str]]:
    """The table of what it takes to reach the target, without what diverged."""
    rows = [["rank", "steps", "TFLOP", "bp = 1", "last accuracy, %"]]
    reference = np.mean(_numbers(curve["bp"]["operations"]))
    for name, one in curve.items():
        if None not in one["accuracy"]:
            cost = _numbers(one["operations"])
            cells = [_shown(_numbers(one["steps"]), 0), _shown(cost / 1e12, 2), _shown(cost / reference, 2)]
            rows.append([name, *cells, shown(100 * np.array(one["accuracy"]), 1)])
    return rows


def figure(steps: dict[str, Any], curve: dict[str, Any]) -> Figure:
    """A panel per network, and one of what it takes to learn."""
    drawn = Figure(figsize=(3.1 * (len(steps) + 1), 3.0), layout="constrained")
    *panels, last = drawn.subplots(1, len(steps) + 1, squeeze=False)[0]
    for axes, (name, one) in zip(panels, steps.items(), strict=True):
        for color, label in zip(plots.COLORS, LEARNED, strict=False):
            axes.plot(one["fractions"], one[label], "o-", color=color, label=label, markersize=4, linewidth=1.4)
        axes.plot(one["fractions"], one["theory"], "--", color=plots.INK, linewidth=1, label="theory")
        axes.axhline(one["floor"], color=plots.INK, linewidth=1, linestyle=":")
        _finish(axes, one["fractions"], name)
    if panels:
        plots.legend_below(drawn, 6)
    reference, ranks = np.mean(_numbers(curve["bp"]["operations"])), [one for one in curve.values() if one["rank"]]
    costs = np.array([_numbers(one["operations"]) for one in ranks]) / reference
    last.plot([one["rank"] for one in ranks], costs, "o", color=plots.BLUE, markersize=4)
    _finish(last, [one["rank"] for one in ranks], "operations to the target")
    return drawn


def _finish(axes: Axes, ticks: Any, title: str) -> None:
    axes.axhline(1, color=plots.GREY, linewidth=1)
    plots.log_axis(axes, ticks, title=title, ylabel="backpropagation = 1", xlabel="rank", ylim=(0, None))


def _numbers(values: list[float | None]) -> np.ndarray:
    """As an array, with NaN for what was not reached."""
    return np.array(values, dtype=float)


def _shown(values: np.ndarray, digits: int) -> str:
    return "not reached" if np.isnan(values).any() else shown(values, digits)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(epochs=20, images=10_000, test_images=5000, seeds=3, **PAPER),
        "paper": Config(target=0.58, epochs=160, seeds=5, **PAPER),
    },
    Page("What does low-dimensional feedback save?", "Hanut and Kadmon 2025"),
    arms,
    study,
)
