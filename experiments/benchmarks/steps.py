"""What a training step costs under each rule, beside plain Flax's and PyTorch's.

Claim (ours): a layer-wise rule's steps cost what backpropagation's do; a direct rule's cost less, since no error
travels through the layers. What the first one takes is told by ``starts``.

Command: ``make bench``, or ``python -m experiments run steps`` for this one alone, on cores that nothing else uses;
``--preset gpu`` for networks that fill a large GPU. With ``--preset h100`` steps of the large networks are compiled for
an H100 on a machine that has none, and what their programs hold is counted: ``JAX_PLATFORMS=cpu python -m experiments
run steps --preset h100``, after ``pip install '.[cuda]'``. All steps, PyTorch's too, are taken in one process, which
keeps the memory that it frees.

Verdict: most of it on a core. Where a convolution's weights learn from an activation, XLA's kernels for a CPU compute
it once more from every layer below that leads to it by norms and additions, and in the ResNet that is more than a
quarter of plain Flax's step; attached models read what the forward pass has left, so that there every rule is ahead of
plain Flax, backpropagation's own included. Beside that one feedback alignment is level, low-rank feedback ahead up to a
quarter of the outputs, and direct feedback further ahead; so is direct feedback in dense networks and LeNet, while in
the decoder, inside whose blocks the backward stays exact, it is a little ahead. Steps of feedback alignment are level
with backpropagation's everywhere. One matrix for all layers costs what a matrix for each does. Low-rank feedback in
dense layers costs more at a quarter of the outputs already, and far more at three quarters where the batch is smaller
than the rank. Learned direct feedback has a forward mode on top: that is little or nothing beside backpropagation in
the dense network and LeNet, and a quarter of its step in the ResNet and the decoder. Streamed, direct feedback runs the
forward pass once more, which takes longer than what it saves. PyTorch's backpropagation is far ahead in LeNet, whatever
the rule, since its convolutions are faster on a CPU than XLA's; in the ResNet it is ahead of every rule but stored
direct and thin low-rank feedback, in the decoder hardly ahead of backpropagation, and in the dense network behind.
BioTorch's DFA saves nothing beside its own FA. As a program for an H100, a step of direct feedback moves fewer bytes
than backpropagation's and takes its memory, shared between layers, too, and streamed a fraction of it for a quarter
more bytes. Low-rank feedback moves more bytes, in about twice as many kernels; in the dense network nearly three times
as many, where three quarters of the outputs take twice the memory. So does learned feedback, in a third more kernels in
the decoder and half again as many or more elsewhere.
"""

import dataclasses
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import numpy as np
from matplotlib.figure import Figure

from experiments.benchmarks import bars, ceilings, gpu_programs
from experiments.benchmarks.workloads import PLAIN, RULES, WORKLOADS, Measured, Started, start
from experiments.common import records, timing
from experiments.common.bounds import among
from experiments.common.experiment import Experiment, Histories, Options, Page, Study, Table

LARGE = "mlp-4096", "resnet20-256", "resnet18", "decoder-768"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """The networks, and how often each thing is done."""

    networks: Annotated[tuple[str, ...], among(WORKLOADS)] = ("mlp", "lenet", "resnet20", "decoder")
    """The networks whose steps are timed."""
    rounds: int = 25
    """How many rounds of timing there are."""
    h100: bool = False
    """Steps are compiled for an H100, which need not be there, and counted, not timed."""

    def unread(self) -> tuple[str, ...]:
        return ("rounds",) if self.h100 else ()


def study(config: Config, histories: Histories) -> Study:
    """Measures each network that no earlier run has measured."""
    del histories
    if config.h100:
        return gpu_programs.study(config.networks, config.out)
    found = {}
    for name in config.networks:
        path = config.out / f"{name}.json"
        if not path.exists():
            records.write_json(path, measure(name, config.rounds))
        found[name] = records.read_json(path)
    return report(config, found)


def measure(network: str, rounds: int) -> Measured:
    """Everything of one network: for each rule its program and its step."""
    begun = {name: one for name, setting in RULES.items() if (one := start(WORKLOADS[network], setting))}
    limit = ceilings.measure()
    found: Measured = {name: _counted(one, limit) for name, one in begun.items()}
    runs = {name: one.run for name, one in begun.items()} | _peers(network)
    for run in runs.values():
        run()
    for name, times in timing.interleaved(runs, rounds, PLAIN).items():
        found.setdefault(name, {})["step"] = times
    return found


def _counted(one: Started, limit: ceilings.Ceilings) -> dict[str, float]:
    gigaflops, gigabytes = one.flops / 1e9, one.moved / 1e9
    counts = {"gigaflops": gigaflops, "gigabytes": gigabytes, "mebibytes": one.temporary / 2**20}
    return counts | limit.times(gigaflops, gigabytes)


def _peers(network: str) -> dict[str, Any]:
    if find_spec("torch") is None:
        return {}
    peers = import_module("experiments.benchmarks.peers")
    inputs, labels = (np.asarray(one) for one in WORKLOADS[network].data())
    return peers.steps(network, inputs, labels) if network in peers.STAGES else {}


def report(config: Config, found: dict[str, Measured]) -> Study:
    """The figure of times, and a table for each network."""
    drawn = Figure(figsize=(10.4, 3.8), layout="constrained")
    for axes, name in zip(drawn.subplots(1, len(config.networks), squeeze=False)[0], config.networks, strict=True):
        bars.draw(axes, {rule: one["step"] for rule, one in found[name].items()}, f"{name}: a step")
    caption = f"Times as multiples of {PLAIN}'s, with the quartiles over {config.rounds} rounds."
    tables = [Table(f"{name}, a step", step_rows(one)) for name, one in found.items()]
    return Study(drawn, caption, tables, findings(found), found)


def findings(found: dict[str, Measured]) -> list[tuple[str, str]]:
    """What came of it, for every network."""
    said = "the time of plain Flax: a step of"
    return [
        (f"{rules[rule]['step']['ratio']:.2f}x", f"{said} {rule}, {network}.")
        for network, rules in found.items()
        for rule in ("FA", "DFA")
    ]


def step_rows(rules: Measured) -> list[list[str]]:
    """One network's table of steps: ratios, and what the compiled program takes."""
    table = [["", "step", "quartiles", "milliseconds", "as a product", "as a copy", "GFLOP", "GB", "MiB"]]
    for name, one in rules.items():
        step = one["step"]
        spread = f"{step['low']:.2f} to {step['high']:.2f}"
        row = [name, f"{step['ratio']:.2f}", spread, f"{step['milliseconds']:.1f}"]
        counts = (("product", 1), ("copy", 1), ("gigaflops", 2), ("gigabytes", 2), ("mebibytes", 1))
        table.append([*row, *(f"{one[key]:.{digits}f}" if key in one else "" for key, digits in counts)])
    return table


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(),
        "long": Config(rounds=50),
        "gpu": Config(networks=LARGE),
        "h100": Config(networks=LARGE, h100=True),
    },
    Page("What does a step cost?"),
    study=study,
)
