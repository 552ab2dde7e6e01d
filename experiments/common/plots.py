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
    heights = spread([y - low for y, _ in shown], gap=0.065 * (high - low))
    for height, (_, mark) in zip(heights, shown, strict=True):
        beside = axes.get_yaxis_transform()
        axes.text(1.015, low + height, mark.label, transform=beside, color=mark.color, va="center")


def spread(heights: Sequence[float], gap: float) -> list[float]:
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
