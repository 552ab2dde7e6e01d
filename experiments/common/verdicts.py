"""What of a published table holds in a committed result: gaps, order, whose the numbers are, and what was not run."""

import re
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from experiments.common.experiment import Experiment
from experiments.common.findings import full_title
from experiments.common.metrics import METRICS, Metric
from experiments.common.published import smaller

# Why a preset has no result, by what its name ends with.
WHY = {
    "gpu15": "it takes a quarter of an hour of a GPU",
    "paper": "the published size takes a GPU for hours or days",
    "imagenet": "it takes a GPU for days",
    "gpu": "it takes a quarter of an hour of a GPU",
    "full": "it takes all images, for hours",
    "hours": "it takes some hours of one core",
    "long": "more rounds of the same",
    "large": "it takes a large machine",
    "deep": "the same in a deeper network",
}
_MANY = 8
_TESTS = {"test": 10_000, "validation": 5_000}  # images of both CIFARs, and hardly more or less of MNIST
_ORDER = re.compile(r"\*\*Order.*: (\d+ of \d+)")


def verdict(experiment: Experiment, found: dict[str, Any]) -> list[str]:
    """Whose the published numbers are, which of their gaps to the reference are ours, too, and which of their order.

    Args:
      experiment: whose result it is.
      found: a result.

    Returns:
      Lines of Markdown: none where nothing is published; of another set-up a sentence that says so, the published
      numbers by themselves, and the order.
    """
    small = smaller(experiment, found["config"])
    known = {name: arm for name, arm in found.get("arms", {}).items() if "published" in arm}
    if not known or experiment.size is None:
        return [small] if small else []
    epoch, whose = experiment.page.epoch, ", ".join(dict.fromkeys(arm["published"]["from"] for arm in known.values()))
    if small:
        return [small, "", _stated(found, known, whose), *_order(found, known, epoch, f" of the {epoch} epochs here")]
    epochs = found["config"]["epochs"]
    ours = f"Ours: the published set-up, {epochs} epochs, of which the {epoch} is compared"
    lines = [f"Published: {found['published']}. Whose number: {whose}. {ours}.", ""]
    return lines + _gaps(found, known, epoch) + _order(found, known, epoch)


def _stated(found: dict[str, Any], known: dict[str, Any], whose: str) -> str:
    """The published numbers of another set-up, which stand in no table of ours."""
    digits = METRICS[found["metric"]].digits
    numbers = (f"{full_title(arm)} {arm['published']['value']:.{digits}f}" for arm in known.values())
    return f"- Published, in a set-up of its own ({whose}; {found['published']}): {'; '.join(numbers)}."


def _gaps(found: dict[str, Any], known: dict[str, Any], epoch: str) -> list[str]:
    holds: list[str] = []
    fails: list[str] = []
    metric = METRICS[found["metric"]]
    for arm in known.values():
        reference = known.get(arm["reference"], arm)
        if reference is arm:
            continue
        theirs = arm["published"]["value"] - reference["published"]["value"]
        ours = arm[epoch]["mean"] - reference[epoch]["mean"]
        text = f"{full_title(arm)} {ours:+.{metric.digits}f} (published {theirs:+.{metric.digits}f})"
        (holds if abs(ours - theirs) <= metric.close else fails).append(text)
    lines = [f"- Gaps to the reference that hold within {metric.margin}: {'; '.join(holds)}."] if holds else []
    return lines + ([f"- Gaps to the reference that do not hold: {'; '.join(fails)}."] if fails else [])


def _order(found: dict[str, Any], known: dict[str, Any], epoch: str, where: str = "") -> list[str]:
    pairs = list(_pairs(known))
    if not pairs:
        return []
    metric, config = METRICS[found["metric"]], found["config"]
    tests = config.get("test_images") or _TESTS[config.get("split", "test")]
    sign = metric.sign
    ahead = [(a, b) if sign * (a["published"]["value"] - b["published"]["value"]) > 0 else (b, a) for a, b in pairs]
    leads = [
        (a, b, sign * (a[epoch]["mean"] - b[epoch]["mean"]), _error(metric, tests, a[epoch], b[epoch]))
        for a, b in ahead
    ]
    stand = sum(error is not None and lead > error for _, _, lead, error in leads)
    untold = all(error is None for *_, error in leads)
    lines = [] if untold else [f"- **Order{where}: {stand} of {len(pairs)} pairs of arms stand as published.**"]
    for said, some in (
        (
            "Within twice the standard error",
            [(a, b) for a, b, lead, error in leads if error is not None and abs(lead) <= error],
        ),
        ("The other way round", [(a, b) for a, b, lead, error in leads if error is not None and lead < -error]),
        ("Not told by one seed", [(a, b) for a, b, _, error in leads if error is None]),
    ):
        texts = [f"{full_title(a)} before {full_title(b)}" for a, b in some[:_MANY]]
        more = [f"and {len(some) - _MANY} more"] if len(some) > _MANY else []
        lines += [f"- {said}: {'; '.join([*texts, *more])}."] if texts else []
    return lines


def _pairs(known: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Arms of one reference, beside it and beside each other, whose published numbers differ."""
    members = {name: arm["reference"] if arm["reference"] in known else name for name, arm in known.items()}
    for a, b in combinations(known, 2):
        if members[a] == members[b] and known[a]["published"]["value"] != known[b]["published"]["value"]:
            yield known[a], known[b]


def _error(metric: Metric, tests: int, *ends: dict[str, Any]) -> float | None:
    """Twice the standard error of a difference; None where a seed alone tells none."""
    variances = [_variance(metric, tests, end) for end in ends]
    return None if None in variances else 2 * sum(filter(None, variances)) ** 0.5


def _variance(metric: Metric, tests: int, end: dict[str, Any]) -> float | None:
    """Of a mean over seeds; of one seed's accuracy, that which the test images leave open."""
    if end["std"] is not None:
        return end["std"] ** 2 / len(end["seeds"])
    return end["mean"] * (100 - end["mean"]) / tests if metric.name == "accuracy" else None


def not_run(experiment: Experiment, names: Iterable[str]) -> str:
    """Which presets have no result among those of these names, and why; empty if all have."""
    done = list(names)
    left = [
        preset
        for preset in experiment.presets
        if not any(name == preset or name.startswith(f"{preset}-") for name in done)
    ]
    told = []
    for preset in left:
        why = next((why for end, why in WHY.items() if preset.endswith(end)), "")
        told.append(f"`{preset}`" + (f" ({why})" if why else ""))
    return f"Presets not run: {', '.join(told)}.\n" if told else ""


def glance(experiment: Experiment, found: Iterable[dict[str, Any]]) -> str:
    """A row of the table of all claims: the question, the verdict's first two sentences, and the order."""
    order = "; ".join(
        f"{match[1]}{_but(experiment, one)}"
        for one in found
        for line in verdict(experiment, one)
        if (match := _ORDER.search(line))
    )
    said = ". ".join(experiment.verdict.replace("``", "`").split(". ")[:2]).rstrip(".")
    return f"| [{experiment.page.title}](#{experiment.name}) | {said[:1].upper()}{said[1:]}. | {order} |"


def _but(experiment: Experiment, found: dict[str, Any]) -> str:
    """What an order at a glance must not be read without."""
    said = ["one seed"] if len(found["seeds"]) == 1 else []
    said += ["another set-up"] if smaller(experiment, found["config"]) else []
    return f" ({', '.join(said)})" if said else ""
