"""A sweep's results as data: what was run, on what, and what came of every arm, in one JSON file to be committed.

``python -m experiments results`` makes ``docs/results.md`` of all such files.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import records
from experiments.common.metrics import METRICS, Metric

FOLDER = Path(__file__).parents[1]
PAGE = Path(__file__).parents[2] / "docs" / "results.md"
_HEAD = """# Results

Made by `python -m experiments results` from `experiments/*/results/*.json`; every file has each arm's course, seeds,
versions and commit. Accuracies are of the last epoch on all test images; published ones are the papers' own, under
hyper-parameters of their own.
"""


def write(folder: Path, name: str) -> Path:
    """Writes ``experiments/PAPER/results/NAME.json`` from the arms that a folder holds.

    Args:
      folder: what a sweep filled.
      name: ``PAPER/NAME``, such as ``grape/resnet20-gpu15``.

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
    paper, _, rest = name.rpartition("/")
    path = FOLDER / paper / "results" / f"{rest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(path, found)
    return path


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


def page() -> str:
    """Every result in words and tables, as Markdown."""
    return "\n".join([_HEAD, *(_section(records.read_json(path)) for path in sorted(FOLDER.glob("*/results/*.json")))])


def _section(found: dict[str, Any]) -> str:
    arms = [arm for arm in found["arms"].values() if "last" in arm]
    unit = METRICS[found["metric"]].unit.strip()
    lines = [
        f"## {found['title']}: {found['config']['epochs']} epochs\n",
        f"{found['claim']}\n",
        f"| | {found['metric']}, {unit} | best epoch | published | mean angle of hidden layers | epochs | seconds |",
        "|---|---|---|---|---|---|---|",
        *map(_line, arms),
        _origin(found),
        *(f"`python -m experiments {_command(start)}`" for start in found["runs"]),
        *found["cut"],
    ]
    return "\n".join(lines) + "\n"


def _origin(found: dict[str, Any]) -> str:
    first, day = found["runs"][0], found["runs"][0]["time"].split()[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("jax", "flax", "optax"))
    return (
        f"\nPublished: {found['published']}. Seeds: {found['config']['seeds']}. {first['device']}, {versions}, commit "
        f"{first['commit']}, {day}:"
    )


def _command(start: dict[str, Any]) -> str:
    """What was run, without where its files went."""
    return re.sub(r" --(out|data) \S+", "", start["command"].partition(" ")[2])


def _line(arm: dict[str, Any]) -> str:
    last, best = ("{mean:.1f}".format(**arm[which]) for which in ("last", "best"))
    spread = "" if arm["last"]["std"] is None else f" ± {arm['last']['std']:.1f}"
    published = "" if arm["published"] is None else f"{arm['published']:.1f}"
    angle = "" if arm["angle"] is None else f"{arm['angle']:.0f}°"
    cells = (arm["title"], last + spread, best, published, angle, str(arm["epochs"]), f"{arm['seconds']:.0f}")
    return "| " + " | ".join(cells) + " |"
