"""Memory and time of a step against depth: backpropagation and rematerialisation, direct feedback stored and streamed.

Claim: direct feedback needs no activations kept (Nokland 2016). ``jaxfa.direct_stack`` keeps none of a stack of equal
blocks, ``jaxfa.nn.attach`` none of any model of blocks if it streams: memory then does not grow with depth.
Where ``jaxfa.update_stack`` updates each block at once, it does not even with the gradients included.

Command: ``python -m experiments run memory``

Verdict: holds. Streamed memory is flat, in the stack of equal blocks and in the ResNet. Stored, direct feedback keeps
what backpropagation does. A streamed step took less time than backpropagation's, since no error passes between blocks,
in a process that gave its memory back after each step; ``steps`` tells of one that keeps it, in which what is never
allocated saves no time.

Memory is what the compiled program allocates beside its inputs and outputs (``memory_analysis``), so that parameters,
their gradients and the optimizer's state are not in it. A step is the gradient of all parameters; the fused one also
updates them. The stack: ``h + relu(h w + b)``, the block for which backpropagation has least to keep. The time is the
median of interleaved rounds.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks import memory_steps
from experiments.benchmarks.memory_steps import FUSED, METHODS, REFERENCE, STREAMED, Config, Steps
from experiments.common import plots, records, timing
from experiments.common.experiment import Experiment, Histories, Page, Study, Table

Measurement = dict[str, Any]
COLORS = dict(
    zip(METHODS, (plots.INK, plots.GREY, plots.PURPLE, plots.VERMILLION, plots.BLUE, plots.GREEN), strict=True)
)


def study(config: Config, histories: Histories) -> Study:
    """Measures what is missing; memory against depth, and the time of a step."""
    del histories
    path = config.out / "memory.json"
    if not path.exists():
        records.write_json(path, measure(config))
    found = records.read_json(path)
    blocks = f"blocks of width {config.width}, batch {config.batch}"
    images = f"ResNet, {config.images} images of {config.pixels} pixels"
    drawn = Figure(figsize=(7.6, 4.1), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(1.25, 1))
    _draw(left, found["stack"], blocks, "blocks")
    _draw(right, found["resnet"], images, "layers")
    plots.legend_below(drawn, 3)
    caption = (
        "Temporary memory of the compiled step, without parameters, gradients and optimizer state. A step is the "
        "gradient of all parameters; where blocks are updated at once it is the update, too."
    )
    times = [row for name, rows in found.items() for row in time_rows(name, rows)]
    head = ["method, depth", "milliseconds", "backpropagation = 1", "quartiles"]
    tables = [
        Table(f"MiB, {blocks}", memory_table(found["stack"])),
        Table(f"MiB, {images}", memory_table(found["resnet"])),
        Table("Time of a step", [head, *times]),
    ]
    return Study(drawn, caption, tables, findings(found["stack"]), found)


def measure(config: Config) -> dict[str, list[Measurement]]:
    """Memory of every method at every depth, and the time at one: of the stack and of the ResNet."""
    return {
        "stack": _each(config, memory_steps.stack, {n: n for n in config.depths}, config.timed),
        "resnet": _each(config, memory_steps.resnet, {n: 6 * n + 2 for n in config.repeats}, config.timed_repeats),
    }


def _each(config: Config, make: Callable[..., Steps], depths: dict[int, int], timed: int) -> list[Measurement]:
    rounds = {size: config.rounds if size == timed else 0 for size in depths}
    return [row for size, depth in depths.items() for row in _measure(depth, make(config, size), rounds[size])]


def _measure(depth: int, made: Steps, rounds: int) -> list[Measurement]:
    steps = {name: (step.lower(*args).compile(), args) for name, (step, args) in made.items()}
    runs = {name: partial(_time, *step) for name, step in steps.items()}
    times = timing.interleaved(runs, rounds, REFERENCE) if rounds else {}
    return [
        {"method": name, "depth": depth, "temporary": step.memory_analysis().temp_size_in_bytes} | times.get(name, {})
        for name, (step, _) in steps.items()
    ]


def _time(step: Any, args: Any) -> float:
    """Seconds of a step, after another of its own: not after another method's 800 MiB, with its caches and pages."""
    jax.block_until_ready(step(*args))
    started = time.perf_counter()
    jax.block_until_ready(step(*args))
    return time.perf_counter() - started


def findings(stack: list[Measurement]) -> list[tuple[str, str]]:
    """What came of it: pairs of a figure and the sentence that it begins."""
    deepest = max(one["depth"] for one in stack)
    at = {one["method"]: _mib(one) for one in stack if one["depth"] == deepest}
    least = {_mib(one) for one in stack if one["method"] == STREAMED}
    (ratio,) = (one["ratio"] for one in stack if one["method"] == STREAMED and "ratio" in one)
    return [
        (f"{at[REFERENCE] / at[STREAMED]:.0f}x", f"less memory than backpropagation's at {deepest} blocks, streamed."),
        (f"{max(least) / min(least):.2f}x", "is what streamed memory grows by from the least depth to the largest."),
        (f"{ratio:.2f}x", "backpropagation's time of a step, streamed."),
    ]


def _draw(axes: Axes, rows: list[Measurement], title: str, counted: str) -> None:
    for method, color in COLORS.items():
        chosen = {one["depth"]: _mib(one) for one in rows if one["method"] == method}
        if chosen:
            line = "o--" if method == FUSED else "o-"
            axes.plot([*chosen], [*chosen.values()], line, color=color, markersize=3, label=method)
    plots.log_axis(axes, sorted({one["depth"] for one in rows}), xlabel=counted, ylabel="MiB", title=title)
    plots.log_values(axes)


def memory_table(measured: list[Measurement]) -> list[list[str]]:
    """MiB by method and depth."""
    depths = sorted({one["depth"] for one in measured})
    rows = [["method, depth", *map(str, depths)]]
    for method in COLORS:
        own = {one["depth"]: one for one in measured if one["method"] == method}
        if own:
            rows.append([method, *(f"{_mib(own[depth]):.1f}" for depth in depths)])
    return rows


def time_rows(name: str, rows: list[Measurement]) -> list[list[str]]:
    """The time of a step of each method that was timed."""
    return [
        [
            f"{name} {one['depth']}, {one['method']}",
            f"{one['milliseconds']:.0f}",
            f"{one['ratio']:.2f}",
            f"{one['low']:.2f} to {one['high']:.2f}",
        ]
        for one in rows
        if "ratio" in one
    ]


def _mib(one: Measurement) -> float:
    return one["temporary"] / 2**20


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(), "large": Config(depths=(4, 16, 64, 256, 1024), width=1024, repeats=(1, 3, 9, 18), images=1024)},
    Page("Does memory have to grow with depth?"),
    study=study,
)
