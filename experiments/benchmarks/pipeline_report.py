"""The figure and the table of ``pipeline``."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks.pipeline_model import METHODS
from experiments.common import figures

COLORS = dict(zip(METHODS, (figures.GREY, figures.INK, figures.BLUE, figures.GREEN), strict=True))


def write(config: Any, counts: list[dict[str, Any]], times: dict[str, Any]) -> Path:
    """Draws bytes, memory and bubbles against the number of stages, and the measured speed-up; writes the table.

    Args:
      config: the configuration.
      counts: of each arm at each point.
      times: of each arm that was timed.

    Returns:
      The path of the page.
    """
    with figures.style():
        drawn = Figure(figsize=(10.4, 3.2), layout="constrained")
        sent, kept, bubble, speed = drawn.subplots(1, 4)
        _lines(
            sent, config, counts, lambda one: sum(one["sent"].values()) / 1e6, lambda one: one["model"]["sent"] / 1e6
        )
        _lines(kept, config, counts, lambda one: one["kept"] / 2**20, lambda one: one["model"]["kept"] / 2**20)
        _lines(bubble, config, counts, lambda one: one["model"]["bubble"], None)
        for axes, title in ((sent, "sent in a step (MB)"), (kept, "temporaries per device (MiB)"), (bubble, "bubble")):
            axes.set_title(title, color=figures.INK)
            axes.set_xlabel(f"stages S, M = {config.microbatches[0]}")
        for axes in (sent, kept):
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        bubble.set_ylim(bottom=0)
        _speedups(speed, times)
        handles, labels = sent.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    caption = (
        "Lines: read off the compiled programs (the bubble: from ticks). Crosses: the model. Right: speed-up of two "
        "cores over one, median and quartiles over rounds; the bar's outline is the critical path's bound."
    )
    table = _table(counts, times)
    return figures.write(config.out, drawn, title="Layers on several devices", caption=caption, table=table)


def _lines(axes: Axes, config: Any, counts: list[dict[str, Any]], value: Any, model: Any) -> None:
    first = config.microbatches[0]
    for arm, color in COLORS.items():
        chosen = {one["stages"]: one for one in counts if (one["arm"], one["microbatches"]) == (arm, first)}
        stages = sorted(config.stages)
        style = "--" if METHODS[arm].again else "-"
        axes.plot(stages, [value(chosen[s]) for s in stages], style, color=color, label=arm)
        if model:
            axes.plot(stages, [model(chosen[s]) for s in stages], "x", color=color, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(stages, [str(s) for s in stages])


def _speedups(axes: Axes, times: dict[str, Any]) -> None:
    axes.set_title("speed-up, two cores", color=figures.INK)
    for i, (arm, one) in enumerate(times.items()):
        low, high = one["quartiles"]
        axes.bar(i, one["bound"], color="none", edgecolor=COLORS[arm], linewidth=1)
        axes.bar(i, one["speedup"], color=COLORS[arm])
        axes.plot([i, i], [low, high], color=figures.VERMILLION, linewidth=1.2)
    axes.set_xticks(range(len(times)), [arm.replace(", ", "\n") for arm in times], fontsize=7)


def _table(counts: list[dict[str, Any]], times: dict[str, Any]) -> list[list[str]]:
    table = [["method", "S", "M", "ticks", "bubble", "MB sent", "model", "MiB kept", "model"]]
    for one in counts:
        model, sent = one["model"], sum(one["sent"].values())
        sizes = (
            f"{sent / 1e6:.1f}",
            f"{model['sent'] / 1e6:.1f}",
            f"{one['kept'] / 2**20:.0f}",
            f"{model['kept'] / 2**20:.0f}",
        )
        point = str(one["stages"]), str(one["microbatches"]), str(model["ticks"]), f"{model['bubble']:.3f}"
        table.append([one["arm"], *point, *sizes])
    for arm, one in times.items():
        ms, cores = one["milliseconds"], one["cores"]
        low, high = one["quartiles"]
        cells = f"{ms['1']:.0f} ms, cores {cores['1']:.2f}", f"{ms['2']:.0f} ms, cores {cores['2']:.2f}"
        ends = (
            f"{one['speedup']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"fastest {one['fastest']:.2f}",
            f"bound {one['bound']:.2f}",
        )
        table.append([f"{arm}: two cores over one", *cells, *ends, "", ""])
    return table
