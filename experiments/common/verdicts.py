"""What of a published table holds in a committed result: gaps, order, whose the numbers are, and what was not run."""

import re
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from experiments.common.experiment import Experiment
from experiments.common.metrics import METRICS

# Why a preset has no result, by what its name ends with.
WHY = {
    "gpu15": "it takes a quarter of an hour of a GPU",
    "paper": "the published size takes a GPU for hours or days",
    "imagenet": "it takes a GPU for days",
}
_MANY = 8
_ORDER = re.compile(r"Order: (\d+ of \d+)")


def full_title(arm: dict[str, Any]) -> str:
    """What a table of all groups calls an arm of a result."""
    return arm["title"] if arm["title"] == arm["group"] or arm["note"] else f"{arm['group']}: {arm['title']}"


def verdict(found: dict[str, Any], epoch: str) -> list[str]:
    """Whose the published numbers are, which of their gaps to the reference are ours, too, and which of their order.

    Args:
      found: a result; one that is no table of arms with published numbers has no verdict.
      epoch: of which the published numbers are, ``"last"`` or ``"best"``; ours are of the same.

    Returns:
      Lines of Markdown.
    """
    known = {name: arm for name, arm in found.get("arms", {}).items() if "published" in arm}
    if not known:
        return []
    whose, set_up = (_each(arm["published"][key] for arm in known.values()) for key in ("from", "ours"))
    lines = [f"Published: {found['published']}. Whose number: {whose}. Ours: {set_up}, {epoch} epochs.", ""]
    return lines + _gaps(found, known, epoch) + _order(found, known, epoch)


def _each(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


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
    return lines + ([f"- Gaps that do not: {'; '.join(fails)}."] if fails else [])


def _order(found: dict[str, Any], known: dict[str, Any], epoch: str) -> list[str]:
    pairs = list(_pairs(known))
    if not pairs:
        return []
    sign = METRICS[found["metric"]].sign
    ahead = [(a, b) if sign * (a["published"]["value"] - b["published"]["value"]) > 0 else (b, a) for a, b in pairs]
    leads = [(a, b, sign * (a[epoch]["mean"] - b[epoch]["mean"]), _error(a[epoch], b[epoch])) for a, b in ahead]
    stand = sum(lead > error for _, _, lead, error in leads)
    lines = [f"- **Order: {stand} of {len(pairs)} pairs of arms stand as published.**"]
    for said, some in (
        ("Within twice the standard error", [(a, b) for a, b, lead, error in leads if abs(lead) <= error]),
        ("The other way round", [(a, b) for a, b, lead, error in leads if lead < -error]),
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


def _error(*ends: dict[str, Any]) -> float:
    """Twice the standard error of a difference; zero where a seed alone tells none."""
    variances = [(end["std"] or 0.0) ** 2 / max(1, len(end.get("seeds", ()))) for end in ends]
    return 2 * sum(variances) ** 0.5


def not_run(experiment: Experiment, names: Iterable[str]) -> str:
    """Which presets have no result among those of these names, and why; empty if all have."""
    done = list(names)
    left = [
        preset
        for preset in experiment.presets
        if preset != "cpu" and not any(name == preset or name.startswith(f"{preset}-") for name in done)
    ]
    told = []
    for preset in left:
        why = next((why for end, why in WHY.items() if preset.endswith(end)), "")
        told.append(f"`{preset}`" + (f" ({why})" if why else ""))
    return f"Presets not run: {', '.join(told)}.\n" if told else ""


def glance(experiment: Experiment, found: Iterable[dict[str, Any]]) -> str:
    """A row of the table of all claims: the question, the verdict's first two sentences, and the order."""
    lines = [line for one in found for line in verdict(one, experiment.page.epoch)]
    order = "; ".join(match[1] for line in lines if (match := _ORDER.search(line)))
    said = ". ".join(experiment.verdict.replace("``", "`").split(". ")[:2]).rstrip(".")
    return f"| [{experiment.page.title}](#{experiment.name}) | {said[:1].upper()}{said[1:]}. | {order} |"
