"""The figure and the table of ``memory``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks.memory_steps import FUSED, PARALLEL, REFERENCE, REMATERIALISED, STORED, STREAMED
from experiments.common import figures

if TYPE_CHECKING:
    from experiments.benchmarks.memory import Config

COLORS = {
    REFERENCE: figures.INK,
    REMATERIALISED: figures.GREY,
    STORED: figures.PURPLE,
    PARALLEL: figures.VERMILLION,
    STREAMED: figures.BLUE,
    FUSED: figures.GREEN,
}


def write(config: "Config", found: dict[str, list[dict[str, Any]]]) -> Path:
    """Draws memory against depth and the time of a step, writes the table.

    Args:
      config: a :class:`experiments.benchmarks.memory.Config`.
      found: the measurements of ``stack`` and ``resnet``.

    Returns:
      The path of the page.
    """
    with figures.style():
        drawn = Figure(figsize=(10.4, 3.9), layout="constrained")
        stack, resnet, times = drawn.subplots(1, 3, width_ratios=(1.25, 1, 1))
        _memory(stack, found["stack"], f"blocks of width {config.width}, batch {config.batch}", "blocks")
        _memory(resnet, found["resnet"], f"ResNet, {config.images} images of {config.pixels} pixels", "layers")
        _times(times, [one for one in found["stack"] if one["depth"] == config.timed])
        times.set_title(f"a step of {config.timed} blocks, seconds", color=figures.INK)
        handles, labels = stack.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3)
    caption = (
        "Left and middle: temporary memory of the compiled step, without parameters, gradients and optimizer state. "
        "Right: the median of interleaved rounds. A step is the gradient of all parameters; where blocks are updated "
        "at once it is the update, too."
    )
    return figures.write(config.out, drawn, title="Memory against depth", caption=caption, table=table(found))


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
    axes.set_title(title, color=figures.INK)
    axes.grid(axis="y")


def _times(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for i, one in enumerate(rows):
        axes.barh(-i, one["seconds"], color=COLORS[one["method"]])
        axes.annotate(f" {one['seconds']:.2f}, x {one['ratio']:.2f}", (one["seconds"], -i), va="center", fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(0, 1.45 * max(one["seconds"] for one in rows))


def table(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """MiB by method and depth, and the time of a step at one depth."""
    rows = []
    for name, measured in found.items():
        depths = sorted({one["depth"] for one in measured})
        rows.append([f"{name}: MiB at depth", *map(str, depths), "step", "quartiles", "device's peak"])
        for method in COLORS:
            own = {one["depth"]: one for one in measured if one["method"] == method}
            if own:
                cells = [f"{_mib(own[depth]):.1f}" for depth in depths]
                rows.append([method, *cells, *_timed(next(one for one in own.values() if "seconds" in one))])
    return rows


def _timed(one: dict[str, Any]) -> list[str]:
    peak = f"{one['peak'] / 2**20:.0f} MiB" if one["peak"] else "not counted here"
    step = f"{one['depth']}: {one['seconds']:.2f} s, x {one['ratio']:.2f}"
    return [step, f"{one['low']:.2f}-{one['high']:.2f}", peak]


def _mib(one: dict[str, Any]) -> float:
    return one["temporary"] / 2**20
