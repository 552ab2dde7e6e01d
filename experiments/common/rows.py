"""What a report says of every arm, read from an experiment's folder, and the same as a file of results holds it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common import plots, records
from experiments.common.metrics import METRICS, Estimate, Metric, estimate


class Row(NamedTuple):
    """What the report says of one arm; its accuracies are in the page's metric, percentages or perplexities.

    Attributes:
      arm: what :class:`experiments.common.experiment.Arm` says of it, as JSON values.
      color: of its group.
      last: accuracy after the last epoch.
      best: the mean over seeds of each one's best epoch, as published numbers often are.
      gap: the page's epoch's less the reference's; None for a reference and where that diverged.
      published_gap: the same of the published accuracies.
      angle: of the hidden layers' updates to backpropagation, their mean, in degrees, after the last epoch.
      layers: the angle of each part of the network but the last.
      step: milliseconds, and their ratio to the reference's with its quartiles; None if not measured.
      history: its records, whose angles are those of parts.
      coverage: which layers the rule reaches.
      calibrations: how many true gradients its training took, mean over seeds; None where it can take none.
    """

    arm: dict[str, Any]
    color: str
    last: Estimate
    best: Estimate
    gap: float | None
    published_gap: float | None
    angle: Estimate | None
    layers: dict[str, float]
    step: dict[str, float] | None
    history: list[dict[str, Any]]
    coverage: str
    calibrations: float | None

    @property
    def name(self) -> str:
        """The arm's."""
        return self.arm["name"]

    @property
    def group(self) -> str:
        """The line of the figure that it lies on, or the part of the table."""
        return self.arm["group"]

    @property
    def title(self) -> str:
        """What a table calls it."""
        where = f"{self.arm['axis']} {self.arm['x']:g}" if self.arm["x"] is not None else self.group
        return self.arm["title"] or where

    @property
    def turns(self) -> bool:
        """Whether its updates are not backpropagation's."""
        # Comparisons with NaN are false: before the first step a feedback of zeros has no angle.
        return any(angle > 1 for record in self.history for one in record["angle"].values() for angle in one)


def read(folder: Path, *, stated: bool = False) -> list[Row]:
    """Reads every arm that a folder holds, but for those that diverged, in the experiment's order.

    Args:
      folder: what an experiment filled.
      stated: whether published numbers are kept where the folder does not say that its set-up is the published one.

    Returns:
      A list of :class:`Row`.

    Raises:
      FileNotFoundError: if the folder holds no trained arm.
    """
    path = folder / "sweep.json"
    described = records.read_json(path) if path.exists() else {"arms": []}
    keep = stated or described.get("as_published")
    arms = [arm if keep else arm | {"published": None} for arm in described["arms"]]
    lost = diverged(folder) if arms else {}
    histories = {arm["name"]: by_part(records.read(folder / arm["name"])) for arm in arms if arm["name"] not in lost}
    histories = {name: history for name, history in histories.items() if len(history) > 1}
    if not lost and not histories:
        raise FileNotFoundError(f"{folder} holds no trained arm; name a folder that a run filled with --out.")
    arms = [arm for arm in arms if arm["name"] in histories and arm["reference"] in {*histories, *lost}]
    metric, colors = metric_of(folder), _colors(arms)
    # Epoch 0, before training, is no epoch to choose.
    at_last = described.get("epoch") == "last"
    values = {name: metric.values(found)[1:] for name, found in histories.items()}
    ends = {name: float((found[-1] if at_last else metric.best(found)).mean()) for name, found in values.items()}
    published = {arm["name"]: arm["published"] for arm in arms}
    return [
        _row(folder, arm, histories[arm["name"]], metric, ends=ends, published=published, color=colors[arm["group"]])
        for arm in arms
    ]


