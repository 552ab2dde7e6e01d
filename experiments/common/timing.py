"""The time of a training step, measured so that a noisy machine disturbs all methods alike."""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.common import records
from experiments.common.trainer import Trainer

_ROUNDS = 15
_ROUND_SECONDS = 0.1


def measure(trainers: Mapping[str, Trainer], path: Path, *, reference: str) -> dict[str, Any]:
    """Times every trainer's steps in interleaved rounds, after compilation; keeps what an earlier run measured.

    Args:
      trainers: compiled tasks by name.
      path: the JSON file of the results.
      reference: the name that the ratios refer to.

    Returns:
      For each name ``milliseconds``, the median over the rounds, and ``ratio``, the median over the rounds of the ratio
      to the reference's time in the same round, with its quartiles ``low`` and ``high``.
    """
    if path.exists() and set(trainers) <= set(records.read_json(path)["steps"]):
        return records.read_json(path)
    seconds = _rounds(trainers, reference)
    steps = {}
    for name, times in seconds.items():
        ratios = [own / theirs for own, theirs in zip(times, seconds[reference], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4) if name != reference else (1.0, 1.0, 1.0)
        steps[name] = {"milliseconds": 1e3 * statistics.median(times), "ratio": ratio, "low": low, "high": high}
    result = {"reference": reference, "rounds": _ROUNDS, "steps": steps, "environment": records.environment()}
    records.write_json(path, result)
    return result


def _rounds(trainers: Mapping[str, Trainer], reference: str) -> dict[str, list[float]]:
    """Seconds per step of each trainer in each round."""
    states = {name: trainer.init() for name, trainer in trainers.items()}
    # Shuffling is an epoch's affair, and on a large data set would cost more than the few steps of a round.
    orders = {name: jax.block_until_ready(trainer.shuffle(states[name])) for name, trainer in trainers.items()}

    def run(name: str, count: int) -> float:
        started = time.perf_counter()
        states[name], losses = trainers[name].advance(states[name], orders[name], count)
        jax.block_until_ready((states[name], losses))
        return (time.perf_counter() - started) / count

    def warm(name: str, count: int) -> float:
        run(name, count)
        return run(name, count)

    count = round(_ROUND_SECONDS / warm(reference, 1))
    count = max(1, min(count, trainers[reference].steps))
    for name in trainers:
        warm(name, count)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(_ROUNDS):
        for name in trainers:
            seconds[name].append(run(name, count))
    return seconds
