"""How a training went, as small figures: a metric and the angles of its layers over epochs."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.metrics import Metric
from experiments.common.plots import GREY, spread, style, svg

_LABELLED = 6


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
        heights = spread([ends[i] for i in shown], gap=0.105 * top)
        beside = axes.get_yaxis_transform()
        for i, height in zip(shown, heights, strict=True):
            axes.text(1.03, height, layers[i], transform=beside, color=shades[i], va="center", size=7.6)
        return svg(figure)


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