def _row(
    folder: Path, arm: dict[str, Any], history: list[Any], metric: Metric, *, ends: Any, published: Any, color: str
) -> Row:
    name, reference = arm["name"], arm["reference"]
    known = name != reference and published[name] is not None and published.get(reference) is not None
    hidden = {layer: np.array(found, float) for layer, found in list(history[-1]["angle"].items())[:-1]}
    coverage, times = folder / name / "coverage.txt", folder / name / "timing.json"
    return Row(
        arm,
        color,
        last=estimate(metric.values(history)[-1], metric.digits),
        best=estimate(metric.best(metric.values(history)[1:]), metric.digits),
        gap=None if name == reference or reference not in ends else ends[name] - ends[reference],
        published_gap=published[name] - published[reference] if known else None,
        angle=estimate(np.mean(list(hidden.values()), 0), 0) if hidden else None,
        layers={layer: float(found.mean()) for layer, found in hidden.items()},
        step=records.read_json(times)["steps"][name] if times.exists() else None,
        history=history,
        coverage=coverage.read_text() if coverage.exists() else "",
        calibrations=float(np.mean(history[-1]["calibrations"])) if "calibrations" in history[-1] else None,
    )


def metric_of(folder: Path) -> Metric:
    """What the numbers of an experiment's folder are."""
    return METRICS[records.read_json(folder / "sweep.json").get("metric", "accuracy")]


def diverged(folder: Path) -> dict[str, str]:
    """What is said of each of the experiment's arms that diverged."""
    notes = records.diverged(folder)
    names = [arm["name"] for arm in records.read_json(folder / "sweep.json")["arms"]]
    return {name: notes[name] for name in names if name in notes}


def unfinished(folder: Path) -> list[str]:
    """A sentence for each of the experiment's arms that neither came to its last epoch nor diverged."""
    path = folder / "sweep.json"
    arms = [arm["name"] for arm in records.read_json(path)["arms"]] if path.exists() else []
    lost, epochs = records.diverged(folder), records.read_json(folder / "config.json")["epochs"] if arms else 0
    reached = {name: records.reached(folder / name) for name in arms if name not in lost}
    return [
        f"{name} was cut at epoch {epoch} of {epochs}; the same command goes on."
        for name, epoch in reached.items()
        if epoch < epochs
    ]


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


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each group."""
    return {group: [row for row in rows if row.group == group] for group in dict.fromkeys(row.group for row in rows)}


def told(row: Row, metric: Metric) -> dict[str, Any]:
    """What a file of results holds of an arm, and what :func:`experiments.common.findings.findings` reads."""
    values = metric.values(row.history)
    arm = {key: row.arm[key] for key in ("group", "x", "axis", "reference", "note")} | {"title": row.title}
    if row.arm["published"] is not None:
        arm["published"] = {"value": row.arm["published"], "from": row.arm["origin"]}
    if row.calibrations is not None:
        arm["calibrations"] = row.calibrations
    return arm | {
        "color": row.color,
        "last": _spread(row.last, values[-1]),
        "best": _spread(row.best, metric.best(values[1:])),
        "epochs": row.history[-1]["epoch"],
        "seconds": round(sum(record["seconds"] for record in row.history), 1),
        "angle": None if row.angle is None or np.isnan(row.angle.mean) else _spread(row.angle),
        "layers": {layer: round(angle, 1) for layer, angle in row.layers.items() if not np.isnan(angle)},
        "step": row.step and {key: round(value, 3) for key, value in row.step.items()},
        "course": [_moment(record, found) for record, found in zip(row.history, values, strict=True)],
    }


def _moment(record: dict[str, Any], found: Any) -> list[float | None]:
    """The epoch, every seed's value, and the mean angle of all parts but the last."""
    hidden = np.array(list(record["angle"].values())[:-1], float)
    angle = round(float(np.nanmean(hidden)), 2) if np.isfinite(hidden).any() else None
    return [record["epoch"], *(round(float(value), 2) for value in found), angle]


def _spread(found: Estimate, values: Any = ()) -> dict[str, Any]:
    """The mean, the standard deviation where there are several seeds, and every seed's value."""
    std = None if found.std is None else round(found.std, 3)
    return {"mean": round(found.mean, 3), "std": std} | (
        {"seeds": [round(float(v), 3) for v in values]} if len(values) else {}
    )


def _colors(arms: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A colour for every group; those of references alone are grey."""
    references = {arm["reference"] for arm in arms}
    own = dict.fromkeys(arm["group"] for arm in arms if arm["x"] is not None or arm["name"] not in references)
    colored = {group: plots.COLORS[i % len(plots.COLORS)] for i, group in enumerate(own)}
    return {arm["group"]: colored.get(arm["group"], plots.LEVEL) for arm in arms}
