"""One HTML page from a folder of arms: figures of accuracy, angle and time, and ours beside the published."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from experiments.common import courses, plots, records
from experiments.common.metrics import METRICS, Metric

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255")
LEVEL = "#4d5156"
TIMES = " \N{MULTIPLICATION SIGN}"


class Estimate(NamedTuple):
    """A mean over seeds and its standard deviation, None for one seed."""

    mean: float
    std: float | None
    digits: int = 1

    def __str__(self) -> str:
        mean = f"{self.mean:.{self.digits}f}"
        return mean if self.std is None else f"{mean} ± {self.std:.{self.digits}f}"


class Row(NamedTuple):
    """What the report says of one arm; its accuracies are in the page's metric, percentages or perplexities.

    Attributes:
      name: the arm's.
      group: the line that it lies on.
      x: where on that line; None for a reference.
      axis: what ``x`` counts.
      published: the published accuracy.
      reference: the name of the arm that it is compared with.
      last: accuracy after the last epoch.
      best: the mean over seeds of each one's best epoch, as published numbers often are.
      gap: ``best`` less the reference's, None for a reference and where that diverged.
      published_gap: the same of the published accuracies.
      angle: of the first layer's update to backpropagation, in degrees, after the last epoch.
      step: milliseconds, and their ratio to the reference's; None if not measured.
      color: of its group.
      coverage: which layers the rule reaches.
    """

    name: str
    group: str
    x: float | None
    axis: str
    published: float | None
    reference: str
    last: Estimate
    best: Estimate
    gap: float | None
    published_gap: float | None
    angle: Estimate
    step: dict[str, float] | None
    color: str
    coverage: str


def write(folder: Path) -> Path:
    """Writes ``report.html`` from the arms in a folder.

    Args:
      folder: what a sweep filled.

    Returns:
      The path of the report.

    Raises:
      FileNotFoundError: if the folder holds no sweep.
    """
    rows, described, metric = read_rows(folder), records.read_json(folder / "sweep.json"), metric_of(folder)
    lost = diverged(folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=True
    )
    page = environment.get_template("sweep.html.jinja").render(
        page=described,
        metric=metric,
        rows=rows,
        diverged=lost,
        groups=[(group, [row for row in rows if row.group == group]) for group in _groups(rows)],
        figures=[(axis, _figures(rows, axis, metric)) for axis in _axes(rows)],
        courses=courses.panels(folder, rows, metric) if described.get("course") and rows else [],
        findings=findings(rows, metric),
        config=records.read_json(folder / "config.json"),
        environment=records.read_json(folder / [*[row.name for row in rows], *lost][0] / "environment.json")[-1],
        low=min((row.last.mean - (row.last.std or 0) for row in rows), default=0),
        high=max((row.last.mean + (row.last.std or 0) for row in rows), default=0),
    )
    path = folder / "report.html"
    records.replace(path, page)
    return path


def metric_of(folder: Path) -> Metric:
    """What the numbers of a sweep's folder are."""
    return METRICS[records.read_json(folder / "sweep.json").get("metric", "accuracy")]


def diverged(folder: Path) -> dict[str, str]:
    """What is said of each of the sweep's arms that diverged."""
    notes = records.diverged(folder)
    names = [arm["name"] for arm in records.read_json(folder / "sweep.json")["arms"]]
    return {name: notes[name] for name in names if name in notes}


def read_rows(folder: Path) -> list[Row]:
    """Reads every arm that a folder holds, but for those that diverged, in the sweep's order.

    Args:
      folder: what a sweep filled.

    Returns:
      A list of :class:`Row`.

    Raises:
      FileNotFoundError: if the folder holds no sweep.
    """
    path = folder / "sweep.json"
    arms = records.read_json(path)["arms"] if path.exists() else []
    histories = {arm["name"]: records.read(folder / arm["name"]) for arm in arms}
    histories = {name: history if len(history) > 1 else [] for name, history in histories.items()}
    lost = diverged(folder) if arms else {}
    if not lost and not any(histories.values()):
        raise FileNotFoundError(f"{folder} holds no trained arm; name a folder that a sweep filled with --out.")
    there = {name for name, history in histories.items() if history} - set(lost)
    arms = [arm for arm in arms if arm["name"] in there and arm["reference"] in {*there, *lost}]
    metric = metric_of(folder)
    best = {arm["name"]: _best(histories[arm["name"]], metric) for arm in arms}
    published = {arm["name"]: arm["published"] for arm in arms}
    colors = _colors(arms)
    return [
        _row(folder, arm, histories[arm["name"]], metric, best=best, published=published, color=colors[arm["group"]])
        for arm in arms
    ]


