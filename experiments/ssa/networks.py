"""SSA in three networks: accuracy, top-5, angles to backpropagation, ranks and costs, in all its readings.

Claim (Roy, Apolinario, Das Biswas and Roy 2025): SSA is within a point of SVD training by backpropagation in VGG-13,
four points below in ResNet-32, and about 13 points above DFA in a network of three convolutions; the alignment loss
brings the angles to backpropagation 40 to 45 degrees below DFA's; inference takes the fewest operations.

Command: ``python -m experiments run ssa_networks`` for three small networks; ``--preset betas`` for two weights of the
alignment and none; ``--preset gpu15`` for VGG-13 in a quarter of an hour on one H100; ``--preset paper`` for the
published set-up, ``--preset imagenet`` for ImageNet at 64 x 64 pixels on one accelerator of 80 GB.

The paper does not say how the output error reaches a layer, nor whether alignment moves the weights or the feedback:
all four readings are arms. In residual networks the parallel one delivers to every convolution's input, and errors go
on by the shortcuts, too; DFA delivers to the blocks' outputs. The paper names neither the losses' weights, nor epochs,
nor optimizer: those of the SVD baseline's code (Yang et al. 2020) stand in, Adam at 1e-3, batches of 100, 164 epochs,
crops and flips. Hoyer's penalty is on every tenth epoch of the first 30 %, on every one where these are two; pruning
keeps 95 % of the energy after that.

The angle is between a layer's update and backpropagation's at the same weights, on one fixed batch, a mean over the
hidden layers: of a factored layer, between all entries of ``u``, ``s``, ``v``. A factored layer is cheaper than a dense
one only below the rank ``n m / (n + m)``, half of full rank for a square one, so that all depends on how early ranks
fall. Operations are XLA's count (:func:`jaxfa.diagnostics.flops`) at the last epoch's ranks; memory is what training
keeps from step to step: weights, feedback, optimizer state, statistics, without activations.

Verdict: half of it, in short trainings of small networks. SVD training loses a little to backpropagation as ranks fall,
in the VGG-like network within the error. The sequential reading whose alignment pulls the feedback, which is weight
transport, is the best of SSA's in the convolutional networks and level with the parallel one in the fully connected
network: ahead of DFA in all, with angles half of DFA's in two of the three, and far behind SVD training. In the
sequential reading weights that are pulled to random matrices turn their updates by less, and in either they learn no
more than by DFA, and in the VGG-like network sequentially less, most likely since weights that serve the pull serve the
task less. A stronger pull of the weights does harm, of the feedback nothing. Where ranks fall most, in SVD training and
in the sequential transport, inference takes fewer operations than the dense networks'; in the parallel reading whose
weights are pulled it does so in the fully connected network alone. A training step of SSA takes more operations than
backpropagation's in every network, by the transport in the residual one hardly more, and several times as many in the
fully connected one.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import jaxfa
import jaxfa.nn
from experiments.common import data, operations, plots
from experiments.common.bounds import FROM_ZERO
from experiments.common.experiment import OWN, Arm, Experiment, Histories, Page, Study, Table, identity, load
from experiments.common.metrics import shown
from experiments.common.published import as_published
from experiments.common.task import Task
from experiments.common.trainer import Trainer
from experiments.ssa import arms as ssa_arms
from experiments.ssa.arms import LITERAL, NetworkName

# Top-1 on CIFAR-10 at 32 x 32, and whose it is. SSA has one number, which stands beside its literal reading.
PUBLISHED: dict[str, tuple[str, dict[str, float]]] = {
    "smallconv": ("an earlier version's", {LITERAL: 86.2}),
    "vgg13": (OWN, {"bp": 93.75, "svd_bp": 92.80, "predsim": 86.49, "auglocal": 93.72, LITERAL: 92.70}),
    "resnet32": (OWN, {"bp": 92.14, "svd_bp": 91.77, "predsim": 79.31, "auglocal": 93.47, LITERAL: 88.02}),
}
# One reading for either way of errors: what alignment moves costs alike, but for the feedback's own moments.
COUNTED = ("bp", "svd_bp", "dfa", LITERAL, "sequential-feedback")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ssa_arms.Config):
    """The images and the networks."""

    dataset: Literal["cifar10", "imagenet64"] = "cifar10"
    """The images to learn."""
    networks: tuple[NetworkName, ...] = ("smallconv", "vgg13", "resnet32")
    """The networks to train."""
    betas: Annotated[tuple[float, ...], FROM_ZERO] = (0.1,)
    """The weights of the alignment loss, every reading once at each."""
    costs: bool = True
    """Operations and memory are counted at the end, for which every network is compiled anew."""

    arms = ("networks",)


def arms(config: Config) -> Iterator[Arm]:
    """The arms of every network."""
    dataset = load(config, config.dataset, config.shrink)
    for name in config.networks:
        for arm, (title, task) in _tasks(config, name, dataset).items():
            yield Arm(f"{name}-{arm}", name, None, task, None, f"{name}-bp", title=title)


def _tasks(config: Config, name: NetworkName, dataset: data.Dataset) -> dict[str, tuple[str, Task]]:
    found = {
        "bp": ("Backpropagation", ssa_arms.dense(name, config, dataset, jaxfa.backprop())),
        "svd_bp": ("SVD, backpropagation", ssa_arms.svd_bp(name, config, dataset)),
        "dfa": ("DFA", ssa_arms.dense(name, config, dataset, jaxfa.dfa(), taps=True)),
        # The paper's other baselines.
        "predsim": ("PredSim", ssa_arms.dense(name, config, dataset, jaxfa.predsim(), taps=True)),
        "auglocal": ("AugLocal", ssa_arms.dense(name, config, dataset, jaxfa.auglocal(), taps=True)),
    }
    for beta in config.betas:
        several = len(config.betas) > 1
        for arm, (title, rule) in ssa_arms.readings(beta).items():
            called, said = (f"{arm}-{beta:g}", f"{title}, beta {beta:g}") if several and beta else (arm, title)
            found[called] = said, ssa_arms.ssa(name, config, dataset, rule)
    return found


def study(config: Config, histories: Histories) -> Study:
    """A table and the courses of angles and ranks for each network."""
    every = [arm for arm in arms(config) if arm.name in histories]
    groups = {name: [arm for arm in every if arm.group == name] for name in config.networks}
    ends = {arm.name: _end(histories[arm.name]) for arm in every}
    counted = [arm for arm in every if config.costs and _kind(arm) in COUNTED]
    costs = {arm.name: cost(at_ranks(arm.task, _ranks(histories[arm.name][-1]))) for arm in counted}
    return Study(
        draw(groups, histories),
        "The hidden layers' mean angle to backpropagation and, of factored networks, their mean rank as a part of "
        "full rank, over training.",
        [Table(name, _rows(config, group, ends, costs)) for name, group in groups.items()],
        findings=[found for group in groups.values() for found in _findings(group, ends)],
        numbers={"costs": costs, "ends": ends, "ranks": {name: _ranks(found[-1]) for name, found in histories.items()}},
    )


def _rows(config: Config, group: Sequence[Arm], ends: Any, costs: Any) -> list[list[str]]:
    same = as_published(EXPERIMENT, identity(EXPERIMENT.name, config))
    whose, known = PUBLISHED.get(group[0].group, ("", {})) if same else ("", {})
    heads = ["top-1, %", "top-5, %", "angle", "rank", "inference", "training step", "memory kept"]
    table = [["", *heads, *([f"top-1, published ({whose})"] if known else [])]]
    bp = costs.get(f"{group[0].group}-bp")
    for arm in group:
        end, counted = ends[arm.name], costs.get(arm.name) if bp else None
        cells = [arm.title, shown(end["top_one"], 1), shown(end["top_five"], 1), f"{np.mean(end['angle']):.0f}°"]
        cells.append(f"{end['rank']:.2f}" if end["rank"] else "")
        cells += [f"{one / bp[key]:.2f}" for key, one in counted.items()] if counted else ["", "", ""]
        table.append([*cells, *([str(known.get(_kind(arm), ""))] if known else [])])
    return table


def _kind(arm: Arm) -> str:
    return arm.name.removeprefix(f"{arm.group}-")


def _end(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The last epoch's numbers, by seed; the rank is a mean over layers, as a part of the full one."""
    full, last = _ranks(history[0]), history[-1]
    parts = [rank / full[layer] for layer, rank in _ranks(last).items()]
    return {
        "top_one": (100 * np.array(last["test_accuracy"], float)).tolist(),
        "top_five": (100 * np.array(last["top_five"], float)).tolist(),
        "angle": _angle(last).tolist(),
        "rank": float(np.mean(parts)) if parts else None,
    }


