"""What SSA costs as ranks fall: operations, memory and time of a step, beside backpropagation's and DFA's.

Claim (Roy, Apolinario, Das Biswas and Roy 2025): the fewest operations at inference; an earlier version promised 50 to
75 % less memory and computation.

Command: ``python -m experiments run ssa_cost`` (``--preset paper`` for the published set-up).

A factored layer is cheaper than a dense one only below the rank ``n m / (n + m)``, half of full rank for a square one;
at full rank it costs twice as much. So all depends on how early ranks fall. They are those of a training by parallel
SSA; at each epoch the step is counted by XLA (:func:`jaxfa.diagnostics.flops`) at these ranks. Inference is the forward
pass. Memory is what training keeps from step to step: weights, feedback, optimizer state, statistics, without
activations.

Measured with the preset ``cpu`` (the network of three convolutions, 16 to 64 channels; 4000 training and the first
2000 test images, 6 epochs of 62 steps, one seed and so no deviation; backpropagation is 1; time is the median of 15
interleaved rounds), in 30 min on two CPU cores that a dozen other processes kept busy:

=======================  =========  =============  ===========  ====
.                        inference  training step  memory kept  time
=======================  =========  =============  ===========  ====
DFA                      1.00       .74            1.53         1.00
SSA, first epoch         1.50       1.97           2.21         3.28
SSA, last epoch          .80        1.02           1.80         2.26
SSA, 1/2 of full rank    .76        .99            1.42         2.31
SSA, 1/4 of full rank    .40        .52            .99          1.77
SSA, 1/8 of full rank    .22        .30            .81          .96
=======================  =========  =============  ===========  ====

The three convolutions' ranks fell from 9, 48, 96 to 8, 24, 48 in the third epoch, when pruning begins, and to 8, 24, 40
in the fourth. So a fifth of inference is saved in the end, but nothing of the training step, which counts twice
backpropagation's until the third epoch is over, and no memory: the feedback is kept beside the weights, and the head,
which has 63 % of these, has ten outputs and stays at rank 10. Accuracy falls from 33.6 to 26.5 % at the first pruning,
and ends at 43.4 %. The step gets faster by a third, and is slower than its operations say.

Hoyer's weight is chosen by the validation split, same set-up: at 1, with 95 % of the energy kept, 42.6 % at these
ranks; without any pruning 43.4 %. Two others were stopped early: at .03 (Yang et al.'s) with 90 %, ranks 8, 32, 56
and 31.7 % after four epochs (37.1 % at 1 and 95 %); at 1 with 90 % ranks 8, 24, 40 and 24.6 % after three (26.1 %). At
.03 with 95 % ranks hardly fall, to 80 in the third convolution alone (:mod:`experiments.ssa.cifar10`). The preset
``paper`` has not been run.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import jaxfa
import jaxfa.nn
from experiments.common import data, figures, operations, records, sweep, timing
from experiments.common.task import Task
from experiments.common.trainer import Trainer
from experiments.ssa import arms as ssa_arms
from experiments.ssa.arms import NetworkName

LINES = {"inference": "inference", "training": "training step", "memory": "memory kept"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ssa_arms.Config):
    """The network."""

    network: NetworkName = "vgg13"
    """The network to train."""
    fractions: tuple[float, ...] = (0.5, 0.25, 0.125)
    """Parts of full rank, at each of which a step is counted and timed as if every layer had fallen to it."""
    out: Path = Path("runs/ssa_cost")
    """The folder of the results."""

    arms = ("fractions",)

    def unread(self) -> tuple[str, ...]:
        return "apart", "minutes", "only"


PRESETS = {
    "cpu": Config(
        network="smallconv",
        epochs=6,
        images=4000,
        test_images=2000,
        **(ssa_arms.CPU | {"hoyer": 1.0, "multiple": 8}),
    ),
    "paper": Config(**ssa_arms.PAPER, seeds=1, out=Path("runs/ssa_cost-paper")),
}


def run(config: Config) -> Path:
    """Trains by SSA, counts each epoch's step, times the first and the last.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.

    Raises:
      FloatingPointError: if the training diverged.
    """
    dataset = sweep.prepare(config, data.load("cifar10", config.data))
    bp = ssa_arms.dense(config.network, config, dataset, jaxfa.backprop())
    dfa = ssa_arms.dense(config.network, config, dataset, jaxfa.dfa(), taps=True)
    ssa = ssa_arms.ssa(config.network, config, dataset, jaxfa.ssa(beta=config.beta))
    fallen = {f"{fraction:g} of full rank": at_fraction(ssa, fraction) for fraction in config.fractions}
    trained = list(sweep.train_each(config, sweep.open_run(config), {"ssa": ssa}))
    figures.refuse_nothing(config.out, trained)
    ranks = [{layer: int(max(of)) for layer, of in record["rank"].items()} for record in trained[0].history]
    costs = {"backpropagation": cost(bp), "DFA": cost(dfa)}
    counted: dict[tuple[int, ...], dict[str, float]] = {}
    for one in ranks:
        key = tuple(one.values())
        counted[key] = counted.get(key) or cost(at_ranks(ssa, one))
    curve = [counted[tuple(one.values())] for one in ranks]
    costs |= {"SSA, first epoch": curve[0], "SSA, last epoch": curve[-1]}
    costs |= {f"SSA, {name}": cost(task) for name, task in fallen.items()}
    tasks = {"backpropagation": bp, "DFA": dfa, "SSA, first epoch": ssa, "SSA, last epoch": at_ranks(ssa, ranks[-1])}
    tasks |= {f"SSA, {name}": task for name, task in fallen.items()}
    timed = {name: Trainer(task, [config.seed], config.loop) for name, task in tasks.items()}
    times = timing.measure(timed, config.out / "timing.json", reference="backpropagation")["steps"]
    found = {"costs": costs, "curve": curve, "ranks": ranks, "times": times}
    records.write_json(config.out / "results.json", found)
    return write(config.out, **found)


def at_ranks(task: Task, ranks: dict[str, int]) -> Task:
    """The same training, starting at the given rank of each layer."""

    def make(rngs: nnx.Rngs) -> Any:
        model = task.make(rngs)
        for layer, rank in ranks.items():
            model = jaxfa.nn.factorise(model, rank, at=layer)
        return model

    return task._replace(make=make)


def at_fraction(task: Task, fraction: float) -> Task:
    """The same training, every layer starting at a fraction of its full rank."""
    return task._replace(make=lambda rngs: jaxfa.nn.factorise(task.make(rngs), fraction))


def cost(task: Task) -> dict[str, float]:
    """Operations of the forward pass and of a training step, and bytes kept from step to step."""
    counted = operations.count(task)
    state: Any = Trainer(task, [0]).init()
    kept = jax.tree.leaves((state.params, state.feedback, state.rest, state.optimizer))
    arrays = [leaf for leaf in kept if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return {
        "inference": counted.forward,
        "training": counted.step,
        "memory": float(sum(leaf.nbytes for leaf in arrays)),
    }


def write(folder: Path, costs: Any, curve: Any, ranks: Any, times: Any) -> Path:
    """Draws each cost over training as a multiple of backpropagation's, and the table of the first and the last epoch.

    Args:
      folder: where to.
      costs: of each row of the table.
      curve: of SSA, after each epoch.
      ranks: of each layer, after each epoch.
      times: of a step, from :func:`experiments.common.timing.measure`.

    Returns:
      The path of the page.
    """
    bp, dfa = costs["backpropagation"], costs["DFA"]
    with figures.style():
        drawn = Figure(figsize=(10.4, 2.9), layout="constrained")
        panels = drawn.subplots(1, 4)
        for axes, (key, title) in zip(panels, LINES.items(), strict=False):
            axes.plot([one[key] / bp[key] for one in curve], "o-", color=figures.BLUE, markersize=3, label="SSA")
            axes.axhline(dfa[key] / bp[key], color=figures.VERMILLION, label="DFA")
            axes.axhline(1, color=figures.GREY, label="backpropagation")
            axes.set_title(title, color=figures.INK)
            axes.set_ylim(bottom=0)
        for layer in ranks[0]:
            panels[3].plot([one[layer] / ranks[0][layer] for one in ranks], color=figures.INK, linewidth=0.8)
        panels[3].set_title("ranks, of full rank", color=figures.INK)
        panels[3].set_ylim(0, 1.05)
        for axes in panels:
            axes.set_xlabel("epoch")
        panels[0].set_ylabel("backpropagation = 1")
        panels[0].legend(fontsize=8)
    table = [["backpropagation = 1", *LINES.values(), "time of a step"]]
    for name, one in costs.items():
        table.append([name, *(f"{one[key] / bp[key]:.2f}" for key in LINES), f"{times[name]['ratio']:.2f}"])
    mean = float(np.mean([ranks[-1][layer] / ranks[0][layer] for layer in ranks[0]]))
    table.append(["ranks at the end, of full rank", f"{mean:.2f}", "", "", ""])
    caption = "Operations by XLA's count, bytes kept between steps, and ranks of parallel SSA over its training."
    return figures.write(folder, drawn, title="What falling ranks save", caption=caption, table=table)
