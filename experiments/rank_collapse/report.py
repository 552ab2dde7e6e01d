"""The figure and the table of :mod:`experiments.rank_collapse.rank_collapse`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.common import plots
from experiments.common.experiment import OWN, Histories, Study, Table
from experiments.common.metrics import shown

# Colour and dashes of the arms that are drawn; the table has all of them.
LOOKS = {
    "bp": (plots.INK, "-"),
    "bp-norm": (plots.INK, "--"),
    "fa": (plots.VERMILLION, "-"),
    "fa-fast": (plots.VERMILLION, "--"),
    "fa-muon": (plots.PURPLE, "-"),
    "fa-norm": (plots.BLUE, "-"),
    "fa-norm-muon": (plots.GREEN, "-"),
}
KINDS = {
    "error": "error, a row per image",
    "channels": "error over channels",
    "activations": "activations over channels",
    "gradient": "gradient of a kernel",
    "trajectory": "gradients along the trajectory",
}
# Accuracies of ResNet-18 on CIFAR-100, and whose reproduction they are; the paper itself tells one gain alone.
PUBLISHED = {"fa": 1.4, "fa-muon": 25.3, "fa-norm": 37.1, "fa-norm-muon": 46.1}
ORIGIN = "a third party's"
LEARNED = 0.97  # of the loss of guessing: an arm that stays above has learned nothing to compare
PUBLISHED_GAINS = {("fa-norm-muon", "fa-norm"): f"{OWN} is +9"}
GAINS = (
    ("fa-muon", "fa", "by Muon alone, over feedback alignment"),
    ("fa-norm", "fa", "by normalisation alone, over feedback alignment"),
    ("fa-norm-muon", "fa-norm", "by Muon on top of normalisation"),
    ("fa-norm-flat", "fa-norm", "by a flat spectrum of the updates alone, with normalisation"),
    ("bp-norm-rank-1", "bp-norm", "by updates of rank 1, in backpropagation with normalisation"),
)


def study(histories: Histories, classes: int, same: bool) -> Study:
    """What the report shows.

    Args:
      histories: the records of each arm.
      classes: how many there are to guess from.
      same: whether the set-up is the published one.
    """
    level = matched_loss(histories, classes)
    caption = (
        "Effective ranks (Roy and Vetterli, of singular values), mean of the layers but the head: of the errors at a "
        "layer's output, of a block's activations behind their ReLU, of a kernel's gradient as a matrix of inputs and "
        "outputs, of the flattened gradients of the last steps, both before the optimizer has changed them. In the "
        f"table, at the loss on the probe that all arms reach that fall clearly below guessing's, {level:.2f}, and at "
        "the end, where losses differ. Thin lines are seeds."
    )
    tables = [Table("Accuracy and effective ranks", table(histories, level, same))]
    return Study(figure(histories), caption, tables, findings(histories, level, same))


def findings(histories: Histories, level: float, same: bool) -> list[tuple[str, str]]:
    """What Muon and normalisation gain, and how many directions FA's errors have beside backpropagation's at a loss."""
    found = []
    for name, like, text in GAINS:
        if name in histories and like in histories:
            ends = [100 * np.mean(histories[arm][-1]["test_accuracy"]) for arm in (name, like)]
            known = [PUBLISHED_GAINS[name, like]] if same and (name, like) in PUBLISHED_GAINS else []
            found.append((f"{ends[0] - ends[1]:+.1f}", f"points {'; '.join([text, *known])}."))
    for name, like in (("fa", "bp"), ("fa-norm", "bp-norm")):
        if name in histories and like in histories:
            pairs = {
                kind: [at_loss(histories[arm], hidden(histories[arm], kind), level).mean() for arm in (name, like)]
                for kind in KINDS
            }
            ratios = {kind: ours / theirs for kind, (ours, theirs) in pairs.items()}
            if np.isnan(ratios["channels"]):
                continue
            others = ", ".join(f"of {kind} {ratio:.2f}" for kind, ratio in ratios.items() if kind != "channels")
            said = f"is the ratio of {name}'s rank of errors over channels to {like}'s at loss {level:.2f}; {others}."
            found.append((f"{ratios['channels']:.2f}", said))
    return found


def table(histories: Histories, level: float, same: bool) -> list[list[str]]:
    """Accuracies, and ranks at the matched loss and after the last epoch."""
    ranks = [f"{title}, at loss {level:.2f} / last" for title in KINDS.values()]
    known = [f"accuracy, published ({ORIGIN}), %"] if same else []
    rows = [["arm", "last epoch, %", "best epoch, %", "loss on the probe", *ranks, *known]]
    for name, history in histories.items():
        accuracy = 100 * np.array([record["test_accuracy"] for record in history])
        cells = [shown(accuracy[-1], 1), shown(accuracy[1:].max(0), 1), f"{_losses(history)[:, -1].mean():.3g}"]
        for kind in KINDS:
            found = hidden(history, kind)
            matched = shown(at_loss(history, found, level), 1)
            cells.append(f"{'-' if 'nan' in matched else matched} / {shown(found[:, -1], 1)}")
        rows.append([name, *cells, *([str(PUBLISHED.get(name, ""))] if same else [])])
    return rows


def matched_loss(histories: Histories, classes: int) -> float:
    """The lowest loss on the probe that every arm has reached in every seed which has learned something at all."""
    ends = [float(_losses(history).min(1).max()) for name, history in histories.items() if name in LOOKS]
    return max((end for end in ends if end < LEARNED * np.log(classes)), default=np.nan)


def at_loss(history: Sequence[dict[str, Any]], ranks: np.ndarray, level: float) -> np.ndarray:
    """Each seed's rank, of ``(seeds, measurements)``, where its loss first falls to a level, between two; else NaN."""
    found = []
    for loss, rank in zip(_losses(history), ranks, strict=True):
        after = int((loss <= level).argmax())
        if not loss[after] <= level:
            found.append(np.nan)
        elif after == 0:
            found.append(rank[0])
        else:
            found.append(np.interp(level, loss[[after, after - 1]], rank[[after, after - 1]]))
    return np.array(found)


