"""The figure and the tables of :mod:`experiments.ldfa.cost`."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common import figures

TITLES = {"mlp": "Fully connected", "vgg": "VGG-like"}
COLORS = {
    "P and Q learned": figures.BLUE,
    "Q learned": figures.VERMILLION,
    "P learned": figures.GREEN,
    "both fixed": figures.PURPLE,
}


def write(folder: Path, steps: dict[str, Any], curve: dict[str, Any], target: float) -> Path:
    """Writes the report.

    Args:
      folder: of the run.
      steps: from :func:`experiments.ldfa.cost.step_costs`, by network.
      curve: from :func:`experiments.ldfa.cost.reach`.
      target: the accuracy that was to be reached.

    Returns:
      The path of the page.
    """
    tables = [row for name, one in steps.items() for row in [*_step_rows(name, one), [""]]]
    with figures.style():
        drawn = figure(steps, curve, target)
    caption = (
        "Operations and times of a training step by low-rank feedback, as multiples of backpropagation's, against the "
        "rank as a fraction of each layer's outputs; bars, the quartiles of the times. Right, operations to "
        f"{100 * target:g} % test accuracy in the fully connected network, and its accuracy at the end, a point per "
        "seed; grey is backpropagation."
    )
    return figures.write(
        folder,
        drawn,
        title="What low-dimensional feedback saves",
        caption=caption,
        table=tables + reach_rows(curve, target),
    )


def figure(steps: dict[str, Any], curve: dict[str, Any], target: float) -> Figure:
    """A column per network, backward above and the whole step below, and a column of what it takes to learn.

    Args:
      steps: from :func:`experiments.ldfa.cost.step_costs`, by network.
      curve: from :func:`experiments.ldfa.cost.reach`.
      target: the accuracy that was to be reached.

    Returns:
      A figure.
    """
    drawn = Figure(figsize=(2.9 * (len(steps) + 1), 4.9), layout="constrained")
    grid = drawn.add_gridspec(2, len(steps) + 1)
    for column, (name, one) in enumerate(steps.items()):
        top = drawn.add_subplot(grid[0, column])
        _backward(top, one)
        top.set_title(TITLES[name], color=figures.INK)
        bottom = drawn.add_subplot(grid[1, column])
        _step(bottom, one)
        if not column:
            top.set_ylabel("operations of the backward\n(backpropagation = 1)")
            bottom.set_ylabel("whole training step\n(backpropagation = 1)")
            bottom.legend(loc="upper left", fontsize=8)
    if steps:
        handles, labels = drawn.axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    _reach(drawn.add_subplot(grid[0, -1]), curve, target)
    _accuracy(drawn.add_subplot(grid[1, -1]), curve, target)
    return drawn


def _backward(axes: Axes, one: dict[str, Any]) -> None:
    for label, color in COLORS.items():
        axes.plot(one["fractions"], one["backward"][label], "o-", color=color, label=label, markersize=4, linewidth=1.4)
    theory = one["theory"]["P and Q learned"]
    axes.plot(one["fractions"], theory, "--", color=figures.INK, linewidth=1, label="theory, P and Q learned")
    axes.axhline(one["floor"], color=figures.INK, linewidth=1, linestyle=":", label="floor: weights' gradients alone")
    _fractions(axes, one["fractions"])
    axes.set_ylim(0, min(2.0, 1.1 * max(one["backward"]["P and Q learned"])))


def _step(axes: Axes, one: dict[str, Any]) -> None:
    axes.plot(one["fractions"], one["step"], "o-", color=figures.BLUE, markersize=4, linewidth=1.4, label="operations")
    times = [one["time"][str(fraction)] for fraction in one["fractions"]]
    ratio, low, high = (np.array([time[key] for time in times]) for key in ("ratio", "low", "high"))
    bars = np.maximum([ratio - low, high - ratio], 0)
    axes.errorbar(one["fractions"], ratio, bars, fmt="s-", color=figures.INK, markersize=4, linewidth=1.4, label="time")
    _fractions(axes, one["fractions"])
    axes.set_ylim(0, 1.15 * max(*high, *one["step"]))
    axes.set_xlabel("rank / outputs")


def _fractions(axes: Axes, fractions: list[float]) -> None:
    axes.axhline(1, color=figures.GREY, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(fractions, [f"1/{1 / fraction:g}" if fraction < 1 else "1" for fraction in fractions])
    axes.minorticks_off()
    axes.grid(axis="y")


def _reach(axes: Axes, curve: dict[str, Any], target: float) -> None:
    reference = float(np.mean(_numbers(curve["bp"]["operations"])))
    _by_rank(axes, curve, {name: _numbers(one["operations"]) / reference for name, one in curve.items()})
    axes.set_ylim(0, None)
    missed = [one["rank"] for one in curve.values() if one["rank"] and None in one["operations"]]
    if missed:
        axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
        top = 0.94 * axes.get_ylim()[1]
        axes.plot(missed, [top] * len(missed), "x", color=figures.INK, markersize=5)
        axes.text(missed[-1] * 1.15, top, "not reached", color=figures.INK, va="center", fontsize=8)
    axes.set_ylabel(f"operations to {100 * target:g} %\n(backpropagation = 1)")
    axes.set_title("Fully connected, trained", color=figures.INK)


def _accuracy(axes: Axes, curve: dict[str, Any], target: float) -> None:
    _by_rank(axes, curve, {name: 100 * _numbers(one["accuracy"]) for name, one in curve.items()})
    axes.axhline(100 * target, color=figures.INK, linewidth=1, linestyle=":")
    axes.set_xlabel("rank")
    axes.set_ylabel("test accuracy, last epoch, %")


def _by_rank(axes: Axes, curve: dict[str, Any], values: dict[str, np.ndarray]) -> None:
    ranks = [one["rank"] for one in curve.values() if one["rank"]]
    rows = np.array([values[name] for name, one in curve.items() if one["rank"]])
    axes.axhline(np.mean(values["bp"]), color=figures.GREY, linewidth=1)
    axes.plot(ranks, rows, ".", color=figures.BLUE, markersize=6, alpha=0.5)
    axes.plot(ranks, rows.mean(1), color=figures.BLUE, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_xlim(ranks[0] / 1.3, ranks[-1] * 1.3)
    axes.minorticks_off()
    axes.grid(axis="y")


def _step_rows(name: str, one: dict[str, Any]) -> list[list[str]]:
    short = [label.replace(" learned", "").replace("both fixed", "none") for label in COLORS]
    rows = [[f"{name}: rank", *(f"backward, learned: {label}" for label in short), "theory", "whole step", "its time"]]
    for i, fraction in enumerate(one["fractions"]):
        cells = [one["backward"][label][i] for label in COLORS]
        cells += [one["theory"]["P and Q learned"][i], one["step"][i], one["time"][str(fraction)]["ratio"]]
        rows.append([f"{fraction:g} m", *(f"{cell:.3f}" for cell in cells)])
    return [*rows, ["floor", f"{one['floor']:.3f}"]]


def reach_rows(curve: dict[str, Any], target: float) -> list[list[str]]:
    """The table of what it takes to reach the target, without what diverged."""
    rows = [["rank", f"steps to {100 * target:g} %", "TFLOP", "bp = 1", "last accuracy, %"]]
    reference = np.mean(_numbers(curve["bp"]["operations"]))
    for name, one in curve.items():
        if None in one["accuracy"]:
            continue
        cost = _numbers(one["operations"])
        cells = [_shown(_numbers(one["steps"]), 0), _shown(cost / 1e12, 2), _shown(cost / reference, 2)]
        rows.append([name, *cells, figures.estimate(100 * np.array(one["accuracy"]), 1)])
    return rows


def _numbers(values: list[float | None]) -> np.ndarray:
    """As an array, with NaN for what was not reached."""
    return np.array(values, dtype=float)


def _shown(values: np.ndarray, digits: int) -> str:
    return "not reached" if np.isnan(values).any() else figures.estimate(values, digits)
