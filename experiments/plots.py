"""Small figures as SVG that goes into a page: text stays text, nothing refers to the outside."""

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, INK = "#9aa0a6", "#3c4043"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxfa",
    "font.size": 8.2,
    "axes.edgecolor": "#c8ccd1",
    "axes.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
}
_LABELLED = 6


def accuracy(history: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], color: str, floor: float) -> str:
    """Accuracy over training, shaded by seed, above the reference's in grey.

    Args:
      history: a run's records.
      reference: backpropagation's records.
      color: of the run.
      floor: the least accuracy shown, from 0 to 1.

    Returns:
      An ``<svg>`` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _panel(0.17, 0.97, history[-1]["epoch"])
        for records, shade, width in ((reference, GREY, 1.1), (history, color, 1.7)):
            values = 100 * np.array([record["test_accuracy"] for record in records])
            _band(axes, [record["epoch"] for record in records], values, shade, width)
        axes.set_ylim(100 * floor, 100)
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
        return _svg(figure)


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
    with mpl.rc_context(_STYLE):
        figure, axes = _panel(0.13, 0.77, epochs[-1])
        axes.axhline(90, color=GREY, linewidth=0.9, linestyle=(0, (3, 3)))
        ends = []
        for layer, shade in zip(layers, shades, strict=True):
            values = np.array([record["angle"][layer] for record in history], dtype=float)
            _band(axes, epochs, values, shade, 1.5)
            ends.append(float(np.mean(values[-1])))
        axes.set_ylim(-3, top)
        axes.yaxis.set_major_locator(mpl.ticker.FixedLocator([0, 45, 90, 135, 180]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}°")
        shown = range(len(layers)) if len(layers) <= _LABELLED else (0, len(layers) - 1)
        heights = _spread([ends[i] for i in shown], gap=0.105 * top)
        beside = axes.get_yaxis_transform()
        for i, height in zip(shown, heights, strict=True):
            axes.text(1.03, height, layers[i], transform=beside, color=shades[i], va="center", size=7.6)
        return _svg(figure)


def _panel(left: float, right: float, epochs: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(2.5, 1.55))
    axes = figure.add_axes((left, 0.15, right - left, 0.81))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color="#eceff1", linewidth=0.7)
    axes.set_axisbelow(True)
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


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A page needs no namespaces, and without a size of its own the figure fills its place.
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    return f'{head} role="img">{rest}'
