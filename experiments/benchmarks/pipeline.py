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
bubbles were lost. ``cores`` is CPU time by wall time: below 1 on one core, others were using it, too.

Counted with the preset ``cpu`` (64 layers of 256 units, 8192 examples, M = 32; jax 0.10.2; compiling takes a minute or
three); MB sent in a step by all devices, MiB of temporaries per device, part of the time in which a stage waits:

===============================  ================  ================  ================  ================
.                                S = 2             S = 8             S = 32            S = 64
===============================  ================  ================  ================  ================
backpropagation                  17, 366, .03      143, 126, .18     1025, 72, .49     3139, 70, .66
backpropagation, rematerialised  17, 44, .03       143, 32, .18      1025, 48, .49     3139, 64, .66
direct, parallel                 13, 363, .02      81, 117, .10      531, 55, .33      1599, 26, .50
direct, stream                   13, 40, .01       81, 34, .07       531, 33, .24      1599, 32, .40
===============================  ================  ================  ================  ================

The model's bytes are the programs' to the last one, its memory within 15 % (the leading terms alone). What is left of
the bubble is the forward pass's; backpropagation's is as large forward and backward. Bytes are .51 to .77 of
backpropagation's: at S = 2 dealing out the head's inputs weighs most. The bubbles, too, send messages, of which the
counts hold all. Autodiff of a scan keeps what its bubbles compute, so that GPipe's memory grows with S; a schedule of
its own would not have to. The preset ``paper`` has not been run, nor anything on more than one machine.

A step on two cores that nothing else used (``S = 2``, 8 layers of 512 units, 4096 examples, M = 8), median and
quartiles of the rounds' speed-up over one core, and its bound:

=================  ==========  ==========  ================  =====
.                  one core    two cores   speed-up          bound
=================  ==========  ==========  ================  =====
backpropagation    459 ms      325 ms      1.38 (1.31-1.44)  1.78
direct, parallel   415 ms      244 ms      1.79 (1.40-2.01)  1.88
direct, stream     404 ms      231 ms      1.67 (1.56-1.83)  1.92
=================  ==========  ==========  ================  =====
"""

import contextlib
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from rich.progress import track

from experiments.benchmarks import pipeline_report, pipeline_worker
from experiments.benchmarks.pipeline_model import METHODS, cost
from experiments.benchmarks.pipeline_steps import Network
from experiments.common import records

ARMS = ("backpropagation", "direct, parallel", "direct, stream")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
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
    rounds: int = 15
    """How many rounds of timing there are; 0 leaves timing out."""
    out: Path = Path("runs/pipeline")
    """The folder of the results."""
    fresh: bool = False
    """The results in the folder are deleted first."""

    def __post_init__(self) -> None:
        records.refuse_below_one(self, "layers", "width", "outputs", "examples", "timed_layers", "steps")
        if any(self.layers % stages for stages in self.stages):
            raise ValueError(f"stages must divide the {self.layers} layers, got {self.stages}.")

    def unread(self) -> tuple[str, ...]:
        """Without rounds nothing is timed."""
        timed = (field.name for field in dataclasses.fields(self) if field.name.startswith("timed_"))
        return () if self.rounds else (*timed, "steps")


PRESETS = {
    "cpu": Config(),
    "paper": Config(
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
        out=Path("runs/pipeline-paper"),
    ),
}


def run(config: Config) -> Path:
    """Counts and times; keeps what an earlier run of the same configuration found.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.
    """
    records.open_run(config.out, records.identity("pipeline", config, ("out", "fresh")), fresh=config.fresh)
    counts = _kept(config.out / "counts.json", lambda: _count(config))
    times = _kept(config.out / "times.json", lambda: _time(config)) if config.rounds else {}
    return pipeline_report.write(config, counts, times)


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
    task = {"network": network._asdict(), "points": points(config)}
    total = len(points(config)) * len(METHODS)
    found = []
    for one in track(pipeline_worker.count(task), "counting", total):
        expected = cost(METHODS[one["arm"]], one["stages"], one["microbatches"], network)
        found.append(one | {"model": expected._asdict()})
    return found


def _time(config: Config) -> dict[str, Any]:
    network = Network(config.timed_layers, config.timed_width, config.outputs, config.timed_examples)
    task = {"network": network._asdict(), "microbatches": config.timed_microbatches, "steps": config.steps}
    with contextlib.ExitStack() as stack:
        runs = {
            (arm, cores): stack.enter_context(pipeline_worker.timed(task | {"arm": arm}, cores))
            for arm in ARMS
            for cores in (1, 2)
        }
        for one in runs.values():
            one()
        rounds = [{which: one() for which, one in runs.items()} for _ in track(range(config.rounds), "timing")]
    return {arm: _summary(arm, rounds, config.timed_microbatches, network) for arm in ARMS}


def _summary(arm: str, rounds: list[Any], microbatches: int, network: Network) -> dict[str, Any]:
    seconds = {cores: [one[arm, cores][0] for one in rounds] for cores in (1, 2)}
    ratios = [alone / both for alone, both in zip(seconds[1], seconds[2], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "milliseconds": {cores: 1e3 * statistics.median(times) for cores, times in seconds.items()},
        "cores": {
            cores: statistics.median(one[arm, cores][1] / one[arm, cores][0] for one in rounds) for cores in (1, 2)
        },
        "speedup": middle,
        "quartiles": [low, high],
        "fastest": min(seconds[1]) / min(seconds[2]),
        "bound": cost(METHODS[arm], 2, microbatches, network).speedup,
    }
