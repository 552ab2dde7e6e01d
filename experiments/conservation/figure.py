"""The figure and the table of what is conserved."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.common import figures
from experiments.conservation.laws import CASES, Followed

EXACT = 1e-12
FLOOR = 3e-17  # below it a logarithmic axis has no room; half of a rounding error
HOLDS = ("#0072b2", "#56b4e9", "#009e73", "#7a8a99", "#3c4043")
BREAKS = ("#d55e00", "#cc79a7", "#e69f00", "#8c510a")
LEAST = {"random": figures.VERMILLION, "in the span of the data": figures.BLUE, "zero": figures.GREEN}
STARTS = {
    "backpropagation": figures.GREY,
    "random": figures.VERMILLION,
    "random, norms as aligned": "#e69f00",
    "aligned": figures.BLUE,
}
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "fashion_mnist": "Fashion-MNIST"}
CAPTION = (
    "(a) By how much Q(t) - Q(0), the drift of what feedback alignment conserves, differs from half of the squared "
    "steps, in the worst unit: by rounding where the law holds, by far more in the controls. (b) The drift at the end "
    "against half of the squared steps, a point for every unit; crosses are the controls. (c) After the same time the "
    "drift falls with the learning rate: under gradient flow there is none. (d) Overlap of the weights with their "
    "feedback, of all hidden units, and the bound below which the law says that it cannot fall. (e) A two-layer linear "
    "network tends to the least solution from the span of the data alone. (f, g) Test accuracy from each start, and "
    "(h) the angle to backpropagation, mean of the hidden layers; dashed, the first data set. Thin lines are seeds."
)


class Laws(NamedTuple):
    """What was followed in double precision.

    Attributes:
      cases: by name.
      rates: ReLU on the same examples for the same time, by learning rate.
      aligned: ReLU from an aligned start.
      least: distances from the least solution by start, ``(seeds, iterations)``.
    """

    cases: dict[str, Followed]
    rates: dict[float, Followed]
    aligned: Followed
    least: dict[str, np.ndarray]


Trained = Mapping[str, Mapping[str, list[dict[str, Any]]]]


def table(laws: Laws, trained: Trained) -> list[list[str]]:
    """What the theory says beside what was measured."""
    rows = [["quantity", "theory", "ours"]]
    for name, found in laws.cases.items():
        theory = "0" if CASES[name].holds else "not 0"
        rows.append([f"|drift - half squared steps|, {name}", theory, f"{found.residual.max():.1e}"])
    drifts = {rate: float(np.abs(found.drift[-1]).max()) for rate, found in laws.rates.items()}
    first = max(drifts)
    for rate, drift in drifts.items():
        theory = "" if rate == first else f"{drifts[first] * rate / first:.2e}"
        rows.append([f"drift, learning rate {rate:g}", theory, f"{drift:.2e}"])
    for name, found in (("random", laws.cases["ReLU"]), ("aligned", laws.aligned)):
        least, bound = found.overlap.sum(1).min(), found.bound[-1].sum()
        rows.append([f"least overlap with the feedback, {name} start", f">= {bound:.2f}", f"{least:.2f}"])
    for start, distance in laws.least.items():
        theory = "not 0" if start == "random" else "0"
        rows.append([f"distance from the least solution, {start}", theory, _range(distance[:, -1])])
    for dataset, starts in trained.items():
        for start, history in starts.items():
            accuracy = figures.estimate(100 * np.array(history[-1]["test_accuracy"]), 1)
            angles = ", ".join(f"{np.mean(angle):.0f}°" for angle in list(history[-1]["angle"].values())[:-1])
            rows.append([f"{TITLES.get(dataset, dataset)} accuracy (angles), {start}", "", f"{accuracy} % ({angles})"])
    return rows


def numbers(laws: Laws) -> dict[str, Any]:
    """What the figure's first five panels show, as JSON values."""
    return {
        "residual": {name: float(found.residual.max()) for name, found in laws.cases.items()},
        "drift": {str(rate): float(np.abs(found.drift[-1]).max()) for rate, found in laws.rates.items()},
        "least": {start: distance[:, -1].tolist() for start, distance in laws.least.items()},
    }


def figure(laws: Laws, trained: Trained) -> Figure:
    """Two rows: the law; what follows from it."""
    drawn = Figure(figsize=(11.6, 5.9), layout="constrained")
    grid = drawn.subplots(2, 4).ravel()
    _residuals(grid[0], laws.cases)
    _units(grid[1], laws.cases)
    _rates(grid[2], laws.rates)
    _overlaps(grid[3], laws)
    _least(grid[4], laws.least)
    for axes, (name, starts) in zip(grid[5:7], trained.items(), strict=False):
        _accuracies(axes, name, starts)
    if trained:
        _angles(grid[7], trained)
    for axes in grid[5 + len(trained) : 7] if trained else grid[5:]:
        axes.set_visible(False)
    for letter, axes in zip("abcdefgh", grid, strict=True):
        axes.set_title(f"({letter}) {axes.get_title()}", loc="left", color=figures.INK)
        axes.set_title("")
        axes.grid(axis="y")
    return drawn


def _colors(cases: dict[str, Followed]) -> dict[str, str]:
    kinds = {True: iter(HOLDS), False: iter(BREAKS)}
    return {name: next(kinds[CASES[name].holds]) for name in cases}


