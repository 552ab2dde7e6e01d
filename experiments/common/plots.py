"""Small figures as SVG that goes into a page: text stays text, nothing refers to the outside."""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.metrics import Metric

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255")
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, *_ = COLORS
GREY, INK, LEVEL = "#9aa0a6", "#3c4043", "#4d5156"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxfa",
    "font.size": 8.2,
    "axes.titlesize": 8.6,
    "axes.titlecolor": INK,
    "axes.edgecolor": "#c8ccd1",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#eceff1",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 7.6,
}
_LABELLED = 6


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of every figure made inside the ``with`` statement."""
    with mpl.rc_context(_STYLE):
        yield


def lines(axes: Axes, x: Any, values: np.ndarray, color: str, label: str) -> None:
    """A thin line per seed, ``values`` being ``(seeds, points)``, and a thick one at their mean."""
    axes.plot(x, values.T, color=color, linewidth=0.6, alpha=0.45)
    axes.plot(x, values.mean(0), color=color, linewidth=1.8, label=label)


def log_axis(axes: Axes, ticks: Sequence[float], **named: Any) -> None:
    """A logarithmic axis of what was varied, with ticks where it was measured; ``named`` as in ``Axes.set``."""
    # It has no zero: where there is one, it stands a step below the least of the others.
    least = min(filter(None, ticks), default=1)
    log = {"value": "symlog", "linthresh": least} if 0 in ticks else {"value": "log"}
    axes.set_xscale(**log, base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.grid(axis="y")
    axes.set(**named)


def log_values(axes: Axes) -> None:
    """A logarithmic axis of what was measured, in plain numbers."""
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def legend_below(figure: Figure, columns: int) -> None:
    """The first panel's legend, below all."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def course(
    history: Sequence[dict[str, Any]],
    reference: Sequence[dict[str, Any]],
    color: str,
    metric: Metric,
    limits: tuple[float, float],
) -> str:
    """A metric over training, shaded by seed, beside the reference's in grey.

    Args:
      history: a run's records.
      reference: its reference's, such as backpropagation's.
      color: of the run.
      metric: what to show.
      limits: the least and the largest value shown.

    Returns:
      An ``<svg>`` element.
    """
    with style():
        figure, axes = _panel(0.17, 0.97, history[-1]["epoch"])
        for records, shade, width in ((reference, GREY, 1.1), (history, color, 1.7)):
            _band(axes, [record["epoch"] for record in records], metric.values(records), shade, width)
        axes.set_ylim(*limits)
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}{metric.unit}")
        return svg(figure)


