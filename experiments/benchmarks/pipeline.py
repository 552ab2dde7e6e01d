"""Pipelines: what layers on several devices cost, with the error broadcast to all and with the error sent back.

Claim (ours; the update unlocking of Nokland 2016, which nobody has shipped): direct feedback has no backward bubble,
since all stages learn at once, and sends about half of the bytes of GPipe's pipeline (Huang et al. 2019).

Command: ``python -m experiments run pipeline``; times again, on cores that nothing else uses, with ``--fresh``.

One stack of residual layers ``h + relu(h w)``. For ``S`` stages and ``M`` microbatches the step is compiled, for forced
CPU devices, and its program read: the bytes that its collectives send, loops counted by their turns, and the bytes of
temporaries per device (XLA's, weights aside). Beside them stands what ``pipeline_model`` expects. Four
pipelines: backpropagation as autodiff has it; rematerialised, as in GPipe's paper; direct feedback with what the
derivatives need kept (``parallel``); and with a second sweep from each stage's inputs (``stream``).

Then steps are timed for ``S = 2``: two CPU devices on two cores, against the same method on one core, each process
bound to its cores and the rounds interleaved. The bound of the speed-up is the critical path's, if nothing but the
bubbles were lost.

Verdict: holds. Direct feedback's pipeline sends three quarters of backpropagation's bytes with two stages, where
dealing out the head's inputs weighs most, and half with many; what is left of its bubble is the forward pass's, and on
two cores it comes nearer to its bound than backpropagation's to its own. The model's bytes are the programs' to the
last one, and its memory is close. Nothing was run on more than one machine.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from matplotlib.axes import Axes
from rich.progress import track

from experiments.benchmarks import pipeline_worker
from experiments.benchmarks.pipeline_model import METHODS, cost
from experiments.benchmarks.pipeline_steps import BASES, Network
from experiments.common import plots, records, timing
from experiments.common.bounds import Bound
from experiments.common.experiment import Experiment, Histories, Options, Page, Study, Table

ROUNDS = Bound("0, which leaves timing out, or at least 2", lambda rounds: rounds == 0 or rounds > 1)
COLORS = dict(zip(METHODS, (plots.GREY, plots.INK, plots.BLUE, plots.GREEN), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """The stack, the pipelines that are counted, and the one that is timed."""

    layers: int = 64
    """How many layers the stack has whose programs are counted; every number of stages must divide it."""
    width: int = 256
    """How many units a layer of that stack has."""
    outputs: int = 10
    """How many classes there are."""
    examples: int = 8192
    """How many examples a batch of that stack has."""
    stages: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """Numbers of stages to count, with the first number of microbatches."""
    microbatches: tuple[int, ...] = (32, 8, 128)
    """Numbers of microbatches to count, with eight stages or else the most there are."""
    timed_layers: int = 8
    """How many layers the stack has that is timed, on two stages."""
    timed_width: int = 512
    """How many units a layer of the timed stack has."""
    timed_examples: int = 4096
    """How many examples a batch of the timed stack has."""
    timed_microbatches: int = 8
    """How many microbatches the timed stack takes a batch in."""
    steps: int = 2
    """How many steps a round of timing has."""
    rounds: Annotated[int, ROUNDS] = 15
    """How many rounds of timing there are; 0 leaves timing out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(self.layers % stages for stages in self.stages):
            raise ValueError(f"stages must divide the {self.layers} layers, got {self.stages}.")

    def unread(self) -> tuple[str, ...]:
        """Without rounds nothing is timed."""
        timed = (field.name for field in dataclasses.fields(self) if field.name.startswith("timed_"))
        return () if self.rounds else (*timed, "steps")


def study(config: Config, histories: Histories) -> Study:
    """Counts and times; keeps what an earlier run of the same configuration found."""
    del histories
    counts = _kept(config.out / "counts.json", lambda: _count(config))
    times = _kept(config.out / "times.json", lambda: _time(config)) if config.rounds else {}
    caption = "Lines: read off the compiled programs (the bubble: from ticks). Crosses: the model."
    tables = [Table("Counted", _counted(counts)), *([Table("Two cores over one", _timed(times))] if times else [])]
    numbers = {"counts": counts, "times": times}
    return Study(figure(config, counts), caption, tables, findings(config, counts, times), numbers)


def findings(config: Config, counts: list[dict[str, Any]], times: dict[str, Any]) -> list[tuple[str, str]]:
    """The bytes beside backpropagation's at the fewest stages and the most, and what a second core brings."""
    sent = {
        (one["arm"], one["stages"]): sum(one["sent"].values())
        for one in counts
        if one["microbatches"] == config.microbatches[0]
    }
    told = [
        (
            f"{sent['direct, parallel', stages] / sent['backpropagation', stages]:.2f}x",
            f"the bytes of backpropagation: what direct feedback's pipeline of {stages} stages sends.",
        )
        for stages in sorted({min(config.stages), max(config.stages)})
    ]
    return [
        *told,
        *((f"{one['one core']['ratio']:.2f}x", f"faster on two cores: {arm}.") for arm, one in times.items()),
    ]


