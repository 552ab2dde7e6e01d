"""The figure and the table of :mod:`experiments.rank_collapse.rank_collapse`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common import figures


class Look(NamedTuple):
    """How an arm is shown."""

    title: str
    color: str
    dashed: bool = False


MAIN = {
    "bp": Look("BP", figures.INK),
    "bp-norm": Look("BP + BN", figures.INK, dashed=True),
    "fa": Look("FA", figures.VERMILLION),
    "fa-fast": Look("FA at BP's rate", figures.VERMILLION, dashed=True),
    "fa-muon": Look("FA + Muon", figures.PURPLE),
    "fa-norm": Look("FA + BN", figures.BLUE),
    "fa-norm-muon": Look("FA + BN + Muon", figures.GREEN),
}
MATCHED = [name for name in MAIN if name != "fa-fast"]  # whose loss only rises
CONTROLS = {
    "bp-norm": "BP",
    "bp-norm-rank-5": "update of rank 5",
    "bp-norm-rank-2": "update of rank 2",
    "bp-norm-rank-1": "update of rank 1",
    "fa-norm": "FA",
    "fa-norm-flat": "Muon's spectrum",
    "fa-norm-sized": "Muon's size",
    "fa-norm-muon": "both: Muon",
}
PUBLISHED = {"resnet18": {"fa": 1.4, "fa-muon": 25.3, "fa-norm": 37.1, "fa-norm-muon": 46.1}, "cnn": {}}
# Of the gradients along the trajectory, of a window that is not known.
PUBLISHED_RANKS = {"resnet18": {}, "cnn": {"bp": "about 100", "fa": "< 20, at the end about 12"}}
Histories = Mapping[str, Sequence[dict[str, Any]]]


def write(folder: Path, network: str, histories: Histories) -> Path:
    """Writes the report.

    Args:
      folder: of the run.
      network: its name.
      histories: the records of each arm.

    Returns:
      The path of the page.

    Raises:
      FloatingPointError: if every arm diverged.
    """
    figures.refuse_nothing(folder, histories)
    rows = table(network, histories)
    with figures.style():
        drawn = figure(histories)
    level = matched_loss(histories)
    caption = (
        "Effective ranks (Roy and Vetterli, of singular values), mean of the hidden layers. Within a batch: of the "
        "errors at a layer's output, a row per image; of a kernel's update as a matrix of inputs and outputs. Along "
        f"the trajectory: of the flattened pseudo-gradients, a row per step. The matched loss, {level:.2f}, is the "
        "lowest on the probe that all of the arms drawn there have reached. Thin lines and points are seeds."
    )
    title = f"Rank collapse of feedback alignment: {network}"
    return figures.write(folder, drawn, title=title, caption=caption, table=rows)


def table(network: str, histories: Histories) -> list[list[str]]:
    """Accuracies beside the published, and ranks at the matched loss and after the last epoch."""
    level = matched_loss(histories)
    within = [f"{kind}, at loss {level:.2f} / last" for kind in ("error", "gradient", "update")]
    along = ["gradients along the trajectory", "their participation ratio", "published", "updates along the trajectory"]
    rows = [["arm", "last epoch, %", "best epoch, %", "published, %", "loss on the probe", *within, *along]]
    for name, history in histories.items():
        accuracy = 100 * np.array([record["test_accuracy"] for record in history])
        cells = [figures.estimate(accuracy[-1], 1), figures.estimate(accuracy[1:].max(0), 1)]
        cells += [_cell(PUBLISHED[network].get(name)), f"{_losses(history)[:, -1].mean():.3g}"]
        for kind in ("error", "gradient", "update"):
            ranks = _hidden(history, kind)
            matched, last = (figures.estimate(found, 1) for found in (at_loss(history, ranks, level), ranks[:, -1]))
            cells.append(f"{'-' if 'nan' in matched else matched} / {last}")
        cells.append(figures.estimate(_hidden(history, "gradients")[:, -1], 1))
        cells.append(figures.estimate(_hidden(history, "gradients", "participation")[:, -1], 1))
        cells.append(PUBLISHED_RANKS[network].get(name, ""))
        cells.append(figures.estimate(_hidden(history, "updates")[:, -1], 1))
        rows.append([name, *cells])
    return rows


def matched_loss(histories: Histories) -> float:
    """The lowest loss on the probe that every arm of :data:`MATCHED` that is there has reached, in every seed."""
    chosen = [history for name, history in histories.items() if name in MATCHED] or list(histories.values())
    return max(float(_losses(history).min(1).max()) for history in chosen)


def at_loss(history: Sequence[dict[str, Any]], ranks: np.ndarray, level: float) -> np.ndarray:
    """Each seed's rank, of ``(seeds, epochs)``, where its loss first falls to a level, between two epochs; else NaN."""
    found = []
    for loss, rank in zip(_losses(history), ranks, strict=True):
        after = int((loss <= level).argmax())
        if loss[after] > level:
            found.append(np.nan)
        elif after == 0:
            found.append(rank[0])
        else:
            found.append(np.interp(level, loss[[after, after - 1]], rank[[after, after - 1]]))
    return np.array(found)


