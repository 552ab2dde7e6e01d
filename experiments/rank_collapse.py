"""Rank collapse of feedback alignment: how many directions its errors and updates span, and what gives them back."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optax
from flax import nnx
from rich.progress import Progress
from threadpoolctl import threadpool_limits

import jaxfa
from experiments import data, rank_report, records, spectra
from experiments.optimizers import beside_adam, hidden_kernels, muon
from experiments.ranks import RankTrainer
from experiments.switchable import CNN, INITIALIZER, ResNet18
from experiments.train import train
from experiments.trainer import Loop, Task

NetworkName = Literal["cnn", "resnet18"]
ArmName = Literal[
    "bp",
    "bp-norm",
    "fa",
    "fa-fast",
    "fa-muon",
    "fa-norm",
    "fa-norm-muon",
    "bp-norm-rank-1",
    "bp-norm-rank-2",
    "bp-norm-rank-5",
    "fa-norm-flat",
    "fa-norm-sized",
]


class Network(NamedTuple):
    """What is trained on what.

    Attributes:
      make: ``(shape, classes, widths, *, normalised, rngs) -> module``.
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
        CNN,
        "cifar10",
        "layers/0",
        {"bp": 0.03, "bp-norm": 0.03, "fa": 0.001, "fa-muon": 0.002, "fa-norm": 0.03, "fa-norm-muon": 0.05},
    ),
    "resnet18": Network(
        ResNet18,
        "cifar100",
        "stem",
        {"bp": 0.03, "bp-norm": 0.1, "fa": 0.01, "fa-muon": 0.02, "fa-norm": 0.1, "fa-norm-muon": 0.02},
    ),
}


class Arm(NamedTuple):
    """One training.

    Attributes:
      rule: ``fa`` or ``bp``.
      normalised: whether the network has batch normalisation.
      optimizer: ``(config, hidden, rate) -> optax transformation``.
      rate_of: the arm whose learning rate it has; None for one of its own.
    """

    rule: Literal["fa", "bp"]
    normalised: bool
    optimizer: Callable[..., optax.GradientTransformation]
    rate_of: ArmName | None = None


def by_sgd(config: "Config", hidden: Any, rate: Any, change: Any = None) -> optax.GradientTransformation:
    """SGD with momentum and an L2 penalty; ``change(hidden=...)`` is what changes the update's spectrum."""
    momentum = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.trace(0.9))
    changes = [change(hidden=hidden)] if change else []
    return optax.chain(momentum, *changes, optax.scale_by_learning_rate(rate))


def by_muon(config: "Config", hidden: Any, rate: Any) -> optax.GradientTransformation:
    """Muon with Adam beside it."""
    adam_rate = config.schedule(config.adam_rate)
    return muon(rate, hidden, adam_rate=adam_rate, weight_decay=config.weight_decay)


def by_size(config: "Config", hidden: Any, rate: Any) -> optax.GradientTransformation:
    """Muon but for its orthogonalisation, with Adam beside it."""
    decay = optax.add_decayed_weights(config.weight_decay)
    sized = optax.chain(spectra.sized_as_muon(hidden), decay, optax.scale_by_learning_rate(rate))
    adam_rate = config.schedule(config.adam_rate)
    return beside_adam(sized, hidden, adam_rate=adam_rate, weight_decay=config.weight_decay)