def findings(rows: Sequence[Row], metric: Metric = METRICS["accuracy"]) -> list[tuple[str, str]]:
    """The least ``x`` of each group of several that comes close to its reference: pairs of figure and sentence."""
    found = []
    for group in _groups(rows):
        members = sorted((row for row in rows if row.group == group and row.x is not None), key=lambda row: row.x or 0)
        if len({row.x for row in members}) < 2:
            continue
        ours = next((row.x for row in members if row.gap is not None and metric.reaches(row.gap)), None)
        gaps = [row for row in members if row.published_gap is not None]
        theirs = next((row.x for row in gaps if metric.reaches(row.published_gap or 0)), None)
        text = f"is the least {members[0].axis} at which “{group}” comes within {metric.margin} of its reference"
        said = f"; published: {'none of these' if theirs is None else f'{theirs:g}'}." if gaps else "."
        found.append(("none" if ours is None else f"{ours:g}", text + said))
    return found


def _row(
    folder: Path,
    arm: dict[str, Any],
    history: list[dict[str, Any]],
    metric: Metric,
    *,
    best: Any,
    published: Any,
    color: str,
) -> Row:
    name, reference = arm["name"], arm["reference"]
    known = name != reference and published[name] is not None and published.get(reference) is not None
    first = next(iter(history[-1]["angle"].values()))
    coverage, times = folder / name / "coverage.txt", folder / name / "timing.json"
    return Row(
        **{key: arm[key] for key in ("name", "group", "x", "axis", "published", "reference")},
        last=_estimate(metric.values(history)[-1], metric.digits),
        best=best[name],
        gap=None if name == reference or reference not in best else best[name].mean - best[reference].mean,
        published_gap=published[name] - published[reference] if known else None,
        angle=_estimate(np.array(first, dtype=float)),
        step=records.read_json(times)["steps"][name] if times.exists() else None,
        color=color,
        coverage=coverage.read_text() if coverage.exists() else "",
    )


def _figures(rows: Sequence[Row], axis: str, metric: Metric) -> dict[str, str]:
    """Accuracy or another metric, angle and time against one axis, each an ``<svg>`` element."""
    # A reference of another axis is no level of this one.
    rows = [row for row in rows if row.axis == axis or row.axis not in _axes(rows)]

    def draw(value: Callable[[Row], Any], spread: Callable[[Row], Any], unit: str, wide: bool) -> str:
        lines, levels = [], []
        for group in _groups(rows):
            members = [row for row in rows if row.group == group and value(row) is not None]
            on = sorted((row for row in members if row.x is not None and row.axis == axis), key=lambda row: row.x or 0)
            if on:
                points = [(row.x, value(row), spread(row) or 0.0) for row in on]
                lines.append(plots.Line(group, on[0].color, points))
            levels += [plots.Level(group, row.color, value(row)) for row in members if row.x is None]
            if wide:
                known = [(row.x, row.published, 0.0) for row in on if row.published is not None]
                lines += [plots.Line(group, on[0].color, known, published=True)] if known else []
                levels += [
                    plots.Level(group, row.color, row.published, published=True)
                    for row in members
                    if row.x is None and row.published is not None
                ]
        return plots.sweep(lines, levels, axis=axis, unit=unit, wide=wide)

    return {
        "metric": draw(lambda row: row.best.mean, lambda row: row.best.std, metric.unit, True),
        "angle": draw(lambda row: row.angle.mean, lambda row: row.angle.std, "°", False),
        "time": draw(lambda row: row.step and row.step["ratio"], lambda row: 0.0, TIMES, False),
    }


def _groups(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.group for row in rows))


def _axes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.axis for row in rows if row.x is not None))


def _colors(arms: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A colour for every line; groups of references alone are grey."""
    lines = list(dict.fromkeys(arm["group"] for arm in arms if arm["x"] is not None))
    return {arm["group"]: LEVEL for arm in arms} | {group: COLORS[i % len(COLORS)] for i, group in enumerate(lines)}


def _best(history: Sequence[dict[str, Any]], metric: Metric) -> Estimate:
    # Epoch 0, before training, is no epoch to choose.
    return _estimate(metric.best(metric.values(history)[1:]), metric.digits)


def _estimate(values: np.ndarray, digits: int = 1) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, digits)
