"""What low-dimensional feedback saves: operations of the backward pass, time of a step, operations to an accuracy.

Claim (Hanut and Kadmon 2025): up to 20 % less computation; operations to a given accuracy against the rank make a U.

Command: ``python -m experiments run ldfa_cost``

Operations are XLA's count on the compiled step (:func:`jaxfa.diagnostics.flops`): forward, backward with the signals of
``P`` and ``Q``, update. Two networks at the published sizes: a fully connected one, and a VGG-like one whose classifier
keeps backpropagation. No rule can go below the floor, the weights' gradients alone: half of backpropagation's
backward where every layer sends an error, more in a network whose first layer, which sends none, is the widest.

To an accuracy: operations per step times steps to the first epoch at whose end the test accuracy reaches one target,
the same for every rank. The published count lets each run aim at 0.9 of its own final accuracy, which favours ranks
that end low.

Measured with the preset ``cpu`` on two cores of a shared machine, 15 to 25 min; backpropagation is 1. A step's time is
the median of 15 interleaved rounds; the VGG-like network's varied by a tenth:

==========================  ====  ====  ====  ====  =====  =====
rank / outputs              1     1/2   1/4   1/8   1/16   floor
==========================  ====  ====  ====  ====  =====  =====
mlp: backward, P, Q learn   3.18  1.75  1.21  .99   .89    .80
mlp: backward, both fixed   1.20  1.00  .90   .85   .83    .80
mlp: time of a step         1.38  1.19  1.07  1.03  1.02
VGG: backward, P, Q learn   1.35  .91   .70   .60   .56    .50
VGG: backward, both fixed   1.08  .80   .65   .58   .54    .50
VGG: time of a step         1.13  .98   .91   .88   .87
==========================  ====  ====  ====  ====  =====  =====

At a quarter of the outputs the VGG-like network's backward is .698. The times are from before Oja's last product took
its shorter side, which is .4 % of these operations.

To 42 % in the fully connected network (10,000 images, 2 seeds, resolved to an epoch of 78 steps), as multiples of
backpropagation's 0.29 TFLOP: rank 2 and 4 not reached in 20 epochs, 10: 1.51 +- .00, 32: 1.41 +- .22, 64: 1.33 +- .00,
128: 1.68 +- .26. So there is a U, but all of it lies above backpropagation, which needs fewer steps: at one target for
all, the published saving of 20 % is not seen. The last epoch's accuracy was 50.3 +- .4 %, and from rank 2 to 128 31.9,
39.5, 48.7, 49.5, 50.3, 50.5. ``P``'s rate is :mod:`experiments.ldfa.rank_mlp`'s. The preset ``paper`` has not been run.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

import jaxfa
from experiments.common import data, operations, records, sweep, timing
from experiments.common.optimizers import adam
from experiments.common.task import Task
from experiments.common.trainer import Trainer
from experiments.ldfa import cost_report
from experiments.ldfa.rank_mlp import FEEDBACK_RATE
from experiments.models.networks import MLP
from experiments.models.vgg import VGG

NetworkName = Literal["mlp", "vgg"]
BATCHES: dict[NetworkName, int] = {"mlp": 128, "vgg": 64}
LEARNED = {
    "P and Q learned": (True, True),
    "Q learned": (False, True),
    "P learned": (True, False),
    "both fixed": (False, False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(sweep.Options):
    """The ranks, and what to reach."""

    networks: tuple[NetworkName, ...] = ("mlp", "vgg")
    """The networks whose steps are counted and timed."""
    fractions: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    """Ranks at which steps are counted and timed, as fractions of each layer's outputs."""
    ranks: tuple[int, ...] = (2, 4, 10, 32, 64, 128)
    """Ranks at which the fully connected network is trained."""
    target: float = 0.42
    """The test accuracy to reach, from 0 to 1."""
    images: int | None = 10_000
    """How many of the training images to take; None takes all."""
    test_images: int | None = 5_000
    """How many of the test images to take; None takes all."""
    epochs: int = 20
    """Passes over the training images, at most."""
    width: int = 512
    """Units of a hidden layer of the fully connected network."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each pair of convolutions in the VGG-like network."""
    learning_rate: float = 6e-4
    """The learning rate of Adam; each epoch multiplies it by 0.975."""
    feedback_rate: float = FEEDBACK_RATE
    """The learning rate of P, the projection of the error."""
    seeds: int = 2
    """How many trainings each rank has, side by side."""
    out: Path = Path("runs/ldfa_cost")
    """The folder of the results; a run that was killed goes on from its last checkpoint there."""

    arms = ("networks", "ranks", "target")

    def unread(self) -> tuple[str, ...]:
        """The sizes of what is not counted."""
        return (() if self.networks else ("fractions",)) + (() if "vgg" in self.networks else ("widths",))

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_empty(self, "ranks")
        if not self.fractions or min(self.fractions) <= 0 or max(self.fractions) > 1:
            raise ValueError(f"fractions must be in (0, 1], got {self.fractions}.")
        if not 0 < self.target < 1:
            raise ValueError(f"target must be an accuracy between 0 and 1, got {self.target}.")
        records.refuse_below_one(self, "width")


