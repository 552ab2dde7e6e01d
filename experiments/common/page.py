"""One HTML page from an experiment's folder: what came of it, figures, tables, what was run. Opens offline."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.table import Column
from rich.table import Table as Printed

from experiments.common import courses, plots, records
from experiments.common import rows as rows_of
from experiments.common.experiment import Study
from experiments.common.findings import TIMES, findings, labels
from experiments.common.metrics import Metric
from experiments.common.rows import Row

_MANY = 24  # arms whose courses are still looked at one by one
_ROOM = 1.5


def write(folder: Path) -> Path:
    """Writes ``report.html`` from what an experiment's folder holds.

    Args:
      folder: what an experiment filled.

    Returns:
      The path of the report.

    Raises:
      FileNotFoundError: if the folder holds no trained arm and no study.
    """
    study = _study(folder)
    rows = [] if study else rows_of.read(folder)
    described, metric, lost = records.read_json(folder / "sweep.json"), rows_of.metric_of(folder), _lost(folder)
    arms = {row.name: rows_of.told(row, metric) for row in rows}
    slowest = max([1.25, *(row.step["high"] for row in rows if row.step)])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=True
    )
    text = environment.get_template("page.html.jinja").render(
        page=described,
        metric=metric,
        study=study,
        rows=rows,
        published=any(row.arm["published"] is not None for row in rows),
        calibrated=any(row.calibrations is not None for row in rows),
        diverged=lost,
        unfinished=rows_of.unfinished(folder),
        groups=rows_of.groups(rows),
        scale=_scale(rows, metric),
        angle_top=max([90.0, *(angle for row in rows for angle in row.layers.values() if not np.isnan(angle))]),
        ratio_top=slowest,
        ratio_ticks=(0, 1) if slowest < 2 else (0, int(slowest / 2), int(slowest)),
        levels={row.name: row.last.mean for row in rows},
        figures={axis: _figures(rows, axis, metric) for axis in _axes(rows)},
        courses=_courses(rows, metric) if len(rows) <= _MANY else [],
        findings=study["findings"] if study else findings(arms, metric, described.get("epoch", "best")),
        labels=labels(arms),
        smaller=described.get("smaller", ""),
        config=records.read_json(folder / "config.json"),
        environment=records.read_json(folder / "environment.json")[-1],
    )
    records.replace(folder / "report.html", text)
    return folder / "report.html"


def save(folder: Path, study: Study) -> None:
    """Keeps a study in an experiment's folder, for :func:`write`."""
    found = study._asdict() | {"tables": [table._asdict() for table in study.tables], "figure": plots.svg(study.figure)}
    records.write_json(folder / "study.json", found)


def tables(folder: Path) -> Iterator[Printed]:
    """What the terminal shows of an experiment's folder."""
    study = _study(folder)
    if study:
        for table in study["tables"]:
            yield _printed(table["title"], table["rows"])
        return
    metric = rows_of.metric_of(folder)
    cells = [["arm", "last epoch", "best epoch", "gap", "published", "gap", "angle", "step", "true gradients"]]
    for row in rows_of.read(folder):
        gaps = ["" if gap is None else f"{gap:+.{metric.digits}f}" for gap in (row.gap, row.published_gap)]
        published = "" if row.arm["published"] is None else f"{row.arm['published']:.1f}"
        step = f"{row.step['ratio']:.2f} x" if row.step else ""
        angle = f"{row.angle}°" if row.angle else ""
        taken = "" if row.calibrations is None else f"{row.calibrations:g}"
        cells.append([row.name, str(row.last), str(row.best), gaps[0], published, gaps[1], angle, step, taken])
    filled = [i for i, column in enumerate(zip(*cells, strict=True)) if i < 2 or any(column[1:])]
    lost = [[name, "diverged", *[""] * (len(filled) - 2)] for name in _lost(folder)]
    yield _printed("", [*([row[i] for i in filled] for row in cells), *lost])


def _printed(title: str, rows: Sequence[Sequence[str]]) -> Printed:
    printed = Printed(*(Column(head, overflow="fold") for head in rows[0]), title=title or None)
    for row in rows[1:]:
        printed.add_row(*row)
    return printed


