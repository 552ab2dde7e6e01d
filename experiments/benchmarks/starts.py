"""How long every rule takes from nothing to its first step, beside plain Flax, and what that step allocates.

Claim (ours): a layer-wise rule starts in 1.3 times plain Flax's time, a direct rule in 1.5 times; at published widths,
too, where feedback is drawn for layers of millions of weights.

Command: ``python -m experiments run starts``, on cores that nothing else uses; ``--preset deep`` for ResNet-56. Each
rule starts in turns with plain Flax in a process of its own, since a process compiles the slower the more it has
compiled. Times are the least of the rounds, since what else a machine does can only add to them.

Verdict: kept by most rules in the convolutional networks and by few in the decoder, whose own start is short. In the
former fixed feedback, signs and Kolen-Pollack are within the promise, and the weight mirror is at its edge in the
smaller two; so are direct matrices, whether fixed, shared, learned or of low rank, and FDFA, DRTP and PEPITA, and, but
for ResNet-56, forward gradients, mirrored PEPITA and local classifiers; GrAPE and PredSim are in ResNet-20 alone. In
the decoder backpropagation and uSF are, and feedback alignment and frSF at its edge; so are direct matrices, whether
fixed, shared or learned, and DRTP, while low-rank direct feedback and local classifiers are a little behind. Low-rank
feedback of layers is nowhere, for its draws, unless it is fitted, in ResNet-20. Nothing that learns by a forward mode
keeps the promise in the decoder. What learns by factors, by copies of layers or by the letter of GrAPE takes about
twice plain Flax's start or more. Backpropagation's program was plain Flax's own, so that what its start had beyond
attach tells how far such times can be trusted.
"""

import dataclasses
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Annotated, Any

import jax
from flax import nnx
from matplotlib.figure import Figure

from experiments.benchmarks import bars
from experiments.benchmarks.workloads import PLAIN, WORKLOADS, Measured, Setting, begin
from experiments.common import records
from experiments.common.bounds import among
from experiments.common.experiment import Experiment, Histories, Options, Page, Study, Table
from experiments.common.methods import METHODS

PARTS = ("attach", "trace", "compile")
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
    apart = True  # processes share the device


def study(config: Config, histories: Histories) -> Study:
    """Measures each rule on each network, if no earlier run has."""
    del histories
    found: dict[str, Measured] = {network: {} for network in config.networks}
    for network, rules in found.items():
        for method in config.methods:
            path = config.out / f"{network}-{method}.json"
            if not path.exists():
                records.write_json(path, measure(network, method, config.rounds))
            rules[method] = records.read_json(path)
    return report(found)


def measure(network: str, method: str, rounds: int) -> dict[str, Any]:
    """What :func:`started` finds in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        return fresh.submit(started, network, method, rounds).result()


def started(network: str, method: str, rounds: int) -> dict[str, Any]:
    """What a rule's start takes and what plain Flax's does, or why the network can't have the rule."""
    workload, settings = WORKLOADS[network], {PLAIN: Setting(None), method: Setting(METHODS[method].rule())}
    clock = time.perf_counter()
    model = workload.make(nnx.Rngs(0))
    make = time.perf_counter() - clock
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    counts: dict[str, float] = {}
    for name in [*settings] * rounds:  # plain Flax first: a process compiles its first program more slowly
        jax.clear_caches()
        nnx.Rngs(0)()  # as making a network does, so that attach finds compiled how keys are drawn
        try:
            one = begin(workload, settings[name], model)
        except ValueError as error:
            return {"refused": _reason(str(error).splitlines())}
        seconds[name].append(one.seconds)
        counts = {"gigaflops": one.flops / 1e9, "mebibytes": one.temporary / 2**20}  # at last the rule's
    least = {name: {part: min(one[part] for one in each) for part in PARTS} for name, each in seconds.items()}
    return {"make": make, "seconds": least[method], "plain": least[PLAIN]} | counts


def _reason(lines: list[str]) -> str:
    return next((line for line in lines if line.startswith("- ")), lines[0]).removeprefix("- ")


def ratios(rules: Measured) -> dict[str, dict[str, float]]:
    """How long each rule's first step takes to come, and without the model's making, as multiples of plain Flax's."""
    begun = {name: one for name, one in rules.items() if "seconds" in one}
    if not begun:
        return {}
    making = statistics.median(one["make"] for one in begun.values())  # in which no rule has a part
    own = {name: sum(one["seconds"].values()) for name, one in begun.items()}
    plain = {name: sum(one["plain"].values()) for name, one in begun.items()}
    return {
        name: {"start": (making + own[name]) / (making + plain[name]), "without making": own[name] / plain[name]}
        for name in begun
    }


def report(found: dict[str, Measured]) -> Study:
    """The figure of starts, and a table for each network."""
    drawn = Figure(figsize=(10.4, 7.6), layout="constrained")
    for axes, (network, rules) in zip(drawn.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        bars.draw(axes, {METHODS[name].title: {"ratio": one["start"]} for name, one in ratios(rules).items()}, network)
    caption = f"From nothing to the first step, as a multiple of {PLAIN}'s time."
    tables = [Table(network, rows(rules)) for network, rules in found.items()]
    refused = [[network, METHODS[name].title, why] for network, name, why in refusals(found)]
    if refused:
        tables.append(Table("Refused", [["network", "rule", "what attach says"], *refused]))
    return Study(drawn, caption, tables, findings(found), found)


def refusals(found: dict[str, Measured]) -> list[tuple[str, str, str]]:
    """Which network can't have which rule, and why."""
    every = ((network, name, one) for network, rules in found.items() for name, one in rules.items())
    return [(network, name, one["refused"]) for network, name, one in every if "refused" in one]


def findings(found: dict[str, Measured]) -> list[tuple[str, str]]:
    """How many rules keep the promise, on every network."""
    told = []
    for network, rules in found.items():
        every = {name: one["start"] for name, one in ratios(rules).items()}
        for direct, limit in PROMISED.items():
            own = [start for name, start in every.items() if METHODS[name].direct is direct]
            kept = f"{sum(start <= limit for start in own)} of {len(own)}"
            family = "direct and local" if direct else "layer-wise"
            told.append((kept, f"{family} rules start in {limit} times plain Flax's time or less, {network}."))
    return told


def rows(rules: Measured) -> list[list[str]]:
    """One network's table."""
    table = [["", "start", "without making", *(f"{part}, s" for part in PARTS), "plain Flax, s", "GFLOP", "MiB"]]
    for name, own in ratios(rules).items():
        one = rules[name]
        parts = (f"{one['seconds'][part]:.2f}" for part in PARTS)
        counts = f"{sum(one['plain'].values()):.2f}", f"{one['gigaflops']:.2f}", f"{one['mebibytes']:.1f}"
        table.append([METHODS[name].title, *(f"{ratio:.2f}" for ratio in own.values()), *parts, *counts])
    return table


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(), "deep": Config(networks=("resnet56",), rounds=2)},
    Page("How long until the first step?"),
    study=study,
)
