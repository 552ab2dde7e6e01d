"""Memory and time of a step against depth: backpropagation and rematerialisation, direct feedback stored and streamed.

Claim: direct feedback needs no activations kept (Nokland 2016). ``jaxfa.direct_stack`` keeps none of a stack of equal
blocks, ``jaxfa.nn.attach`` none of any model of blocks if it streams: memory then does not grow with depth.
Where ``jaxfa.update_stack`` updates each block at once, it does not even with the gradients included.

Command: ``python -m experiments run memory``

Memory is what the compiled program allocates beside its inputs and outputs (``memory_analysis``), so that parameters,
their gradients and the optimizer's state are not in it; where the device counts, its peak is there, too. A step is the
gradient of all parameters; the fused one also updates them. The stack: ``h + relu(h w + b)``, the block for which
backpropagation has least to keep. The time is the median of interleaved rounds.
"""

import time
from functools import partial
from typing import Any

import jax

from experiments.benchmarks import memory_figure, memory_steps
from experiments.benchmarks.memory_steps import Config
from experiments.common import records, timing
from experiments.common.experiment import Experiment, Histories, Page, Study

Measurement = dict[str, Any]


def study(config: Config, histories: Histories) -> Study:
    """Measures what is missing."""
    del histories
    path = config.out / "memory.json"
    if not path.exists():
        records.write_json(path, {"stack": stack(config), "resnet": resnet(config)})
    return memory_figure.study(config, records.read_json(path))


def stack(config: Config) -> list[Measurement]:
    """Memory of every method at every depth, and the time at one."""
    return [
        row
        for depth in config.depths
        for row in _measure(depth, memory_steps.stack(config, depth), config.rounds if depth == config.timed else 0)
    ]


def resnet(config: Config) -> list[Measurement]:
    """The same of ResNets."""
    return [
        row
        for repeats in config.repeats
        for row in _measure(
            6 * repeats + 2,
            memory_steps.resnet(config, repeats),
            config.rounds if repeats == config.timed_repeats else 0,
        )
    ]


def _measure(depth: int, made: memory_steps.Steps, rounds: int) -> list[Measurement]:
    steps = {name: (step.lower(*args).compile(), args) for name, (step, args) in made.items()}
    rows: dict[str, Measurement] = {name: {"method": name, "depth": depth} for name in steps}
    for name, (step, _) in steps.items():
        rows[name]["temporary"] = step.memory_analysis().temp_size_in_bytes
    if rounds:
        for name in sorted(steps, key=lambda name: rows[name]["temporary"]):
            rows[name]["peak"] = _peak(*steps[name])
        runs = {name: partial(_time, *step) for name, step in steps.items()}
        for name, times in timing.interleaved(runs, rounds, memory_steps.REFERENCE).items():
            rows[name] |= times
    return list(rows.values())


def _peak(step: Any, args: Any) -> int | None:
    """The device's peak since the process began: from the smallest program to the largest it is each one's own."""
    jax.block_until_ready(step(*args))
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _time(step: Any, args: Any) -> float:
    """Seconds of a step, after another of its own: not after another method's 800 MiB, with its caches and pages."""
    jax.block_until_ready(step(*args))
    started = time.perf_counter()
    jax.block_until_ready(step(*args))
    return time.perf_counter() - started


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(),
        "paper": Config(depths=(4, 16, 64, 256, 1024), width=1024, repeats=(1, 3, 9, 18), images=1024),
    },
    Page(
        "Does memory have to grow with depth?",
        "Direct feedback needs no activations kept. Here it keeps none: memory and time of a training step against "
        "depth, beside backpropagation with and without rematerialisation.",
    ),
    study=study,
)