def _study(folder: Path) -> Any:
    path = folder / "study.json"
    return records.read_json(path) if path.exists() else None


def _lost(folder: Path) -> dict[str, str]:
    return rows_of.diverged(folder)


def _scale(rows: Sequence[Row], metric: Metric) -> tuple[float, float]:
    """The ends of the metric's axis: tens of percent around all that is shown, or the numbers themselves."""
    ends = [row.last.mean + sign * (row.last.std or 0) for row in rows for sign in (-1, 1)] or [0.0, 1.0]
    if metric.sign < 0:
        return min(ends), max(ends) + 1e-6
    return max(0.0, 10 * np.floor(min(ends) / 10 - 0.02)), min(100.0, 10 * np.ceil(max(ends) / 10 + 0.02))


def _courses(rows: Sequence[Row], metric: Metric) -> list[tuple[Row, dict[str, str]]]:
    """For each row its metric over training, and its angles, which arms of backpropagation have none of."""
    histories = {row.name: row.history for row in rows}
    angles = [angle for row in rows for record in row.history for one in record["angle"].values() for angle in one]
    top = max(100.0, np.nanmax([*np.array(angles, float), 0.0]) + 5)
    values = [metric.values(row.history).mean(1) for row in rows]
    limits = (0.0, 100.0)
    if rows and metric.sign < 0:  # where training begins may be far off
        limits = min(float(one.min()) for one in values) / 1.1, _ROOM * max(float(one[-1]) for one in values)
    elif rows:
        limits = _scale(rows, metric)
    return [
        (
            row,
            {
                "metric": courses.course(
                    row.history, histories.get(row.arm["reference"], row.history), row.color, metric, limits
                ),
                "angle": courses.angles(row.history, top) if row.turns and row.layers else "",
            },
        )
        for row in rows
    ]


def _figures(rows: Sequence[Row], axis: str, metric: Metric) -> dict[str, str]:
    """The metric, the angle and the time against one axis, each an ``<svg>`` element; empty where nothing is known."""
    # A reference of another axis is no level of this one.
    rows = [row for row in rows if row.arm["axis"] == axis or row.arm["axis"] not in _axes(rows)]
    return {
        "metric": _draw(rows, axis, lambda row: (row.best.mean, row.best.std), metric.unit, wide=True),
        "angle": _draw(rows, axis, lambda row: row.angle and row.angle[:2], "°"),
        "time": _draw(rows, axis, lambda row: row.step and (row.step["ratio"], 0.0), TIMES),
    }


def _draw(rows: Sequence[Row], axis: str, value: Callable[[Row], Any], unit: str, *, wide: bool = False) -> str:
    lines, levels = [], []
    for group, found in rows_of.groups(rows).items():
        members = [row for row in found if value(row) is not None]
        on = sorted(
            (row for row in members if row.arm["x"] is not None and row.arm["axis"] == axis),
            key=lambda row: row.arm["x"],
        )
        off = [row for row in members if row.arm["x"] is None]
        if on:
            points = [(row.arm["x"], value(row)[0], value(row)[1] or 0.0) for row in on]
            lines.append(plots.Line(group, on[0].color, points))
        levels += [plots.Level(group, row.color, value(row)[0]) for row in off]
        if wide:
            known = [(row.arm["x"], row.arm["published"], 0.0) for row in on if row.arm["published"] is not None]
            lines += [plots.Line(group, on[0].color, known, published=True)] if known else []
            levels += [
                plots.Level(group, row.color, row.arm["published"], published=True)
                for row in off
                if row.arm["published"] is not None
            ]
    return plots.sweep(lines, levels, axis=axis, unit=unit, wide=wide) if lines else ""


def _axes(rows: Sequence[Row]) -> list[str]:
    """What is counted by the ``x`` of several arms: over a single one there is nothing to draw."""
    found: dict[str, set[float]] = {}
    for row in rows:
        if row.arm["x"] is not None:
            found.setdefault(row.arm["axis"], set()).add(row.arm["x"])
    return [axis for axis, places in found.items() if len(places) > 1]