def hidden(history: Sequence[dict[str, Any]], kind: str) -> np.ndarray:
    """The mean rank over the layers that have one but the first and the head, ``(seeds, measurements)``."""
    measured = _measured(history)
    layers = [layer for layer in measured[0]["rank"][kind] if layer != "head"]
    return np.array([np.mean([record["rank"][kind][layer] for layer in layers], 0) for record in measured], float).T


def figure(histories: Histories) -> Figure:
    """Accuracy, and every kind of rank, over training."""
    drawn = Figure(figsize=(9.6, 5.2), layout="constrained")
    first, *others = drawn.subplots(2, 3).flat
    for name, history in histories.items():
        if name not in LOOKS:
            continue
        accuracy = 100 * np.array([record["test_accuracy"] for record in history]).T
        courses = [(history, accuracy), *((_measured(history), hidden(history, kind)) for kind in KINDS)]
        color, dashes = LOOKS[name]
        for axes, (records, values) in zip((first, *others), courses, strict=True):
            steps = [record["step"] for record in records]
            axes.plot(steps, values.T, color=color, linestyle=dashes, linewidth=0.6, alpha=0.45)
            axes.plot(steps, values.mean(0), color=color, linestyle=dashes, linewidth=1.8, label=name)
    for axes, title in zip((first, *others), ("test accuracy, %", *KINDS.values()), strict=True):
        axes.set_title(title, loc="left")
        axes.set_xlabel("steps")
        axes.set_ylim(0, None)
        axes.grid(axis="y")
    plots.legend_below(drawn, 7)
    return drawn


def _losses(history: Sequence[dict[str, Any]]) -> np.ndarray:
    """``(seeds, measurements)``."""
    return np.array([record["probe_loss"] for record in _measured(history)], dtype=float).T


def _measured(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of the epochs after which ranks were measured."""
    return [record for record in history if "rank" in record]