def _residuals(axes: Axes, cases: dict[str, Followed]) -> None:
    for name, color in _colors(cases).items():
        # From the second step: the first one is the same with momentum as without.
        residual = np.maximum(cases[name].residual[2:], FLOOR)
        axes.plot(np.arange(2, len(residual) + 2), residual, color=color, linewidth=1.3, label=name)
    axes.axhline(EXACT, color=figures.INK, linewidth=0.8, linestyle=":")
    axes.set(yscale="log", xscale="log", ylim=(FLOOR, 1e4), xlabel="step", title="exact for finite steps")
    axes.set_ylabel(r"$|\Delta Q - \frac{1}{2}\sum\|\Delta W\|^2|$, worst unit")
    spacing = {"labelspacing": 0.2, "columnspacing": 0.8, "handlelength": 1.1, "handletextpad": 0.4}
    axes.legend(fontsize=6.5, ncols=2, loc="center", bbox_to_anchor=(0.5, 0.43), **spacing)


def _units(axes: Axes, cases: dict[str, Followed]) -> None:
    for name, color in _colors(cases).items():
        end = cases[name]
        marker = "o" if CASES[name].holds else "x"
        drift = np.abs(end.drift[-1])
        axes.plot(end.squares[-1], drift, marker, color=color, alpha=0.7, markersize=3, markeredgewidth=0.7)
    low, high = 1e-7, 1e3
    axes.plot([low, high], [low, high], color=figures.INK, linewidth=0.8, zorder=1)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title="unit by unit")
    axes.set(xlabel=r"half squared steps $\frac{1}{2}\sum_t\|\Delta w_j\|^2$", ylabel=r"drift $|Q_j(T) - Q_j(0)|$")


def _rates(axes: Axes, rates: dict[float, Followed]) -> None:
    for rate, found in rates.items():
        axes.scatter(np.full(found.drift.shape[1], rate), np.abs(found.drift[-1]), s=7, color=figures.BLUE, alpha=0.25)
    x = np.array(sorted(rates))
    worst = np.array([np.abs(rates[rate].drift[-1]).max() for rate in x])
    axes.plot(x, worst, "o", color=figures.INK, markersize=4, label="largest of all units")
    axes.plot(x, worst[-1] * x / x[-1], color=figures.INK, linewidth=0.8, label="proportional")
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="drift after the same time")
    axes.set_ylim(worst.min() / 1e3, worst.max() * 3)
    axes.set_title("vanishes in the flow")
    axes.legend(fontsize=7, loc="lower right")


def _overlaps(axes: Axes, laws: Laws) -> None:
    shown = (("random start", laws.cases["ReLU"], figures.VERMILLION), ("aligned start", laws.aligned, figures.BLUE))
    for name, found, color in shown:
        axes.plot(found.overlap.sum(1), color=color, linewidth=1.5, label=name)
        axes.plot(found.bound.sum(1), color=color, linewidth=1.0, linestyle="--", label="its bound")
    axes.axhline(0, color=figures.INK, linewidth=0.6)
    axes.set(xlabel="step", ylabel=r"overlap $\langle W_{i+1}, B_{i+1}\rangle$", title="alignment is bounded below")
    axes.legend(fontsize=7, loc="center", bbox_to_anchor=(0.5, 0.27), ncols=2, columnspacing=1.0, handlelength=1.6)


def _least(axes: Axes, least: dict[str, np.ndarray]) -> None:
    for start, distances in least.items():
        shown = np.maximum(distances, 1e-16)
        figures.lines(axes, np.arange(1, shown.shape[1] + 1), shown, LEAST[start], start)
    axes.set(yscale="log", ylim=(1e-16, 10), xlabel="iteration", ylabel=r"$\|w - w_{\min}\| / \|w_{\min}\|$")
    axes.set_title("the least solution")
    axes.legend(fontsize=7, title="first layer starts", title_fontsize=7)


def _accuracies(axes: Axes, name: str, starts: Mapping[str, list[dict[str, Any]]]) -> None:
    for start, history in starts.items():
        accuracy = 100 * np.array([record["test_accuracy"] for record in history[1:]]).T
        figures.lines(axes, [record["epoch"] for record in history[1:]], accuracy, STARTS[start], start)
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", title=f"{TITLES.get(name, name)}, accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _angles(axes: Axes, trained: Trained) -> None:
    for i, starts in enumerate(trained.values()):
        for start, history in starts.items():
            hidden = np.array([list(record["angle"].values())[:-1] for record in history], float).mean((1, 2))
            dashed = i == 0 and len(trained) > 1
            epochs = [record["epoch"] for record in history]
            (line,) = axes.plot(epochs, hidden, color=STARTS[start], linewidth=1.5, linestyle="--" if dashed else "-")
            line.set_label("" if dashed else start)
    axes.axhline(90, color=figures.INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel="epoch", ylabel="angle to backpropagation (°)", ylim=(-3, 100), yticks=range(0, 91, 30))
    axes.set_title("angle to backpropagation")
    axes.legend(fontsize=7, loc="center", bbox_to_anchor=(0.5, 0.465), title="start (f, g, h)", title_fontsize=7)


def _range(values: np.ndarray) -> str:
    return f"{values.min():.1e} to {values.max():.1e}"