def _kept(path: Path, make: Any) -> Any:
    if not path.exists():
        records.write_json(path, make())
    return records.read_json(path)


def points(config: Config) -> list[tuple[int, int]]:
    """The pairs ``(S, M)`` that are counted."""
    first, *others = config.microbatches
    fixed = 8 if 8 in config.stages else max(config.stages)
    return [(stages, first) for stages in config.stages] + [(fixed, microbatches) for microbatches in others]


def _count(config: Config) -> list[dict[str, Any]]:
    network = Network(config.layers, config.width, config.outputs, config.examples)
    found = []
    with pipeline_worker.process(
        pipeline_worker.count, network, points(config), devices=max(config.stages)
    ) as connection:
        for _ in track(range(len(points(config)) * len(METHODS)), "counting"):
            one = connection.recv()
            expected = cost(METHODS[one["arm"]], one["stages"], one["microbatches"], network)
            found.append(one | {"model": expected._asdict()})
    return found


def _time(config: Config) -> dict[str, Any]:
    network = Network(config.timed_layers, config.timed_width, config.outputs, config.timed_examples)
    return {arm: _speedup(config, network, arm) for arm in track(BASES, "timing")}


def _speedup(config: Config, network: Network, arm: str) -> dict[str, Any]:
    task = network, arm, config.timed_microbatches, config.steps
    process = partial(pipeline_worker.process, pipeline_worker.rounds, *task)
    with process(devices=1, cores=1) as alone, process(devices=2, cores=2) as both:
        runs = {"one core": partial(_round, alone), "two cores": partial(_round, both)}
        for run in runs.values():  # compiles
            run()
        times = timing.interleaved(runs, config.rounds, "two cores")
    return times | {"bound": cost(METHODS[arm], 2, config.timed_microbatches, network).speedup}


def _round(connection: Any) -> float:
    connection.send(True)
    return connection.recv()


def figure(config: Config, counts: list[dict[str, Any]]) -> Any:
    """Bytes, memory and bubbles against the number of stages."""
    drawn = plots.Figure(figsize=(9.4, 3.2), layout="constrained")
    sent, kept, bubble = drawn.subplots(1, 3)
    _lines(sent, config, counts, lambda one: sum(one["sent"].values()) / 1e6, lambda one: one["model"]["sent"] / 1e6)
    _lines(kept, config, counts, lambda one: one["kept"] / 2**20, lambda one: one["model"]["kept"] / 2**20)
    _lines(bubble, config, counts, lambda one: one["model"]["bubble"], None)
    for axes, title in ((sent, "sent in a step (MB)"), (kept, "temporaries per device (MiB)"), (bubble, "bubble")):
        plots.log_axis(axes, sorted(config.stages), title=title, xlabel=f"stages S, M = {config.microbatches[0]}")
    plots.log_values(sent)
    plots.log_values(kept)
    plots.legend_below(drawn, len(METHODS))
    return drawn


def _lines(
    axes: Axes, config: Config, counts: list[dict[str, Any]], value: Any, model: Callable[[Any], Any] | None
) -> None:
    stages = sorted(config.stages)
    for arm, color in COLORS.items():
        chosen = {
            one["stages"]: one for one in counts if (one["arm"], one["microbatches"]) == (arm, config.microbatches[0])
        }
        style = "--" if METHODS[arm].again else "-"
        axes.plot(stages, [value(chosen[s]) for s in stages], style, color=color, label=arm)
        if model:
            axes.plot(stages, [model(chosen[s]) for s in stages], "x", color=color, markersize=4)


def _counted(counts: list[dict[str, Any]]) -> list[list[str]]:
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
    return table


def _timed(times: dict[str, Any]) -> list[list[str]]:
    table = [["method", "one core", "two cores", "speed-up", "quartiles", "bound"]]
    for arm, one in times.items():
        alone, both = one["one core"], one["two cores"]
        row = [f"{alone['milliseconds']:.0f} ms", f"{both['milliseconds']:.0f} ms", f"{alone['ratio']:.2f}"]
        table.append([arm, *row, f"{alone['low']:.2f} to {alone['high']:.2f}", f"{one['bound']:.2f}"])
    return table


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(),
        "large": Config(
            layers=128,
            width=1024,
            examples=65536,
            stages=(2, 4, 8, 16, 32, 64, 128),
            microbatches=(128, 8, 16, 32, 64, 256, 512),
            timed_layers=16,
            timed_width=1024,
            timed_examples=16384,
            timed_microbatches=16,
            rounds=45,
        ),
    },
    Page("What do layers on several devices cost?"),
    study=study,
)
