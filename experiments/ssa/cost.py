"""What SSA costs as ranks fall: operations, memory and time of a step, beside backpropagation's and DFA's.

Claim (Roy, Apolinario, Das Biswas and Roy 2025): the fewest operations at inference; an earlier version promised 50 to
75 % less memory and computation.

Command: ``python -m experiments run ssa_cost`` , 30 minutes; ``--preset paper`` for the published set-up.

A factored layer is cheaper than a dense one only below the rank ``n m / (n + m)``, half of full rank for a square one;
at full rank it costs twice as much. So all depends on how early ranks fall. They are those of a training by parallel
SSA; at each epoch the step is counted by XLA (:func:`jaxfa.diagnostics.flops`) at these ranks. Inference is the forward
pass. Memory is what training keeps from step to step: weights, feedback, optimizer state, statistics, without
activations.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import jaxfa
import jaxfa.nn
from experiments.common import operations, plots, timing
from experiments.common.experiment import Arm, Experiment, Histories, Page, Study, Table, load
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

    arms = ("fractions",)


def arms(config: Config) -> Iterator[Arm]:
    """The one training, along which ranks fall."""
    yield Arm("ssa", "SSA", None, _ssa(config))


def _ssa(config: Config) -> Task:
    return ssa_arms.ssa(config.network, config, load(config, "cifar10"), jaxfa.ssa(beta=config.beta))


def study(config: Config, histories: Histories) -> Study:
    """Counts each epoch's step at its ranks, times the first and the last."""
    ssa = _ssa(config)
    bp = ssa_arms.dense(config.network, config, ssa.data, jaxfa.backprop())
    dfa = ssa_arms.dense(config.network, config, ssa.data, jaxfa.dfa(), taps=True)
    fallen = {f"SSA, {fraction:g} of full rank": at_fraction(ssa, fraction) for fraction in config.fractions}
    ranks = [{layer: int(max(of)) for layer, of in record["rank"].items()} for record in histories["ssa"]]
    counted: dict[tuple[int, ...], dict[str, float]] = {}
    for one in ranks:
        key = tuple(one.values())
        counted[key] = counted.get(key) or cost(at_ranks(ssa, one))
    curve = [counted[tuple(one.values())] for one in ranks]
    tasks = {"backpropagation": bp, "DFA": dfa, "SSA, first epoch": ssa, "SSA, last epoch": at_ranks(ssa, ranks[-1])}
    costs = {"backpropagation": cost(bp), "DFA": cost(dfa), "SSA, first epoch": curve[0], "SSA, last epoch": curve[-1]}
    costs |= {name: cost(task) for name, task in fallen.items()}
    timed = {name: Trainer(task, [config.seed], config.loop) for name, task in (tasks | fallen).items()}
    times = timing.measure(timed, config.out / "timing.json", reference="backpropagation")["steps"]
    return Study(
        draw(costs, curve, ranks),
        "Operations by XLA's count, bytes kept between steps, and ranks of parallel SSA over its training.",
        [Table("Backpropagation = 1", rows(costs, ranks, times))],
        numbers={"costs": costs, "curve": curve, "ranks": ranks, "times": times},
    )


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


def draw(costs: Any, curve: Any, ranks: Any) -> Figure:
    """Each cost over training as a multiple of backpropagation's, and the ranks."""
    bp, dfa = costs["backpropagation"], costs["DFA"]
    drawn = Figure(figsize=(10.4, 2.9), layout="constrained")
    panels = drawn.subplots(1, 4)
    for axes, (key, title) in zip(panels, LINES.items(), strict=False):
        axes.plot([one[key] / bp[key] for one in curve], "o-", color=plots.BLUE, markersize=3, label="SSA")
        axes.axhline(dfa[key] / bp[key], color=plots.VERMILLION, label="DFA")
        axes.axhline(1, color=plots.GREY, label="backpropagation")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    for layer in ranks[0]:
        panels[3].plot([one[layer] / ranks[0][layer] for one in ranks], color=plots.INK, linewidth=0.8)
    panels[3].set_title("ranks, of full rank")
    panels[3].set_ylim(0, 1.05)
    for axes in panels:
        axes.set_xlabel("epoch")
    panels[0].set_ylabel("backpropagation = 1")
    panels[0].legend()
    return drawn


def rows(costs: Any, ranks: Any, times: Any) -> list[list[str]]:
    """Each cost of every step as a multiple of backpropagation's."""
    bp = costs["backpropagation"]
    table = [["", *LINES.values(), "time of a step"]]
    for name, one in costs.items():
        table.append([name, *(f"{one[key] / bp[key]:.2f}" for key in LINES), f"{times[name]['ratio']:.2f}"])
    mean = float(np.mean([ranks[-1][layer] / ranks[0][layer] for layer in ranks[0]]))
    return [*table, ["ranks at the end, of full rank", f"{mean:.2f}", "", "", ""]]


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(
            network="smallconv",
            epochs=6,
            images=4000,
            test_images=2000,
            **(ssa_arms.CPU | {"hoyer": 1.0, "multiple": 8}),
        ),
        "paper": Config(**ssa_arms.PAPER, seeds=1),
    },
    Page(
        "What do falling ranks save?",
        "Operations, memory and time of a training step as SSA's ranks fall, beside backpropagation's and DFA's. The "
        "paper: the fewest operations at inference; an earlier version promised 50 to 75 % less memory and "
        "computation.",
    ),
    arms,
    study,
)