def _angle(record: dict[str, Any]) -> Any:
    """The hidden layers' mean, by seed."""
    return np.array(list(record["angle"].values())[:-1], float).mean(0)


def _ranks(record: dict[str, Any]) -> dict[str, int]:
    return {layer: int(np.max(of)) for layer, of in record.get("rank", {}).items()}


def _findings(group: Sequence[Arm], ends: Any) -> Iterator[tuple[str, str]]:
    """How the best of SSA's readings compares with DFA: in accuracy, and in angle."""
    found = {_kind(arm): arm for arm in group}
    own = [arm for arm in group if "SSA" in arm.title]
    if "dfa" not in found or not own:
        return
    for what, unit, sign, said in (("top_one", " points", 1, "accuracy"), ("angle", "°", -1, "angle")):
        dfa = np.array(ends[found["dfa"].name][what])
        gaps = {arm.title: np.array(ends[arm.name][what]) - dfa for arm in own}
        best = max(gaps, key=lambda title: sign * gaps[title].mean())
        spread = f" ± {gaps[best].std(ddof=1):.1f}" if dfa.size > 1 else ""
        yield f"{gaps[best].mean():+.1f}{spread}{unit}", f"from DFA's {said} in {group[0].group}: {best}, the best."


def at_ranks(task: Task, ranks: dict[str, int]) -> Task:
    """The same training, starting at the given rank of each layer."""

    def make(rngs: nnx.Rngs) -> Any:
        model = task.make(rngs)
        if jaxfa.factored.ranks(nnx.to_pure_dict(nnx.state(model, nnx.Param))):  # SVD training's has factors already
            model = jaxfa.nn.to_dense(model)
        for layer, rank in ranks.items():
            model = jaxfa.nn.factorise(model, rank, at=layer)
        return model

    return task._replace(make=make)


