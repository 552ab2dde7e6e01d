"""What is said of a sweep's arms: true of all of them, also where several have one title."""

import json

import pytest

from experiments.__main__ import EXPERIMENTS
from experiments.common import results
from experiments.common.findings import findings, labels
from experiments.common.metrics import METRICS

TIMES = "\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}"


def arm(group, title, last, *, reference, angle=None, ratio=None, x=None, best=None, note="", published=None):
    found = {"group": group, "title": title, "note": note, "reference": reference, "x": x, "axis": "rank"}
    found |= {"last": {"mean": last}, "best": {"mean": last if best is None else best}}
    found |= {"angle": angle and {"mean": angle}, "step": ratio and {"ratio": ratio}, "course": [[0, last, angle]]}
    return found | ({"published": {"value": published}} if published else {})


def test_arms_of_one_title_are_all_told_and_each_with_its_group():
    arms = {}
    for name, (angle, ratio) in {"MNIST": (25.0, 0.63), "CIFAR-10": (27.0, 0.79)}.items():
        arms |= {
            f"{name}-bp": arm(name, "backpropagation", 90.0, reference=f"{name}-bp"),
            f"{name}-dfa": arm(name, "DFA", 80.0, reference=f"{name}-bp", angle=angle, ratio=ratio),
            f"{name}-fa": arm(name, "FA", 89.5, reference=f"{name}-bp", angle=80 - angle, ratio=2 - ratio),
        }
    arms["MNIST-own"] = arm("MNIST", "Own", 50.0, reference="MNIST-bp", angle=99.0)
    assert findings(arms) == [
        ("2 of 5", "end within 1 point of their reference's."),
        ("25°", "from the true gradient: MNIST: DFA is the best aligned. MNIST: Own is the least, at 99°."),
        (
            f"0.63{TIMES}",
            f"the reference's time per step: MNIST: DFA is the cheapest. MNIST: FA is the dearest, at 1.37{TIMES}.",
        ),
    ]


def test_an_arm_whose_updates_are_backpropagations_is_no_aligned_one_and_a_lost_reference_compares_nothing():
    arms = {
        "bp": arm("BP", "BP", 90.0, reference="bp"),
        "svd": arm("SVD", "SVD", 90.0, reference="bp", angle=0.4),
        "fa": arm("FA", "FA", 80.0, reference="bp", angle=70.0),
        "stray": arm("Stray", "Stray", 90.0, reference="lost", angle=10.0, ratio=0.1),
    }
    assert findings(arms) == [
        ("1 of 2", "end within 1 point of their reference's 90.0 %."),
        ("70°", "from the true gradient: FA is the best aligned. FA is the least, at 70°."),
    ]


@pytest.mark.parametrize(("epoch", "first"), [("last", "none"), ("best", "4")])
def test_the_least_rank_is_of_the_published_numbers_epoch(epoch, first):
    arms = {"bp": arm("BP", "BP", 90.0, reference="bp", published=60.0)}
    for rank, best, published in ((8, 89.5, 59.5), (2, 80.0, 40.0), (4, 89.1, 59.1)):
        arms[f"a-{rank}"] = arm("A", f"A {rank}", 70.0, reference="bp", x=rank, best=best, published=published)
    ((least, said),) = findings(arms, METRICS["accuracy"], epoch)
    assert (least, said) == (
        first,
        "is the least rank at which “A” comes within 1 point of its reference; published: 4.",
    )


def test_groups_of_one_least_rank_are_told_in_one_sentence():
    arms = {"bp": arm("BP", "BP", 90.0, reference="bp")}
    for group, last in (("A", 70.0), ("B", 89.5), ("C", 60.0), ("D", 50.0)):
        arms |= {f"{group}-{rank}": arm(group, f"{group} {rank}", last, reference="bp", x=rank) for rank in (4, 8)}
    assert findings(arms) == [
        ("none", "is the least rank at which “A”, “C” or “D” comes within 1 point of its reference."),
        ("4", "is the least rank at which “B” comes within 1 point of its reference."),
    ]


def test_in_every_committed_result_what_an_arm_is_called_is_its_own():
    for path in results.FOLDER.glob("*/results/*.json"):
        found = json.loads(path.read_text())
        called = labels(found.get("arms", {}))
        assert len({*called.values()}) == len(called), path


def test_pages_tell_what_the_committed_arms_are_not_what_a_file_once_said():
    told = {path: text for path, text in results.pages(EXPERIMENTS.values()).items() if path.name == "README.md"}
    for paper, name, best, cheapest in (
        ("grape", "shallow-cpu", "angle", "step"),
        ("compare", "lenet-cpu", "angle", "step"),
        ("conservation", "aligned_start-cpu", "angle", "step"),
    ):
        path = results.FOLDER / paper / "results" / f"{name}.json"
        arms = [
            one for one in json.loads(path.read_text())["arms"].values() if one["angle"] and one["angle"]["mean"] > 1
        ]
        text = told[results.FOLDER / paper / "README.md"]
        assert f"**{min(one[best]['mean'] for one in arms):.0f}°** from the true gradient" in text
        dearest = max(one[cheapest]["ratio"] for one in arms)
        assert f"is the dearest, at {dearest:.2f}{TIMES}." in text