def angles(history: Sequence[dict[str, Any]], top: float) -> str:
    """The angle to backpropagation of every layer but the last, over training, shaded by seed.

    Args:
      history: a run's records.
      top: the largest angle shown, in degrees.

    Returns:
      An ``<svg>`` element.
    """
    layers = list(history[-1]["angle"])[:-1]
    epochs = [record["epoch"] for record in history]
    shades = [mpl.colors.to_hex(shade) for shade in mpl.colormaps["viridis"](np.linspace(0.05, 0.78, len(layers)))]
    with style():
        shown = range(len(layers)) if len(layers) <= _LABELLED else (0, len(layers) - 1)
        figure, axes = _panel(0.13, 0.94 - 0.021 * max(len(layers[i]) for i in shown), epochs[-1])
        axes.axhline(90, color=GREY, linewidth=0.9, linestyle=(0, (3, 3)))
        ends = []
        for layer, shade in zip(layers, shades, strict=True):
            values = np.array([record["angle"][layer] for record in history], dtype=float)
            _band(axes, epochs, values, shade, 1.5)
            ends.append(float(np.mean(values[-1])))
        axes.set_ylim(-3, top)
        axes.yaxis.set_major_locator(mpl.ticker.FixedLocator([0, 45, 90, 135, 180]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}°")
        heights = _spread([ends[i] for i in shown], gap=0.105 * top)
        beside = axes.get_yaxis_transform()
        for i, height in zip(shown, heights, strict=True):
            axes.text(1.03, height, layers[i], transform=beside, color=shades[i], va="center", size=7.6)
        return svg(figure)


class Line(NamedTuple):
    """A line of a sweep.

    Attributes:
      label: beside its end.
      color: of the line.
      points: ``(x, y, deviation)`` each, by increasing ``x``.
      published: whether it is not ours: hollow marks, a thin line and no label.
    """

    label: str
    color: str
    points: Sequence[tuple[Any, float, float]]
    published: bool = False


class Level(NamedTuple):
    """A horizontal line: a reference, which has no ``x``."""

    label: str
    color: str
    y: float
    published: bool = False


def sweep(lines: Sequence[Line], levels: Sequence[Level], *, axis: str, unit: str, wide: bool) -> str:
    """Something measured against what a sweep varies, on a logarithmic axis.

    Args:
      lines: ours and the published ones.
      levels: the references.
      axis: what ``x`` counts.
      unit: of what is measured.
      wide: whether it takes a page's width and labels its lines.

    Returns:
      An ``<svg>`` element.
    """
    ticks = sorted({x for line in lines for x, _, _ in line.points})
    with style():
        figure = Figure(figsize=(7.6, 3.1) if wide else (3.7, 2.1))
        longest = max(len(label) for label in [*(one.label for one in lines), *(one.label for one in levels)])
        axes = figure.add_axes((0.06, 0.14, 0.91 - 0.0082 * longest, 0.83) if wide else (0.12, 0.2, 0.85, 0.76))
        axes.spines["left"].set_visible(False)
        for level in levels:
            axes.axhline(level.y, color=level.color, linewidth=0.9 if level.published else 1.3, **_dash(level))
        for line in lines:
            x, y, deviations = zip(*line.points, strict=True)
            hollow = {"mfc": "white", "linewidth": 0.8} if line.published else {"linewidth": 1.6, "elinewidth": 1}
            bars = None if line.published else deviations
            axes.errorbar(x, y, bars, marker="o", ms=4, color=line.color, mec=line.color, **hollow, **_dash(line))
        log_axis(axes, ticks, xlabel=axis)
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(6))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
        if wide:
            _label_ends(axes, lines, levels)
        return svg(figure)


def _dash(mark: Line | Level) -> dict[str, Any]:
    return {"linestyle": (0, (2, 2)) if mark.published else "-", "zorder": 2 if mark.published else 3}


def _label_ends(axes: Axes, lines: Sequence[Line], levels: Sequence[Level]) -> None:
    ends = [(line.points[-1][1], line) for line in lines] + [(level.y, level) for level in levels]
    # A group's own level stands beside its line, in its colour.
    named = {mark.label for _, mark in ends if isinstance(mark, Line) and not mark.published}
    shown = [(y, m) for y, m in ends if not m.published and (isinstance(m, Line) or m.label not in named)]
    low, high = axes.get_ylim()
    heights = _spread([y - low for y, _ in shown], gap=0.065 * (high - low))
    for height, (_, mark) in zip(heights, shown, strict=True):
        beside = axes.get_yaxis_transform()
        axes.text(1.015, low + height, mark.label, transform=beside, color=mark.color, va="center")


def _panel(left: float, right: float, epochs: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(2.5, 1.55))
    axes = figure.add_axes((left, 0.15, right - left, 0.81))
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y")
    axes.set_xlim(0, max(epochs, 1))
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


def _band(axes: Axes, epochs: Sequence[int], values: np.ndarray, color: str, width: float) -> None:
    """The mean over seeds, and around it their standard deviation."""
    mean = values.mean(1)
    spread = values.std(1, ddof=1) if values.shape[1] > 1 else np.zeros_like(mean)
    axes.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.22, linewidth=0)
    axes.plot(epochs, mean, color=color, linewidth=width, solid_capstyle="round")


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights from 0 moved apart just enough that no two are closer than ``gap``, around where they were."""
    placed = np.array(heights, dtype=float)
    order = np.argsort(placed, kind="stable")
    for _ in range(100):
        for low, high in pairwise(order):
            missing = gap - (placed[high] - placed[low])
            if missing > 1e-6:
                placed[low] -= missing / 2
                placed[high] += missing / 2
    return list(placed + max(0.0, -placed.min()))


def svg(figure: Figure) -> str:
    """A figure as an ``<svg>`` element that fills its place."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A page needs no namespaces, and without a size of its own the figure fills its place.
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    return f'{head} role="img">{rest}'
