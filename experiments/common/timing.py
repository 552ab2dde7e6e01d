"""The time of a training step, measured so that a noisy machine disturbs all methods alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from experiments.common import records
from experiments.common.trainer import Trainer

_ROUNDS = 15
_ROUND_SECONDS = 0.05


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int, reference: str) -> dict[str, dict[str, float]]:
    """Times several things in rounds that take turns between them.

    Args:
      runs: what each does once, and returns the seconds of.
      rounds: how many rounds there are, two or more.
      reference: the name that the ratios refer to.

    Returns:
      For each name ``milliseconds``, the median over the rounds, and ``ratio``, the median over the rounds of the ratio
      to the reference's time in the same round, with its quartiles ``low`` and ``high``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    found = {}
    for name, times in seconds.items():
        ratios = [own / theirs for own, theirs in zip(times, seconds[reference], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4) if name != reference else (1.0, 1.0, 1.0)
        found[name] = {"milliseconds": 1e3 * statistics.median(times), "ratio": ratio, "low": low, "high": high}
    return found


def measure(trainers: Mapping[str, Trainer], path: Path, *, reference: str) -> dict[str, Any]:
    """Times every trainer's steps in interleaved rounds, after compilation; keeps what an earlier run measured.

    Args:
      trainers: compiled tasks by name.
      path: the JSON file of the results.
      reference: the name that the ratios refer to.

    Returns:
      ``steps``, what :func:`interleaved` found, and where.
    """
    if path.exists() and set(trainers) <= set(records.read_json(path)["steps"]):
        return records.read_json(path)
    steps = interleaved(_steps(trainers, reference), _ROUNDS, reference)
    result = {"reference": reference, "rounds": _ROUNDS, "steps": steps, "environment": records.environment()}
    records.write_json(path, result)
    return result


def _steps(trainers: Mapping[str, Trainer], reference: str) -> dict[str, Callable[[], float]]:
    """What takes some steps of each trainer and returns the seconds of one, warmed up."""
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
    return {name: partial(run, name, count) for name in trainers}
