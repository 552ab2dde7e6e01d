"""The figure and the table of ``memory``."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks.memory_steps import (
    FUSED,
    PARALLEL,
    REFERENCE,
    REMATERIALISED,
    STORED,
    STREAMED,
    Config,
)
from experiments.common import plots
from experiments.common.experiment import Study, Table

COLORS = {
    REFERENCE: plots.INK,
    REMATERIALISED: plots.GREY,
    STORED: plots.PURPLE,
    PARALLEL: plots.VERMILLION,
    STREAMED: plots.BLUE,
    FUSED: plots.GREEN,
}


def study(config: Config, found: dict[str, list[dict[str, Any]]]) -> Study:
    """Draws memory against depth and the time of a step, and makes the tables.

    Args:
      config: a ``Config``.
      found: the measurements of ``stack`` and ``resnet``.
    """
    timed = {name: [one for one in rows if "ratio" in one] for name, rows in found.items()}
    drawn = Figure(figsize=(10.4, 4.1), layout="constrained")
    stack, resnet, times = drawn.subplots(1, 3, width_ratios=(1.25, 1, 1))
    blocks = f"blocks of width {config.width}, batch {config.batch}"
    images = f"ResNet, {config.images} images of {config.pixels} pixels"
    _memory(stack, found["stack"], blocks, "blocks")
    _memory(resnet, found["resnet"], images, "layers")
    _times(times, timed["stack"])
    times.set_title(f"a step of {config.timed} blocks, backpropagation = 1")
    handles, labels = stack.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3)
    caption = (
        "Left and middle: temporary memory of the compiled step, without parameters, gradients and optimizer state. "
        "Right: the median of interleaved rounds, with quartiles. A step is the gradient of all parameters; where "
        "blocks are updated at once it is the update, too."
    )
    tables = [
        Table(f"MiB, {blocks}", memory_table(found["stack"])),
        Table(f"MiB, {images}", memory_table(found["resnet"])),
        Table("Time of a step", [_HEAD, *(row for name, rows in timed.items() for row in time_rows(name, rows))]),
    ]
    return Study(drawn, caption, tables, findings(found, timed["stack"]), found)


def findings(found: dict[str, list[dict[str, Any]]], timed: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What came of it: pairs of a figure and the sentence that it begins."""
    deepest = max(one["depth"] for one in found["stack"])
    at = {one["method"]: _mib(one) for one in found["stack"] if one["depth"] == deepest}
    least = {_mib(one) for one in found["stack"] if one["method"] == STREAMED}
    ratio = {one["method"]: one["ratio"] for one in timed}
    return [
        (f"{at[REFERENCE] / at[STREAMED]:.0f}x", f"less memory than backpropagation's at {deepest} blocks, streamed."),
        (f"{max(least) / min(least):.2f}x", "is what streamed memory grows by from the least depth to the largest."),
        (f"{ratio[STREAMED]:.2f}x", "backpropagation's time of a step, streamed."),
    ]


def _memory(axes: Axes, rows: list[dict[str, Any]], title: str, counted: str) -> None:
    for method, color in COLORS.items():
        chosen = [one for one in rows if one["method"] == method]
        if chosen:
            depths = [one["depth"] for one in chosen]
            line = "o--" if method == FUSED else "o-"
            axes.plot(depths, [_mib(one) for one in chosen], line, color=color, markersize=3, label=method)
    depths = sorted({one["depth"] for one in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(counted)
    axes.set_ylabel("MiB")
    axes.set_title(title)
    axes.grid(axis="y")


def _times(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for i, one in enumerate(rows):
        bars = [[max(one["ratio"] - one["low"], 0.0)], [max(one["high"] - one["ratio"], 0.0)]]
        axes.barh(-i, one["ratio"], 0.45, xerr=bars, color=COLORS[one["method"]], error_kw={"linewidth": 0.8})
        axes.annotate(f"{one['method']}: {one['ratio']:.2f}", (0, -i + 0.32), fontsize=7.6, va="bottom")
    axes.set_yticks([])
    axes.set_ylim(0.75 - len(rows), 0.9)
    axes.axvline(1, color=plots.GREY, linewidth=0.9)


def memory_table(measured: list[dict[str, Any]]) -> list[list[str]]:
    """MiB by method and depth."""
    depths = sorted({one["depth"] for one in measured})
    rows = [["method, depth", *map(str, depths)]]
    for method in COLORS:
        own = {one["depth"]: one for one in measured if one["method"] == method}
        if own:
            rows.append([method, *(f"{_mib(own[depth]):.1f}" for depth in depths)])
    return rows


_HEAD = ["method, depth", "milliseconds", "backpropagation = 1", "quartiles", "device's peak"]


def time_rows(name: str, rows: list[dict[str, Any]]) -> list[list[str]]:
    """The time of a step of each method, and the device's peak of memory where it counts that."""
    found = []
    for one in rows:
        peak = f"{one['peak'] / 2**20:.0f} MiB" if one["peak"] else "-"
        quartiles = f"{one['low']:.2f} to {one['high']:.2f}"
        title = f"{name} {one['depth']}, {one['method']}"
        found.append([title, f"{one['milliseconds']:.0f}", f"{one['ratio']:.2f}", quartiles, peak])
    return found


def _mib(one: dict[str, Any]) -> float:
    return one["temporary"] / 2**20
