"""How a training step grows: its time and memory against depth, width, batch, classes and sequence length.

Claim (ours): beside backpropagation's, direct feedback's step grows no faster in any of them but the classes: its
matrices have as many columns as there are classes, for every layer. One matrix that all layers share has them once, and
where the classes are hashed into 256 buckets it has no more than 256.

Command: ``python -m experiments run growth``, on cores that nothing else uses.

Verdict: holds on a core. With depth, width, batch and length direct feedback's step stays below backpropagation's or
level with it. With many classes a matrix for each layer costs far more, one that all layers share no more than
backpropagation, and one into which the classes are hashed less.

Steps are timed as those of ``steps`` are; memory is the compiled program's: what it allocates, and what it is given,
which is the model, its optimizer's state and the feedback.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from experiments.benchmarks.workloads import CLASSES, EXACT, RULES, VOCABULARY, Workload, start
from experiments.common import plots, records, timing
from experiments.common.experiment import Experiment, Histories, Options, Page, Study, Table
from experiments.models.gpt import GPT
from experiments.models.networks import MLP

NAMES = (EXACT, "FA", "DFA", "DFA, shared", "DFA, hashed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What is varied, and how often each step is timed."""

    depth: tuple[int, ...] = (4, 16)
    """Numbers of hidden layers."""
    width: tuple[int, ...] = (128, 1024)
    """Units of every hidden layer."""
    batch: tuple[int, ...] = (128, 2048)
    """Examples of a step."""
    classes: tuple[int, ...] = (10, 1000, 50000)
    """Numbers of outputs."""
    length: tuple[int, ...] = (32, 256)
    """Tokens of a sequence, in a decoder."""
    rounds: int = 9
    """How many rounds of timing there are."""


def _mlp(width: int = 256, depth: int = 4, batch: int = 256, classes: int = CLASSES) -> Workload:
    shape = (16, 16, 1)
    return Workload(lambda rngs: MLP(shape, classes, (width,) * depth, rngs=rngs), shape, batch=batch)


def _gpt(length: int) -> Workload:
    make = partial(GPT, VOCABULARY, context=length, width=128, depth=4, heads=4)
    return Workload(lambda rngs: make(rngs=rngs), (length,), batch=8, at=("embedding", "blocks/*"))


AXES: dict[str, Callable[[int], Workload]] = {
    "depth": lambda size: _mlp(depth=size),
    "width": lambda size: _mlp(width=size),
    "batch": lambda size: _mlp(batch=size),
    "classes": lambda size: _mlp(classes=size),
    "length": _gpt,
}


def study(config: Config, histories: Histories) -> Study:
    """Measures every size that no earlier run has measured."""
    del histories
    found: dict[str, dict[str, Any]] = {axis: {} for axis in AXES}
    for axis, make in AXES.items():
        for size in getattr(config, axis):
            path = config.out / f"{axis}-{size}.json"
            if not path.exists():
                records.write_json(path, measure(make(size), config.rounds))
            found[axis][str(size)] = records.read_json(path)
    caption = f"Time and allocated memory of a step as multiples of {EXACT}'s, against what grows."
    tables = [Table(axis, rows(axis, sizes)) for axis, sizes in found.items()]
    return Study(draw(found), caption, tables, findings(found), found)


def measure(workload: Workload, rounds: int) -> dict[str, dict[str, float]]:
    """Every rule's step at one size."""
    begun = {name: one for name in NAMES if (one := start(workload, RULES[name]))}
    for one in begun.values():
        one.run()
    times = timing.interleaved({name: one.run for name, one in begun.items()}, rounds, EXACT)
    return {
        name: times[name] | {"allocated": one.temporary / 2**20, "given": one.given / 2**20}
        for name, one in begun.items()
    }


def rows(axis: str, sizes: dict[str, Any]) -> list[list[str]]:
    """One table: for every size and rule a row."""
    table = [[axis, "rule", "step", "quartiles", "milliseconds", "MiB allocated", "MiB given"]]
    for size, rules in sizes.items():
        for name, one in rules.items():
            numbers = [f"{one[key]:.1f}" for key in ("milliseconds", "allocated", "given")]
            table.append([size, name, f"{one['ratio']:.2f}", f"{one['low']:.2f} to {one['high']:.2f}", *numbers])
    return table


def findings(found: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """The largest of each."""
    last = [(axis, *max(sizes.items(), key=lambda item: int(item[0]))) for axis, sizes in found.items()]
    said = "the time of backpropagation: a step of DFA at"
    return [(f"{rules['DFA']['ratio']:.2f}x", f"{said} {axis} {size}.") for axis, size, rules in last]


def draw(found: dict[str, dict[str, Any]]) -> Figure:
    """Times above, memory below."""
    drawn = Figure(figsize=(11.0, 5.0), layout="constrained")
    panels = drawn.subplots(2, len(found), squeeze=False)
    for column, (axis, sizes) in enumerate(found.items()):
        for panel, what in zip(panels[:, column], ("ratio", "allocated"), strict=True):
            for name, color in zip(NAMES[1:], (plots.GREY, plots.BLUE, plots.ORANGE, plots.GREEN), strict=True):
                base = [rules[EXACT][what] for rules in sizes.values()]
                own = [rules[name][what] / one for rules, one in zip(sizes.values(), base, strict=True)]
                panel.plot([*map(int, sizes)], own, marker="o", markersize=3, color=color, label=name)
            panel.axhline(1, color=plots.GREY, linewidth=0.6)
            title = f"{'time' if what == 'ratio' else 'memory'} against {axis}"
            plots.log_axis(panel, [*map(int, sizes)], title=title)
    panels[0, 0].legend(fontsize=6)
    return drawn


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(), "long": Config(rounds=50)},
    Page("How does a step grow?"),
    study=study,
)
