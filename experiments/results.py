"""A sweep's results as data: what was run, on what, and what came of every arm, in one JSON file to be committed."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments import records
from experiments.metrics import METRICS, Metric

FOLDER = Path(__file__).parent / "results"


def write(folder: Path, name: str) -> Path:
    """Writes ``experiments/results/NAME.json`` from the arms that a folder holds.

    Args:
      folder: what a sweep filled.
      name: the experiment's and the preset's.

    Returns:
      The path of the file.
    """
    sweep, starts = records.read_json(folder / "sweep.json"), records.read_json(folder / "environment.json")
    metric = METRICS[sweep.get("metric", "accuracy")]
    found = {
        "title": sweep["title"],
        "claim": sweep["claim"],
        "published": sweep["published"],
        "metric": metric.name,
        "config": records.read_json(folder / "config.json"),
        "runs": starts,
        "cut": records.read_json(folder / "cut.json") if (folder / "cut.json").exists() else [],
        "arms": {arm["name"]: _arm(arm, records.read(folder / arm["name"]), metric) for arm in sweep["arms"]},
    }
    FOLDER.mkdir(exist_ok=True)
    records.write_json(FOLDER / f"{name}.json", found)
    return FOLDER / f"{name}.json"


def _arm(arm: dict[str, Any], history: list[dict[str, Any]], metric: Metric) -> dict[str, Any]:
    known = {"title": arm["group"], "published": arm["published"], "epochs": max(0, len(history) - 1)}
    if len(history) < 2:
        return known
    values = metric.values(history)
    return known | {
        "last": _spread(values[-1]),
        "best": _spread(values[1:].max(0) if metric.sign > 0 else values[1:].min(0)),
        "seconds": sum(record["seconds"] for record in history),
        "angle": _mean(history[-1]["angle"]),
        "course": [[record["epoch"], *np.round(row, 2).tolist(), _mean(record["angle"])]
                   for record, row in zip(history, values, strict=True)],
    }  # fmt: skip


def _spread(values: np.ndarray) -> dict[str, Any]:
    """Every seed's value, their mean, and their standard deviation where there are several."""
    std = round(float(values.std(ddof=1)), 3) if len(values) > 1 else None
    return {"seeds": np.round(values, 3).tolist(), "mean": round(float(values.mean()), 3), "std": std}


def _mean(angles: dict[str, list[float | None]]) -> float | None:
    """The mean angle in degrees of all layers but the last, whose update is the true one."""
    values = np.array(list(angles.values())[:-1], dtype=float)
    return round(float(np.nanmean(values)), 2) if np.isfinite(values).any() else None
