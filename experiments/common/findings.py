"""What came of a sweep in a few sentences, told of its arms as a file of results holds them, each by a clear title."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.metrics import METRICS, Metric

TIMES = "\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}"
Arms = Mapping[str, dict[str, Any]]


def full_title(arm: Mapping[str, Any]) -> str:
    """What a table of all groups calls an arm of a result."""
    return arm["title"] if arm["title"] == arm["group"] or arm["note"] else f"{arm['group']}: {arm['title']}"


def labels(arms: Arms) -> dict[str, str]:
    """What a sentence calls each arm, by its name."""
    return {name: full_title(arm) for name, arm in arms.items()}


def findings(arms: Arms, metric: Metric = METRICS["accuracy"], epoch: str = "best") -> list[tuple[str, str]]:
    """What came of it: pairs of a figure and the sentence that it begins.

    Args:
      arms: by name, as :func:`experiments.common.rows.told` makes them.
      metric: what their numbers are.
      epoch: ``"last"`` or ``"best"``, of which gaps to the reference at an ``x`` are.

    Returns:
      A list, empty where there is nothing to tell.
    """
    groups = dict.fromkeys(arm["group"] for arm in arms.values())
    told: dict[tuple[str, str, str], list[str]] = {}
    for group in groups:
        for first, axis, published in _least(arms, group, metric, epoch):
            told.setdefault((first, axis, published), []).append(f"“{group}”")
    return [
        (first, f"is the least {axis} at which {_either(of)} comes within {metric.margin} of its reference{published}.")
        for (first, axis, published), of in told.items()
    ] or _overall(arms, metric)


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _least(arms: Arms, group: str, metric: Metric, epoch: str) -> list[tuple[str, str, str]]:
    """The least ``x`` of a group of several that comes close to its reference, its axis, and what is published."""
    members = sorted(
        (name for name, arm in arms.items() if arm["group"] == group and arm["x"] is not None),
        key=lambda name: arms[name]["x"],
    )
    if len({arms[name]["x"] for name in members}) < 2:
        return []
    ours, theirs = ({name: of(arms, name, epoch) for name in members} for of in (_gap, _published_gap))
    told = any(gap is not None for gap in theirs.values())
    published = f"; published: {_first(arms, theirs, metric) or 'none of these'}" if told else ""
    return [(_first(arms, ours, metric) or "none", arms[members[0]]["axis"], published)]


def _first(arms: Arms, gaps: Mapping[str, float | None], metric: Metric) -> str:
    close = (name for name, gap in gaps.items() if gap is not None and metric.reaches(gap))
    return next((f"{arms[name]['x']:g}" for name in close), "")


def _gap(arms: Arms, name: str, epoch: str) -> float | None:
    """The distance to the reference; None for a reference itself, and where that diverged."""
    reference = arms[name]["reference"]
    if reference == name or reference not in arms:
        return None
    return arms[name][epoch]["mean"] - arms[reference][epoch]["mean"]


def _published_gap(arms: Arms, name: str, _: str) -> float | None:
    reference = arms.get(arms[name]["reference"], {})
    if arms[name]["reference"] == name or "published" not in arms[name] or "published" not in reference:
        return None
    return arms[name]["published"]["value"] - reference["published"]["value"]


def _overall(arms: Arms, metric: Metric) -> list[tuple[str, str]]:
    """How many arms come close to their reference, which are aligned, and what a step costs."""
    gaps = {name: gap for name in arms if (gap := _gap(arms, name, "last")) is not None}
    called, found = labels(arms), []
    if gaps:
        ends = {arms[name]["reference"] for name in gaps}
        level = f" {arms[ends.pop()]['last']['mean']:.{metric.digits}f}{metric.unit}" if len(ends) == 1 else ""
        close = sum(map(metric.reaches, gaps.values()))
        found.append((f"{close} of {len(gaps)}", f"end within {metric.margin} of their reference's{level}."))
    angles = {name: arms[name]["angle"]["mean"] for name in gaps if arms[name]["angle"] and _turns(arms[name])}
    if angles:
        best, worst = _ends(angles)
        said = f"{called[best]} is the best aligned. {called[worst]} is the least, at {angles[worst]:.0f}°."
        found.append((f"{angles[best]:.0f}°", f"from the true gradient: {said}"))
    ratios = {name: arms[name]["step"]["ratio"] for name in gaps if arms[name]["step"]}
    if ratios:
        fast, slow = _ends(ratios)
        said = f"{called[fast]} is the cheapest. {called[slow]} is the dearest, at {ratios[slow]:.2f}{TIMES}."
        found.append((f"{ratios[fast]:.2f}{TIMES}", f"the reference's time per step: {said}"))
    return found


def _ends(values: Mapping[str, float]) -> tuple[str, str]:
    return min(values, key=values.__getitem__), max(values, key=values.__getitem__)


def _turns(arm: Mapping[str, Any]) -> bool:
    """Whether its updates are not backpropagation's, by the angles of its course."""
    angles: Sequence[Any] = [moment[-1] for moment in arm["course"]]
    return any(angle is not None and angle > 1 for angle in angles)