ARMS: dict[ArmName, Arm] = {
    "bp": Arm("bp", False, by_sgd),
    "bp-norm": Arm("bp", True, by_sgd),
    "fa": Arm("fa", False, by_sgd),
    "fa-fast": Arm("fa", False, by_sgd, "bp"),
    "fa-muon": Arm("fa", False, by_muon),
    "fa-norm": Arm("fa", True, by_sgd),
    "fa-norm-muon": Arm("fa", True, by_muon),
    "bp-norm-rank-1": Arm("bp", True, partial(by_sgd, change=partial(spectra.truncated, 1)), "bp-norm"),
    "bp-norm-rank-2": Arm("bp", True, partial(by_sgd, change=partial(spectra.truncated, 2)), "bp-norm"),
    "bp-norm-rank-5": Arm("bp", True, partial(by_sgd, change=partial(spectra.truncated, 5)), "bp-norm"),
    "fa-norm-flat": Arm("fa", True, partial(by_sgd, change=spectra.flattened), "fa-norm"),
    "fa-norm-sized": Arm("fa", True, by_size, "fa-norm-muon"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The network, the arms, and for how long."""

    network: NetworkName = "cnn"
    """A convolutional network on CIFAR-10, or ResNet-18 on CIFAR-100."""
    arms: tuple[ArmName, ...] = tuple(ARMS)
    """The trainings: a rule, with or without normalisation, by SGD unless Muon is named; then the controls."""
    widths: tuple[int, ...] = (16, 32, 64, 64)
    """Channels of the convolutions, or of the stages."""
    epochs: int = 10
    """How many epochs, after each of which all is measured."""
    steps: int | None = 60
    """Steps of an epoch; by default as many as its images fill."""
    images: int | None = 10_000
    """How many of the training images; None is all."""
    test_images: int | None = 2_000
    """How many of the test images; None is all."""
    batch: int = 64
    """Examples per step."""
    rate: float | None = None
    """Learning rate of every arm before its cosine decay; by default what was found for each."""
    adam_rate: float = 1e-3
    """Of Adam beside Muon, before it decays."""
    weight_decay: float = 5e-4
    """SGD's L2 penalty; with Muon and Adam decoupled, times the learning rate."""
    window: int = 100
    """Steps of which the trajectory's rank is."""
    sketch: int = 4096
    """Numbers that are kept of a layer's update for it."""
    probe: int = 128
    """Images that the ranks within a batch are of."""
    seeds: int = 1
    """How many trainings of each arm, side by side."""
    seed: int = 0
    """The first seed; the others follow it."""
    split: Literal["test", "validation"] = "test"
    """What accuracy is of: the test set, or a tenth of the training set held out, for every choice that is tuned."""
    loop: Loop = "auto"
    """One compiled step per batch or a scan over many; auto chooses by the backend. Both draw the same numbers."""
    save_every: int = 10
    """Epochs from one checkpoint to the next; the last is always saved."""
    out: Path = Path("runs/rank_collapse")
    """The folder of the results; a killed run goes on from its last checkpoint there."""
    data: Path | None = None
    """The folder of the cached data sets; by default what JAXFA_DATA names, else ./data."""
    fresh: bool = False
    """Whether to delete the results that are there."""

    def __post_init__(self) -> None:
        sizes = ("epochs", "steps", "images", "test_images", "batch", "window", "sketch", "probe", "seeds")
        records.refuse_below_one(self, *sizes, "save_every")
        if not self.arms:
            raise ValueError(f"arms must name one of {', '.join(ARMS)}, or more.")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate}.")

    def total(self) -> int:
        """All steps of a training."""
        filled = (self.images or 50_000) // self.batch
        return self.epochs * min(self.steps or filled, filled)

    def schedule(self, rate: float) -> optax.Schedule:
        """A learning rate that falls to a hundredth; at zero there would be no update to measure."""
        return optax.cosine_decay_schedule(rate, self.total(), alpha=0.01)


PRESETS = {
    "cpu": Config(),
    "paper": Config(
        network="resnet18",
        arms=("bp", "bp-norm", "fa", "fa-muon", "fa-norm", "fa-norm-muon"),
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
      FloatingPointError: if a training diverges.
    """
    dataset = data.load(NETWORKS[config.network].data, config.data)
    if config.split == "validation":
        dataset = data.hold_out(dataset)
    dataset = data.on_device(data.first(dataset, config.images, config.test_images))
    ignored = ("arms", "loop", "save_every", "out", "data", "fresh")
    identity = records.identity("rank_collapse", config, ignored)
    records.open_run(config.out, identity, fresh=config.fresh)
    seeds = range(config.seed, config.seed + config.seeds)
    histories: dict[str, Any] = {}
    # LAPACK's threads spin while they wait, which on a shared machine makes seconds of a small SVD's milliseconds.
    with threadpool_limits(1), Progress() as progress:
        for name in config.arms:
            trainer = RankTrainer(task(config, name, dataset), seeds, config.loop, probe=config.probe)
            histories[name] = train(
                trainer,
                config.epochs,
                folder=config.out / name,
                config=identity | {"arm": name},
                save_every=config.save_every,
                progress=progress,
            )
    return rank_report.write(config.out, config.network, histories)


def task(config: Config, name: ArmName, dataset: data.Dataset) -> Task:
    """The training of one arm."""
    arm, network = ARMS[name], NETWORKS[config.network]
    shape, classes = dataset.train_images.shape[1:], dataset.classes

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return network.make(shape, classes, config.widths, normalised=arm.normalised, rngs=rngs)

    hidden = hidden_kernels(nnx.eval_shape(lambda: make(nnx.Rngs(0))), but=(network.first, "head"))
    rate = config.schedule(config.rate or network.rates[arm.rate_of or name])
    remember = spectra.remember(config.window, config.sketch, hidden)
    return Task(
        make=make,
        # The paper draws feedback as it draws weights.
        rule=jaxfa.fa(distribution=INITIALIZER) if arm.rule == "fa" else jaxfa.backprop(),
        optimizer=optax.chain(remember, arm.optimizer(config, hidden, rate), remember),
        data=dataset,
        batch=config.batch,
        steps=config.steps,
    )
