"""What a training step is compiled to for an H100, under each rule: kernels, bytes and memory, without an H100.

Kernels are what the device starts, one after the other; operations are those of products, convolutions among them;
bytes are what all kernels read and write, each array as often as it is read. Memory is what the program allocates
beside its inputs and outputs, the room that cuBLAS works in among it. A step of many small kernels takes longer than
its bytes tell. Which of its algorithms suits a product best is not tried, for which it takes the device.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from matplotlib.figure import Figure

from experiments.benchmarks import bars, h100
from experiments.benchmarks.kernels import counted
from experiments.benchmarks.workloads import PLAIN, RULES, WORKLOADS, Setting, Workload, put, runs, step_of
from experiments.common import records
from experiments.common.experiment import Study, Table

Counted = dict[str, dict[str, float]]
# What is drawn, as a multiple of plain Flax's.
DRAWN = {"moved": "bytes moved", "allocated": "memory allocated"}


def study(networks: Sequence[str], folder: Path) -> Study:
    """Counts each network that no earlier run has counted."""
    found: dict[str, Counted] = {}
    device = h100.device()
    for name in networks:
        path = folder / f"{name}.json"
        if not path.exists():
            chosen = {rule: one for rule, one in RULES.items() if runs(WORKLOADS[name], one)}
            records.write_json(path, {rule: count(WORKLOADS[name], one, device) for rule, one in chosen.items()})
        found[name] = records.read_json(path)
    return report(found)


def count(workload: Workload, setting: Setting, device: Any) -> dict[str, float]:
    """What is in the program of one step; no array is made."""
    made = []

    def make() -> Any:
        x, labels = workload.data()
        function, arrays = step_of(setting.rule, put(workload, setting, workload.make(nnx.Rngs(0)), x))
        made.append(function)
        return arrays, (x, labels, jax.random.key(2))

    where = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), jax.eval_shape(make)
    )
    compiled: Any = jax.jit(made[0], donate_argnums=0, compiler_options=h100.OPTIONS).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    return {
        **counted(compiled.as_text())._asdict(),
        "allocated": memory.temp_size_in_bytes,
        "given": memory.argument_size_in_bytes,
    }


def report(found: dict[str, Counted]) -> Study:
    """The figure of bytes and memory, and a table for each network."""
    drawn = Figure(figsize=(10.4, 6.4), layout="constrained")
    for row, (key, title) in zip(drawn.subplots(len(DRAWN), len(found), squeeze=False), DRAWN.items(), strict=True):
        for axes, (name, rules) in zip(row, found.items(), strict=True):
            bars.draw(axes, {rule: {"ratio": one} for rule, one in ratios(rules, key).items()}, f"{name}: {title}")
    caption = f"What the step's program for an H100 moves and allocates, as multiples of {PLAIN}'s."
    return Study(drawn, caption, [Table(name, rows(rules)) for name, rules in found.items()], findings(found), found)


def ratios(rules: Counted, key: str) -> dict[str, float]:
    """Each rule's count as a multiple of plain Flax's."""
    return {name: one[key] / rules[PLAIN][key] for name, one in rules.items()}


def findings(found: dict[str, Counted]) -> list[tuple[str, str]]:
    """What came of it, for every network."""
    told = []
    for network, rules in found.items():
        for rule in ("DFA", "DFA, streamed", "GrAPE"):
            if rule in rules:
                moved, allocated = (ratios(rules, key)[rule] for key in DRAWN)
                told.append(
                    (f"{allocated:.2f}x", f"the memory of plain Flax and {moved:.2f}x its bytes: {rule}, {network}.")
                )
    return told


def rows(rules: Counted) -> list[list[str]]:
    """One network's table."""
    table = [["", "kernels", "products", "GFLOP", "GB", "bytes", "MiB allocated", "memory", "MiB given"]]
    for name, one in rules.items():
        moved, allocated = (f"{ratios(rules, key)[name]:.2f}" for key in DRAWN)
        counts = f"{one['kernels']:.0f}", f"{one['products']:.0f}", f"{one['flops'] / 1e9:.1f}"
        sizes = (f"{one[key] / 2**20:.1f}" for key in ("allocated", "given"))
        table.append([name, *counts, f"{one['moved'] / 1e9:.2f}", moved, next(sizes), allocated, next(sizes)])
    return table
