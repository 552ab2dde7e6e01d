"""Rank collapse of feedback alignment: how many directions its gradients and updates span, and what gives them back.

Claim (Boeshertz, Pascanu and Clopath 2026): errors that return through fixed random weights span fewer directions than
backpropagation's; Muon, and normalised activations, give them back, and accuracy with them, best together.

Command: ``python -m experiments run rank_collapse`` (``--preset paper``: ResNet-18 on CIFAR-100, never run).

The paper's widths, learning rates, epochs and windows are not known to us. Ranks are Roy and Vetterli's. Feedback is
drawn as weights are; every layer but the first gets it, 1x1 shortcuts included; without normalisation there is none
at all. Muon is for the kernels of hidden layers, Adam at 1e-3 for the rest. A changed spectrum keeps its matrix's norm.
Learning rates: the best on the validation split (600 steps of the first 10,000 images) among those that ended below the
loss of guessing; SGD from .1, .03, .01 (FA alone .01, .003, .001, .0003), Muon from .02, .005, .002 (with BN .05,
.02, .005: the edge). Controls have the rate of the arm that they change. Three choices came after looking: that a loss
must end below guessing's (it excludes Muon's .02 for FA, 27.7 % at its best and a loss of 28); controls with BN, since
without it a flat spectrum gained nothing (25.8 against 26.1 %); and FA at BP's rate, since at its own none collapsed.

Measured with the preset ``cpu``: widths 16 to 64, 600 steps of 64 of 10,000 images, 2000 test images (standard error
1.1 points), one seed and so no deviation; last / best of 10 epochs; ranks of the hidden layers at the end, of which a
matrix has 53 at most, a trajectory (pseudo-gradients of 100 steps) 100, a batch's errors 128. Ten minutes of processor
time, 26 on two cores that ten other processes kept busy; three processes shared the folder:

=====================  ===========  ======  ========  ======  ==========  =====================
arm                    accuracy, %  error   gradient  update  trajectory  trajectory, published
=====================  ===========  ======  ========  ======  ==========  =====================
BP                     48.5 / 48.9  105     17.5      24.5    79          about 100
BP, BN                 57.7 / 58.1  103     40.6      41.1    94
FA                     27.7 / 27.9  112     25.9      25.7    79          < 20, at the end 12
FA at BP's rate        11.2 / 13.2  53      3.4       5.3     13          < 20, at the end 12
FA, Muon               27.6 / 27.6  114     29.8      52.5    82
FA, BN                 46.2 / 46.6  110     41.5      40.7    96
FA, BN, Muon           47.1 / 47.1  112     43.5      52.5    97
BP, BN, rank 1         49.4 / 49.4  108     40.2      1.0     93
BP, BN, rank 2         49.9 / 50.1  107     38.5      2.0     93
BP, BN, rank 5         52.3 / 52.7  107     39.3      4.8     93
FA, BN, flat           47.6 / 47.6  108     42.7      52.5    96
FA, BN, Muon's size    42.0 / 43.1  112     40.8      41.4    96
=====================  ===========  ======  ========  ======  ==========  =====================

Published, ResNet-18 on CIFAR-100: FA 1.4, FA and Muon 25.3, FA and BN 37.1, all three 46.1.

The published collapse is there at backpropagation's learning rate, where the loss explodes (1e14 at the end), and not
at a rate at which FA learns: then its trajectory spans what backpropagation's does, and at a matched loss (2.15) its
gradient more (27 against 15). Normalisation doubles the gradient's rank in both rules, before the first step already
(16 to 40), and not the error's (118 to 121): what rises must be that of the activations. Muon makes no rank: it lifts
the update to nearly all that there is (52.5) by equalising a spectrum that reaches so far, and the gradient under it
gains 2 to 4. The controls have the claim's sign: backpropagation loses 5 to 8 points by truncation; FA with BN gains
1.4 by a flat spectrum and loses 4 by Muon's step sizes alone. But what is gained by Muon or a flat spectrum is within
the error of one seed, and FA with Muon alone, published far ahead of FA, is not ahead here.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import optax
from flax import nnx
from threadpoolctl import threadpool_limits

import jaxfa
from experiments.common import data, records, sweep
from experiments.common.optimizers import hidden_kernels
from experiments.common.task import Task
from experiments.models.cnn import PoolingCNN
from experiments.models.networks import ResNet
from experiments.rank_collapse import report as rank_report
from experiments.rank_collapse import spectra
from experiments.rank_collapse.arms import ARMS, ArmName
from experiments.rank_collapse.ranks import RankTrainer

NetworkName = Literal["cnn", "resnet18"]
INITIALIZER = nnx.initializers.he_normal()


class Network(NamedTuple):
    """What is trained on what.

    Attributes:
      make: ``(shape, classes, widths, *, normalised, kernel_init, rngs) -> module``.
      data: the data set's name.
      first: the path of the first layer, which Muon leaves out, as it does the head.
      rates: the learning rate of each arm.
    """

    make: Callable[..., nnx.Module]
    data: data.DatasetName
    first: str
    rates: dict[str, float]


NETWORKS: dict[NetworkName, Network] = {
    "cnn": Network(
        PoolingCNN,
        "cifar10",
        "layers/0",
        {"bp": 0.03, "bp-norm": 0.03, "fa": 0.001, "fa-muon": 0.002, "fa-norm": 0.03, "fa-norm-muon": 0.05},
    ),
    "resnet18": Network(
        partial(ResNet, repeats=2),
        "cifar100",
        "stem",
        {"bp": 0.03, "bp-norm": 0.1, "fa": 0.01, "fa-muon": 0.02, "fa-norm": 0.1, "fa-norm-muon": 0.02},
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(sweep.Options):
    """The network, the trainings, and for how long."""

    network: NetworkName = "cnn"
    """The network to train: a small convolutional one on CIFAR-10, or ResNet-18 on CIFAR-100."""
    trainings: tuple[ArmName, ...] = tuple(ARMS)
    """The arms to train: a rule, with or without normalisation, by SGD unless Muon is named; then the controls."""
    widths: tuple[int, ...] = (16, 32, 64, 64)
    """Channels of the convolutions, or of the stages."""
    epochs: int = 10
    """How many epochs there are, after each of which all is measured."""
    steps: int | None = 60
    """How many steps an epoch has; None takes as many as its images fill."""
    images: int | None = 10_000
    """How many of the training images to take; None takes all."""
    test_images: int | None = 2_000
    """How many of the test images to take; None takes all."""
    batch: int = 64
    """How many examples a step has."""
    rate: float | None = None
    """The learning rate of every arm, before its cosine decay; None takes the one that was found for each."""
    adam_rate: float = 1e-3
    """The learning rate of Adam beside Muon, before it decays."""
    weight_decay: float = 5e-4
    """The L2 penalty of SGD; with Muon and Adam the decay is decoupled and multiplied by the learning rate."""
    window: int = 100
    """How many of the last steps the trajectory's rank is measured over."""
    sketch: int = 4096
    """How many numbers the trajectory keeps of each layer's update."""
    probe: int = 128
    """How many images the ranks within a batch are measured on."""
    seeds: int = 1
    """How many trainings each arm has, side by side."""
    out: Path = Path("runs/rank_collapse")
    """The folder of the results; a run that was killed goes on from its last checkpoint there."""

    arms = ("trainings",)

    def unread(self) -> tuple[str, ...]:
        """Adam stands beside Muon alone."""
        return () if any(ARMS[name].adam for name in self.trainings) else ("adam_rate",)

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_below_one(self, "steps", "batch", "window", "sketch", "probe")
        if not self.trainings:
            raise ValueError(f"trainings must name one of {', '.join(ARMS)}, or more.")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate}.")


