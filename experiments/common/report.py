"""One HTML page from a folder of runs: which rule learns, how well it is aligned, what a step costs. Opens offline."""

from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from experiments.common import plots, records
from experiments.common.methods import DIRECT, EXACT, LAYERWISE, METHODS
from experiments.common.metrics import METRICS

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLORS = {EXACT: "#4d5156", LAYERWISE: "#0072b2", DIRECT: "#d55e00"}
CLOSE = 0.02
TIMES = "\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}"


class Estimate(NamedTuple):
    """A mean over seeds and its standard deviation (0 for one seed)."""

    mean: float
    std: float


class Row(NamedTuple):
    """What the report says of one method.

    Attributes:
      name: the method's name.
      method: how the tables show it.
      accuracy: last-epoch accuracy, from 0 to 1.
      angle: to backpropagation at the last epoch, mean over the layers but the last.
      layers: for each layer but the last, its path and angle.
      step: milliseconds, ratio to backpropagation, and the ratio's quartiles; None if not measured.
      history: the records.
      rate: the learning rate.
      coverage: which layers the rule reaches.
    """

    name: str
    method: Any
    accuracy: Estimate
    angle: Estimate
    layers: dict[str, float]
    step: dict[str, float] | None
    history: list[dict[str, Any]]
    rate: float
    coverage: str

    @property
    def color(self) -> str:
        """The colour of its family."""
        return COLORS[self.method.family]


def write(folder: Path = Path("runs/compare")) -> Path:
    """Writes ``report.html`` from the runs in a folder.

    Args:
      folder: what ``run compare`` filled: one sub-folder per method.

    Returns:
      The path of the report.

    Raises:
      FileNotFoundError: if the folder holds no runs, or none of backpropagation, the reference.
    """
    rows, diverged = read_rows(folder), records.diverged(folder)
    bp = next((row for row in rows if row.name == "bp"), None)
    config = records.read_json(folder / "config.json")
    floor = _floor(rows)
    top = max([100.0, *(np.nanmax([*_angles(row).ravel(), 0]) + 5 for row in rows)])
    figures = {
        row.name: {
            "accuracy": plots.course(
                row.history, (bp or row).history, row.color, METRICS["accuracy"], (100 * floor, 100)
            ),
            "angle": plots.angles(row.history, top) if row.layers else "",
        }
        for row in rows
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=True
    )
    page = environment.get_template("report.html.jinja").render(
        rows=rows,
        bp=bp,
        diverged={method.title: diverged[name] for name, method in METHODS.items() if name in diverged},
        families=[(family, [row for row in rows if row.method.family == family]) for family in COLORS],
        colors=COLORS,
        config=config,
        figures=figures,
        floor=floor,
        ratio_top=max([1.25, *(row.step["high"] for row in rows if row.step)]),
        angle_top=max([90.0, *(max(row.layers.values(), default=0) for row in rows)]),
        findings=findings(rows) if bp else [],
        environment=records.read_json(folder / "bp" / "environment.json")[-1],
    )
    path = folder / "report.html"
    records.replace(path, page)
    return path


def read_rows(folder: Path) -> list[Row]:
    """Reads every method's run in a folder, but for those that diverged, in the order of the methods' table.

    Args:
      folder: what ``run compare`` filled.

    Returns:
      A list of :class:`Row`, backpropagation first, unless it diverged.

    Raises:
      FileNotFoundError: if the folder holds no runs, or none of backpropagation, the reference.
    """
    diverged = records.diverged(folder)
    histories = {name: [] if name in diverged else records.read(folder / name) for name in METHODS}
    if not histories["bp"] and "bp" not in diverged:
        there = [name for name, history in histories.items() if history]
        raise FileNotFoundError(
            f"{folder} holds no run of bp, the reference; found {', '.join(there) or 'no runs'}. Name a folder that "
            f"`python -m experiments run compare --out FOLDER` filled."
        )
    timing = folder / "timing.json"
    steps = records.read_json(timing)["steps"] if timing.exists() else {}
    return [_row(folder, name, history, steps.get(name)) for name, history in histories.items() if history]


def findings(rows: list[Row]) -> list[tuple[str, str]]:
    """The comparison in a few words: pairs of a figure and the sentence that it begins."""
    reference, *others = rows
    if not others:
        return []
    close = [row for row in others if row.accuracy.mean >= reference.accuracy.mean - CLOSE]
    best, worst = min(others, key=lambda row: row.angle.mean), max(others, key=lambda row: row.angle.mean)
    learn = (
        f"rules without backpropagation end within {100 * CLOSE:.0f} points of its "
        f"{100 * reference.accuracy.mean:.1f} % accuracy."
    )
    align = (
        f"from the true gradient: {best.method.title} is the best aligned. {worst.method.title} is the least, at "
        f"{worst.angle.mean:.0f}°."
    )
    found = [(f"{len(close)} of {len(others)}", learn), (f"{best.angle.mean:.0f}°", align)]
    ratios = {row.method.title: row.step["ratio"] for row in others if row.step}
    if ratios:
        fast, slow = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        dearest = f"{slow} is the dearest, at {ratios[slow]:.2f}{TIMES}."
        cost = f"backpropagation's time per step: {fast} is the cheapest. {dearest}"
        found.append((f"{ratios[fast]:.2f}{TIMES}", cost))
    return found


def _row(folder: Path, name: Any, history: list[dict[str, Any]], step: dict[str, float] | None) -> Row:
    last = history[-1]
    layers = list(last["angle"])[:-1]
    found = np.array([last["angle"][layer] for layer in layers], dtype=float)
    coverage = folder / name / "coverage.txt"
    return Row(
        name=name,
        method=METHODS[name],
        accuracy=_estimate(np.array(last["test_accuracy"])),
        angle=_estimate(found.mean(0)) if layers else Estimate(0.0, 0.0),
        layers=dict(zip(layers, found.mean(1).tolist() if layers else [], strict=True)),
        step=step,
        history=history,
        rate=records.read_json(folder / name / "config.json")["learning_rate"],
        coverage=coverage.read_text() if coverage.exists() else "",
    )


def _estimate(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0)


def _angles(row: Row) -> np.ndarray:
    return np.array([record["angle"][layer] for record in row.history for layer in row.layers], dtype=float)


def _floor(rows: list[Row]) -> float:
    """Where the accuracy axis begins: a tenth below the worst rule's end."""
    lowest = min((row.accuracy.mean - row.accuracy.std for row in rows), default=0.0)
    return max(0.0, np.floor(10 * lowest - 0.2) / 10)
