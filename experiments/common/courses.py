"""Every arm of a sweep over training: a panel with its metric, and one with the angle of each part of the network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import plots, records
from experiments.common.metrics import Metric

_ROOM = 1.5


def panels(folder: Path, rows: Sequence[Any], metric: Metric) -> list[tuple[Any, dict[str, str]]]:
    """Draws every arm.

    Args:
      folder: what a sweep filled.
      rows: what its report says of its arms.
      metric: what to show.

    Returns:
      For each row the row and two ``<svg>`` elements, ``metric`` and ``angle``; the latter is empty for arms of
      backpropagation, whose angles are none.
    """
    histories = {row.name: records.read(folder / row.name) for row in rows}
    parts = {name: by_part(history) for name, history in histories.items()}
    top = max(100.0, *(np.nanmax([*_angles(found), 0.0]) + 5 for found in parts.values()))
    limits = _limits(list(histories.values()), metric)
    drawn = []
    for row in rows:
        history, reference = histories[row.name], records.read(folder / row.reference) or histories[row.name]
        # Comparisons with NaN are false: before the first step a feedback of zeros has no angle.
        turned = any(angle > 1 for angle in _angles(parts[row.name]))
        angle = plots.angles(parts[row.name], top) if turned else ""
        drawn.append((row, {"metric": plots.course(history, reference, row.color, metric, limits), "angle": angle}))
    return drawn


def by_part(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records whose angles are means over the layers of a part: over ``blocks/0`` for ``blocks/0/attention/query``."""

    def mean(angles: dict[str, Any]) -> dict[str, Any]:
        parts: dict[str, list[Any]] = {}
        for layer, angle in angles.items():
            parts.setdefault(part_of(layer), []).append(angle)
        return {part: np.array(found, dtype=float).mean(0).tolist() for part, found in parts.items()}

    return [record | {"angle": mean(record["angle"])} for record in history]


def part_of(layer: str) -> str:
    """A layer's path up to its first number; all of it if it has none."""
    names = layer.split("/")
    first = next((i for i, name in enumerate(names) if name.isdigit()), len(names))
    return "/".join(names[: first + 1])


def _angles(history: Sequence[dict[str, Any]]) -> list[float]:
    return [angle for record in history for angles in record["angle"].values() for angle in angles]


def _limits(histories: Sequence[Sequence[dict[str, Any]]], metric: Metric) -> tuple[float, float]:
    """From the best value to a little beyond the worst arm's end: where training begins may be far off."""
    values = [metric.values(history).mean(1) for history in histories]
    if metric.sign > 0:
        return 0.0, max(float(found.max()) for found in values)
    return min(float(found.min()) for found in values) / 1.1, _ROOM * max(float(found[-1]) for found in values)