PRESETS = {
    "cpu": Config(),
    "paper": Config(
        network="resnet18",
        trainings=("bp", "bp-norm", "fa", "fa-muon", "fa-norm", "fa-norm-muon"),
        widths=(64, 128, 256, 512),
        epochs=100,
        steps=None,
        images=None,
        test_images=None,
        batch=128,
        seeds=3,
        out=Path("runs/rank_collapse-paper"),
    ),
}


def run(config: Config) -> Path:
    """Trains every arm, measures ranks along the way, writes the figure and the table.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.

    Raises:
      ValueError: if the folder holds another configuration's results.
      FileNotFoundError: if the data set is not there.
    """
    dataset = sweep.prepare(config, data.load(NETWORKS[config.network].data, config.data))
    tasks: dict[str, Task] = {name: task(config, name, dataset) for name in config.trainings}
    make = partial(RankTrainer, probe=config.probe)
    # LAPACK's threads spin while they wait, which on a shared machine makes seconds of a small SVD's milliseconds.
    with threadpool_limits(1):
        trained = sweep.train_each(config, sweep.open_run(config), tasks, make)
        histories = {one.name: one.history for one in trained}
    return rank_report.write(config.out, config.network, histories)


def task(config: Config, name: ArmName, dataset: data.Dataset) -> Task:
    """The training of one arm."""
    arm, network = ARMS[name], NETWORKS[config.network]
    shape, classes = dataset.train_images.shape[1:], dataset.classes

    def make(rngs: nnx.Rngs) -> nnx.Module:
        options = {"normalised": arm.normalised, "kernel_init": INITIALIZER}
        return network.make(shape, classes, config.widths, **options, rngs=rngs)

    hidden = hidden_kernels(nnx.eval_shape(lambda: make(nnx.Rngs(0))), but=(network.first, "head"))
    filled = len(dataset.train_labels) // config.batch
    total = config.epochs * min(config.steps or filled, filled)
    rate = _falling(config.rate or network.rates[arm.rate_of or name], total)
    adam = {"adam_rate": _falling(config.adam_rate, total)} if arm.adam else {}
    optimizer = arm.optimizer(hidden, rate, config.weight_decay, **adam)
    remember = spectra.remember(config.window, config.sketch, hidden)
    return Task(
        make=make,
        # The paper draws feedback as it draws weights.
        rule=jaxfa.fa(distribution=INITIALIZER) if arm.rule == "fa" else jaxfa.backprop(),
        optimizer=optax.chain(remember, optimizer, remember),
        data=dataset,
        batch=config.batch,
        steps=config.steps,
    )


def _falling(rate: float, steps: int) -> optax.Schedule:
    """A learning rate that falls to a hundredth; at zero there would be no update to measure."""
    return optax.cosine_decay_schedule(rate, steps, alpha=0.01)