def cost(task: Task) -> dict[str, float]:
    """Operations of the forward pass and of a training step, and bytes kept from step to step."""
    counted = operations.count(task)
    _, state = jax.eval_shape(Trainer(task, [0]).begin, jax.random.key(0))
    kept = jax.tree.leaves((state.params, state.feedback, state.rest, state.optimizer))
    arrays = [leaf for leaf in kept if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
    return {"inference": counted.forward, "training": counted.step, "memory": float(size)}


def draw(groups: Mapping[NetworkName, list[Arm]], histories: Histories) -> Figure:
    """For each network the angles above, the ranks below."""
    drawn = Figure(figsize=(10.4, 4.8), layout="constrained")
    panels = drawn.subplots(2, len(groups), squeeze=False, sharex=True)
    for (name, group), (top, bottom) in zip(groups.items(), panels.T, strict=True):
        for i, arm in enumerate(group):
            color, dashes = plots.COLORS[i % len(plots.COLORS)], ("-", "--", ":")[i // len(plots.COLORS) % 3]
            history, full = histories[arm.name], _ranks(histories[arm.name][0])
            epochs = [record["epoch"] for record in history]
            if "ackpropagation" not in arm.title:
                top.plot(epochs, [_angle(record).mean() for record in history], dashes, color=color, label=arm.title)
            if full:
                parts = [np.mean([rank / full[one] for one, rank in _ranks(record).items()]) for record in history]
                bottom.plot(epochs, parts, dashes, color=color)
        top.set_title(name)
        top.set_ylim(0, 110)
        bottom.set_ylim(0, 1.05)
        bottom.set_xlabel("epoch")
    panels[0, 0].set_ylabel("angle, degrees")
    panels[1, 0].set_ylabel("rank, of full rank")
    plots.legend_below(drawn, 3)
    return drawn


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(networks=("mlp", "vgg5", "resnet8"), **ssa_arms.CPU),
        "betas": Config(networks=("resnet8",), betas=(0.0, 0.1, 1.0), costs=False, **ssa_arms.CPU),
        "gpu15": Config(networks=("vgg13",), costs=False, **ssa_arms.GPU15),
        "paper": Config(**ssa_arms.PAPER),
        "imagenet": Config(
            dataset="imagenet64", networks=("vgg13", "resnet32"), epochs=90, batch=256, seeds=1, save_every=1
        ),
    },
    Page(
        "Learning in SVD space",
        "Roy, Apolinario, Das Biswas and Roy 2025, last epoch, 5 runs; the small network is an earlier version's",
        epoch="last",
    ),
    arms,
    study,
    size=("dataset", "shrink", "scale"),
)
