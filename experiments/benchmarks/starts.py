"""How long every rule takes from nothing to its first step, beside plain Flax, and what that step allocates.

Claim (ours): a layer-wise rule starts in 1.3 times plain Flax's time, a direct rule in 1.5 times; at published widths,
too, where feedback is drawn for layers of millions of weights.

Command: ``python -m experiments run starts``, on cores that nothing else uses; ``--preset deep`` for ResNet-56. Times
are the least of several rounds over all rules, since what else a machine does can only add to them.

Verdict: kept by most rules in the convolutional networks and by few in the decoder, whose own start is short. In the
former fixed feedback, signs and Kolen-Pollack are within the promise; so are the direct rules but for GrAPE, which is
at its edge, and for parallel SSA; and of the local ones the classifiers. In the decoder backpropagation and uSF are,
and direct matrices, whether fixed, shared, learned or low-rank; feedback alignment is a little behind. Low-rank
feedback of layers is nowhere, for its draws, and in the decoder nothing is that learns by a forward mode. What learns
by factors, by copies of layers or by the letter of GrAPE takes more than twice plain Flax's start. Backpropagation's
program is plain Flax's own, so that what its start has beyond attach tells how far such times can be trusted.
"""

import dataclasses
from typing import Annotated, Any

import jax
from flax import nnx
from matplotlib.figure import Figure

from experiments.benchmarks import bars
from experiments.benchmarks.workloads import PARTS, PLAIN, WORKLOADS, Measured, Setting, Started, begin, start, starts
from experiments.common import records
from experiments.common.bounds import among
from experiments.common.experiment import Experiment, Histories, Options, Page, Study, Table
from experiments.common.methods import METHODS

PROMISED = {False: 1.3, True: 1.5}  # of layer-wise rules, of direct ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """The networks and the rules."""

    networks: Annotated[tuple[str, ...], among(WORKLOADS)] = ("resnet20", "decoder", "vgg13")
    """The networks on which rules are put."""
    methods: Annotated[tuple[str, ...], among(METHODS)] = tuple(METHODS)
    """The rules that are put on each of them."""
    rounds: int = 3
    """How many times each rule starts."""
    keep_programs: bool = False
    """Compiled programs are kept in the user's cache folder, so that no later run measures how they are made."""


def study(config: Config, histories: Histories) -> Study:
    """Measures each network that no earlier run has measured."""
    del histories
    found = {}
    for name in config.networks:
        path = config.out / f"{name}.json"
        if not path.exists():
            records.write_json(path, measure(name, config.methods, config.rounds))
        found[name] = records.read_json(path)
    return report(found)


def measure(network: str, methods: tuple[str, ...], rounds: int) -> Measured:
    """What each rule's start takes on one network, or why the network can't have the rule."""
    workload = WORKLOADS[network]
    first = start(workload, Setting(None))  # a process compiles its first program more slowly than all others
    assert first is not None
    model = workload.make(nnx.Rngs(0))
    found: Measured = {}
    rules = {PLAIN: None} | {name: METHODS[name].rule() for name in methods}
    for _ in range(rounds):
        for name, rule in rules.items():
            jax.clear_caches()  # from nothing, but that all have one network
            try:
                one = begin(workload, Setting(rule), model, dict(first.seconds))
            except ValueError as error:
                found[name] = {"refused": _reason(str(error).splitlines())}
            else:
                found[name] = _row(one, found.get(name, {}).get("seconds", one.seconds))
    return found


def _reason(lines: list[str]) -> str:
    return next((line for line in lines if line.startswith("- ")), lines[0]).removeprefix("- ")


def _row(one: Started, before: dict[str, float]) -> dict[str, Any]:
    seconds = {part: min(before[part], value) for part, value in one.seconds.items()}
    return {"seconds": seconds, "gigaflops": one.flops / 1e9, "mebibytes": one.temporary / 2**20}


def report(found: dict[str, Measured]) -> Study:
    """The figure of starts, and a table for each network."""
    drawn = Figure(figsize=(10.4, 7.6), layout="constrained")
    for axes, (network, rules) in zip(drawn.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        ratios = {title(name): {"ratio": one["start"]} for name, one in starts(rules).items()}
        bars.draw(axes, ratios, network)
    caption = f"From nothing to the first step, as a multiple of {PLAIN}'s time."
    tables = [Table(network, rows(rules)) for network, rules in found.items()]
    refused = [[network, title(name), why] for network, name, why in refusals(found)]
    if refused:
        tables.append(Table("Refused", [["network", "rule", "what attach says"], *refused]))
    return Study(drawn, caption, tables, findings(found), found)


def title(name: str) -> str:
    """What tables call a rule."""
    return METHODS[name].title if name in METHODS else name


def refusals(found: dict[str, Measured]) -> list[tuple[str, str, str]]:
    """Which network can't have which rule, and why."""
    every = ((network, name, one) for network, rules in found.items() for name, one in rules.items())
    return [(network, name, one["refused"]) for network, name, one in every if "refused" in one]


def findings(found: dict[str, Measured]) -> list[tuple[str, str]]:
    """How many rules keep the promise, on every network."""
    told = []
    for network, rules in found.items():
        for direct, limit in PROMISED.items():
            ratios = [
                one["start"]
                for name, one in starts(rules).items()
                if name in METHODS and METHODS[name].direct is direct
            ]
            kept = f"{sum(ratio <= limit for ratio in ratios)} of {len(ratios)}"
            family = "direct and local" if direct else "layer-wise"
            told.append((kept, f"{family} rules start in {limit} times plain Flax's time or less, {network}."))
    return told


def rows(rules: Measured) -> list[list[str]]:
    """One network's table."""
    table = [["", "start", "without making", *(f"{part}, s" for part in PARTS[1:]), "GFLOP", "MiB"]]
    for name, ratios in starts(rules).items():
        one = rules[name]
        parts = (f"{one['seconds'][part]:.2f}" for part in PARTS[1:])
        counts = f"{one['gigaflops']:.2f}", f"{one['mebibytes']:.1f}"
        table.append([title(name), *(f"{ratio:.2f}" for ratio in ratios.values()), *parts, *counts])
    return table


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(), "deep": Config(networks=("resnet56",), rounds=2)},
    Page("How long until the first step?"),
    study=study,
)
