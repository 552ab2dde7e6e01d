"""Memory and time of a step against depth: backpropagation and rematerialisation, direct feedback stored and streamed.

Claim: direct feedback needs no activations kept (Nokland 2016). ``jaxfa.direct_stack`` keeps none of a stack of equal
blocks, ``jaxfa.nn.attach`` none of any model of blocks if it streams: memory then does not grow with depth.
Where ``jaxfa.update_stack`` updates each block at once, it does not even with the gradients included.

Command: ``python -m experiments run memory``

Memory is what the compiled program allocates beside its inputs and outputs (``memory_analysis``), so that parameters,
their gradients and the optimizer's state are not in it; where the device counts, its peak is there, too. A step is the
gradient of all parameters; the fused one also updates them. The stack: ``h + relu(h w + b)``, the block for which
backpropagation has least to keep. The time is the median of interleaved rounds.

Measured with the preset ``cpu`` on two cores (jax 0.10.2), in 3 min: MiB, and a step's time as a multiple of
backpropagation's with the quartiles of 9 rounds:

=================================  =====  =====  ======  ==================  =====  =====  ==================
.                                  4      64     256     time, 64 blocks     RN-8   RN-32  time, ResNet-20
=================================  =====  =====  ======  ==================  =====  =====  ==================
backpropagation                    36.1   336.1  1296.1  1                   127.5  461.6  1
backpropagation, rematerialised    32.1   272.1  1040.1  1.00 (.90-1.10)
DFA, stored                        32.1   332.1  1292.1  .87 (.71-1.06)      155.5  563.5  .88 (.73-.92)
DFA, parallel                      52.0   832.0  3328.0  1.93 (1.47-2.21)
DFA, streamed                      16.3   16.3   16.3    .62 (.54-.71)       74.5   79.0   .76 (.68-.79)
DFA, streamed, updated at once     16.3   16.3   16.3    .58 (.54-.85)
=================================  =====  =====  ======  ==================  =====  =====  ==================

So streamed memory is flat, and at 64 blocks 20.6 and 16.7 times less than backpropagation's two forms; a step takes
less than .75 of backpropagation's time. ``--depths 64 --repeats 1 --timed-repeats 1 --rounds 25`` right after gave .55
(.49-.62), updated at once .58 (.49-.64), and the whole command once more the same memory, .55 (.44-.84) and .56
(.43-.65); before each method was warmed up in every round, three runs on busier cores had given .68, .77 and .78. The
ResNet's memory grows by its parameters' copies. All blocks in parallel are slow on two cores, which cannot use it, and
their errors side by side take memory. The preset ``paper`` has not been run, nor anything on a GPU, and so no peak.
"""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks import memory_figure, memory_steps
from experiments.common import records

Measurement = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The networks, and where the results go."""

    depths: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    """Numbers of blocks at which the stack is measured."""
    timed: int = 64
    """The depth at which the stack's steps are timed, one of --depths."""
    width: int = 128
    """How many units a block of the stack has."""
    batch: int = 8192
    """How many examples a step of the stack has."""
    repeats: tuple[int, ...] = (1, 3, 5)
    """Numbers of blocks in each of a ResNet's three stages; 3 is ResNet-20."""
    timed_repeats: int = 3
    """The ResNet whose steps are timed, one of --repeats."""
    images: int = 128
    """How many images a step of the ResNet has."""
    pixels: int = 32
    """The width and height of the ResNet's images."""
    rounds: int = 9
    """How many rounds of timing there are."""
    seed: int = 0
    """The seed of all that is random."""
    out: Path = Path("runs/memory")
    """The folder of the results; a finished measurement is kept."""
    fresh: bool = False
    """The results in the folder are deleted first."""


PRESETS = {
    "cpu": Config(),
    "paper": Config(
        depths=(4, 16, 64, 256, 1024), width=1024, repeats=(1, 3, 9, 18), images=1024, out=Path("runs/memory-paper")
    ),
}


def run(config: Config) -> Path:
    """Measures what is missing, draws the figure, prints the table.

    Returns:
      The path of the report.

    Raises:
      ValueError: if the folder holds another configuration, or what is to be timed is none of the networks.
    """
    for name, one, all_ in (
        ("timed", config.timed, config.depths),
        ("timed_repeats", config.timed_repeats, config.repeats),
    ):
        if one not in all_:
            raise ValueError(f"{name} must be one of {all_}, got {one}.")
    records.open_run(config.out, records.identity("memory", config, ("out", "fresh")), fresh=config.fresh)
    path = config.out / "memory.json"
    if not path.exists():
        records.write_json(path, {"stack": stack(config), "resnet": resnet(config)})
    return memory_figure.write(config, records.read_json(path))


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
        for name, times in _times(steps, rounds).items():
            rows[name] |= times
    return list(rows.values())


def _peak(step: Any, args: Any) -> int | None:
    """The device's peak since the process began: from the smallest program to the largest it is each one's own."""
    jax.block_until_ready(step(*args))
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _times(steps: dict[str, tuple[Any, Any]], rounds: int) -> dict[str, Measurement]:
    """Seconds of a step, and the ratio to backpropagation's in the same round with its quartiles."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (step, args) in steps.items():
            jax.block_until_ready(step(*args))  # not after another method's 800 MiB: caches and pages are its own
            started = time.perf_counter()
            jax.block_until_ready(step(*args))
            seconds[name].append(time.perf_counter() - started)
    bases = seconds[memory_steps.REFERENCE]
    times = {}
    for name, own in seconds.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(own, bases, strict=True)], n=4)
        times[name] = {"seconds": statistics.median(own), "ratio": middle, "low": low, "high": high}
    return times