def figure(histories: Histories) -> Figure:
    """Accuracy, ranks over time and at matched loss, layer by layer, and the controls."""
    drawn = Figure(figsize=(9.6, 5.6), layout="constrained")
    grid = drawn.subplots(2, 3)
    chosen = {name: history for name, history in histories.items() if name in MAIN}
    level = matched_loss(histories)
    for name, history in chosen.items():
        steps = [record["step"] for record in history]
        accuracy = 100 * np.array([record["test_accuracy"] for record in history]).T
        _line(grid[0, 0], steps, accuracy, name)
        _line(grid[0, 1], steps[1:], _hidden(history, "gradients")[:, 1:], name)
        _line(grid[0, 2], steps, _hidden(history, "update"), name)
        if name in MATCHED:
            _against_loss(grid[1, 0], history, name)
            _by_layer(grid[1, 1], history, name, level)
    _controls(grid[1, 2], histories)
    labels = (
        ("a", "accuracy", "steps", "test accuracy, %"),
        ("b", "gradients along the trajectory", "steps", "effective rank"),
        ("c", "update, within a batch", "steps", "effective rank"),
        ("d", "gradient, within a batch", "loss on the probe", "effective rank"),
        ("e", f"errors at loss {level:.2f}", "layer, from the image to the head", "effective rank"),
        ("f", "what spectra do, with BN", "test accuracy, last epoch, %", ""),
    )
    for axes, (letter, title, x, y) in zip(grid.flat, labels, strict=True):
        axes.set_title(f"{letter}   {title}", loc="left", color=figures.INK)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="x" if letter == "f" else "y")
        if letter != "f":
            axes.set_ylim(0, None)
    drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    return drawn


def _line(axes: Axes, x: Any, values: np.ndarray, name: str, **options: Any) -> None:
    look = MAIN[name]
    style = {"color": look.color, "linestyle": "--" if look.dashed else "-"} | options
    if len(values) > 1:
        axes.plot(np.broadcast_to(x, values.shape).T, values.T, linewidth=0.6, alpha=0.45, **style)
    axes.plot(np.mean(np.broadcast_to(x, values.shape), 0), values.mean(0), linewidth=1.8, label=look.title, **style)


def _against_loss(axes: Axes, history: Sequence[dict[str, Any]], name: str) -> None:
    # Before the first step the loss of random logits is far off.
    _line(axes, _losses(history)[:, 1:], _hidden(history, "gradient")[:, 1:], name, marker=".", markersize=4)
    axes.xaxis.set_inverted(True)


def _by_layer(axes: Axes, history: Sequence[dict[str, Any]], name: str, level: float) -> None:
    layers = list(history[0]["rank"]["error"])
    values = np.array([at_loss(history, _ranks(history, "error", [layer]), level) for layer in layers]).T
    _line(axes, np.arange(len(layers)), values, name, marker="o", markersize=3)
    axes.set_xticks(range(len(layers)), [str(i + 1) for i in range(len(layers))])


def _controls(axes: Axes, histories: Histories) -> None:
    rows = [(name, title) for name, title in CONTROLS.items() if name in histories]
    for place, (name, _) in enumerate(reversed(rows)):
        accuracy = 100 * np.array(histories[name][-1]["test_accuracy"])
        color = figures.INK if name.startswith("bp") else figures.VERMILLION
        axes.hlines(place, 0, accuracy.mean(), color=color, linewidth=1.2, alpha=0.5)
        axes.plot(accuracy, [place] * len(accuracy), "o", color=color, markersize=4)
        axes.annotate(
            f"{accuracy.mean():.1f}", (accuracy.max(), place), (6, 0), textcoords="offset points", va="center", size=8
        )
    axes.set_yticks(range(len(rows)), [title for _, title in reversed(rows)])
    axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
    axes.tick_params(axis="y", length=0)


def _losses(history: Sequence[dict[str, Any]]) -> np.ndarray:
    """``(seeds, epochs)``."""
    return np.array([record["probe_loss"] for record in history], dtype=float).T


def _hidden(history: Sequence[dict[str, Any]], kind: str, measure: str = "rank") -> np.ndarray:
    """The mean rank over the hidden layers, those that have a trajectory, ``(seeds, epochs)``."""
    return _ranks(history, kind, list(history[0]["rank"]["gradients"]), measure)


def _ranks(history: Sequence[dict[str, Any]], kind: str, layers: list[str], measure: str = "rank") -> np.ndarray:
    found = [np.mean([record[measure][kind][layer] for layer in layers], 0) for record in history]
    return np.array(found, dtype=float).T


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