PRESETS = {
    "cpu": Config(),
    "paper": Config(target=0.58, images=None, test_images=None, epochs=160, seeds=5, out=Path("runs/ldfa_cost-paper")),
}


def run(config: Config) -> Path:
    """Counts, times and trains; writes the figure and the tables.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.

    Raises:
      ValueError: if the folder holds another configuration's results.
      FileNotFoundError: if CIFAR-10 is not there.
    """
    dataset = sweep.prepare(config, data.load("cifar10", config.data))
    identity = sweep.open_run(config)
    steps: dict[str, Any] = {name: step_costs(config, name, dataset) for name in config.networks}
    curve = reach(config, dataset, identity)
    records.write_json(config.out / "results.json", {"steps": steps, "reach": curve})
    return cost_report.write(config.out, steps, curve, config.target)


def task(config: Config, name: NetworkName, dataset: data.Dataset, rule: jaxfa.Rule | None) -> Task:
    """The training of one network by one rule; None is backpropagation."""
    shape, classes, batch = dataset.train_images.shape[1:], dataset.classes, BATCHES[name]
    makers: dict[NetworkName, Callable[[nnx.Rngs], nnx.Module]] = {
        "mlp": lambda rngs: MLP(shape, classes, (config.width,) * 3, normalised=True, rngs=rngs),
        "vgg": lambda rngs: VGG(shape, classes, widths=config.widths, rngs=rngs),
    }
    steps = len(dataset.train_labels) // batch
    convolutions = name == "vgg" and rule is not None
    return Task(
        make=makers[name],
        rule=rule or jaxfa.backprop(),
        optimizer=adam(config.learning_rate, weight_decay=4e-4, decay=0.975, steps=steps),
        data=dataset,
        batch=batch,
        at=("blocks/*",) if convolutions else None,
        allow=("classifier", "head") if convolutions else (),
    )


def step_costs(config: Config, name: NetworkName, dataset: data.Dataset) -> dict[str, Any]:
    """One network's operations and times, as multiples of backpropagation's."""
    side, classes = dataset.train_images.shape[1], dataset.classes
    if name == "mlp":
        products = operations.dense(BATCHES[name], (dataset.train_images[0].size, *[config.width] * 3, classes))
    else:
        products = operations.vgg(BATCHES[name], side, config.widths, classes)
    reference = operations.count(task(config, name, dataset, None))
    whole = operations.theory(products, None)
    lines: dict[str, Any] = {
        "floor": operations.theory(products, 0.0) / whole,
        "backward": {},
        "theory": {},
        "step": [],
    }
    trainers = {"bp": Trainer(task(config, name, dataset, None), [config.seed], config.loop)}
    for label, (learn_p, learn_q) in LEARNED.items():
        lines["backward"][label], lines["theory"][label] = [], []
        for fraction in config.fractions:
            chosen = task(config, name, dataset, rule(config, fraction, learn_p, learn_q))
            found = operations.count(chosen)
            lines["backward"][label].append(found.backward / reference.backward)
            by_theory = operations.theory(products, fraction, learn_p=learn_p, learn_q=learn_q)
            lines["theory"][label].append(by_theory / whole)
            if learn_p and learn_q:
                lines["step"].append(found.step / reference.step)
                trainers[str(fraction)] = Trainer(chosen, [config.seed], config.loop)
    times = timing.measure(trainers, config.out / f"timing-{name}.json", reference="bp")["steps"]
    return lines | {"fractions": config.fractions, "time": times, "reference": reference._asdict()}


def rule(config: Config, rank: float, learn_p: bool = True, learn_q: bool = True) -> jaxfa.Rule:
    """Low-rank feedback whose decay is the optimizer's L2 penalty, for Q as for the weights."""
    rate = config.feedback_rate
    return jaxfa.ldfa(rank, learn_p=learn_p, learn_q=learn_q, learning_rate=rate, weight_decay=0.0)


def reach(config: Config, dataset: data.Dataset, identity: dict[str, Any]) -> dict[str, Any]:
    """Operations to the target accuracy by backpropagation and at every rank, one number or NaN per seed."""
    ranks = {"bp": None, **{f"rank-{rank}": rank for rank in config.ranks}}
    rules = {name: None if rank is None else rule(config, rank) for name, rank in ranks.items()}
    tasks = {name: task(config, "mlp", dataset, chosen) for name, chosen in rules.items()}
    missed = [None] * config.seeds  # as by those that diverge
    found: dict[str, Any] = {
        name: {"rank": rank, "steps": missed, "operations": missed, "accuracy": missed} for name, rank in ranks.items()
    }
    for name, _, history in sweep.train_each(config, identity, tasks):
        steps = np.array([record["step"] for record in history[1:]], float)
        accuracy = np.array([record["test_accuracy"] for record in history[1:]])
        reached = accuracy >= config.target
        first = [float(steps[i.argmax()]) if i.any() else None for i in reached.T]
        cost = operations.count(tasks[name]).step
        found[name] = {
            "rank": ranks[name],
            "steps": first,
            "operations": [None if step is None else cost * step for step in first],
            "accuracy": accuracy[-1].tolist(),
        }
    return found
