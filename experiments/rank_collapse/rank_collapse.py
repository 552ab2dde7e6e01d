"""Rank collapse of feedback alignment: how many directions its errors and gradients span, and what gives them back.

Claim (Boeshertz, Pascanu and Clopath 2026): errors that return through fixed random weights span fewer directions than
backpropagation's; Muon, and normalised activations, give them back, and accuracy with them, best together.

Command: ``python -m experiments run rank_collapse``; ``--preset resnet`` for a thin ResNet-18, ``--preset gpu15`` for
normalisation with and without Muon in ResNet-18 on all of CIFAR-100, a quarter of an hour on one H100, ``--preset
paper`` for all arms of it.

The paper's widths, learning rates, epochs and windows are not known to us. Ranks are Roy and Vetterli's. Feedback is
drawn as weights are; every layer but the first gets it, 1x1 shortcuts included; without normalisation there is none at
all. Muon is for the kernels of hidden layers, Adam at 1e-3 for the rest. A changed spectrum keeps its matrix's norm.
The CNN's learning rates: the most accurate on the validation split, three seeds of the preset ``cpu`` at each: of SGD
from .03, .01, .003, .001 (FA alone .01, .003, .001, .0003; with BN .1, .03, .01), of Muon from .02, .005, .002 (with BN
.2, .1, .05, .02). One choice came after looking: FA at BP's rate. ResNet-18's without normalisation are those of least
validation loss in the thin network, one seed, at which no seed explodes: of BP's .1, .03, .01, .001, .0001 and of FA's
.001 and .0003, at which one does, .0001, 3e-5, 1e-5. Its logits start so large that BP's loss falls to that of guessing
at the first three, and FA's is closest at .0001. Its other rates are guesses.

Verdict: does not hold in the small network. At the rate at which it learns best feedback alignment's errors,
activations and gradients span as many directions as backpropagation's, within their errors, but after the last epoch
alone, where its loss is the higher: it never reaches the one at which others are compared. With normalisation, at equal
loss, its gradients span more, its errors as many over channels and hardly fewer over images. The collapse is there at
backpropagation's rate alone, where the loss explodes. Normalisation is worth much. On top of it Muon leaves gradients,
before the optimizer changes them, and activations that span more directions, and costs some points, most likely since
without a collapse there is none to undo; what it does alone is within the error. Updates of rank 1 cost backpropagation
more. In a thin ResNet-18 without normalisation, at rates of which only some were looked for, nothing learns,
backpropagation neither; with it feedback alignment learns a little, and Muon costs here, too.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_args

import optax
from flax import nnx

import jaxfa
from experiments.common import data
from experiments.common.bounds import FROM_ZERO
from experiments.common.experiment import Arm, Experiment, Histories, Page, Study, Training, identity, load
from experiments.common.optimizers import hidden_kernels, muon
from experiments.common.published import as_published
from experiments.common.task import Task
from experiments.models.cnn import PoolingCNN
from experiments.models.networks import ResNet
from experiments.rank_collapse import report as rank_report
from experiments.rank_collapse import spectra
from experiments.rank_collapse.ranks import ranks

NetworkName = Literal["cnn", "resnet18"]
ArmName = Literal[
    "bp", "bp-norm", "fa", "fa-fast", "fa-muon", "fa-norm", "fa-norm-muon", "bp-norm-rank-1", "fa-norm-flat"
]  # fmt: skip
MAIN: tuple[ArmName, ...] = get_args(ArmName)[:7]
# What each control changes of the arm whose learning rate it has.
CONTROLS: dict[str, tuple[str, Any]] = {
    "fa-fast": ("bp", None),
    "bp-norm-rank-1": ("bp-norm", partial(spectra.truncated, 1)),
    "fa-norm-flat": ("fa-norm", spectra.flattened),
}
INITIALIZER = nnx.initializers.he_normal()


class Network(NamedTuple):
    """What is trained on what.

    Attributes:
      make: ``(shape, classes, widths, *, normalised, kernel_init, rngs) -> module``.
      data: the data set's name.
      first: the path of the first layer, which Muon leaves out, as it does the head.
      blocks: where the modules are that hand activations on.
      rates: the learning rate of each arm.
    """

    make: Callable[..., nnx.Module]
    data: data.DatasetName
    first: str
    blocks: tuple[str, ...]
    rates: dict[str, float]


NETWORKS: dict[NetworkName, Network] = {
    "cnn": Network(
        PoolingCNN,
        "cifar10",
        "layers/0",
        ("layers",),
        {"bp": 0.01, "bp-norm": 0.03, "fa": 0.003, "fa-muon": 0.005, "fa-norm": 0.03, "fa-norm-muon": 0.1},
    ),
    "resnet18": Network(
        partial(ResNet, repeats=2),
        "cifar100",
        "stem",
        ("blocks",),
        {"bp": 0.01, "bp-norm": 0.1, "fa": 1e-4, "fa-muon": 0.002, "fa-norm": 0.1, "fa-norm-muon": 0.02},
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Training):
    """The network, the trainings, and for how long."""

    network: NetworkName = "cnn"
    """The network to train: a small convolutional one on CIFAR-10, or ResNet-18 on CIFAR-100."""
    trainings: tuple[ArmName, ...] = get_args(ArmName)
    """The arms to train: a rule, with or without normalisation, by SGD unless Muon is named; then the controls."""
    widths: tuple[int, ...] = (16, 32, 64, 64)
    """Channels of the convolutions, or of the stages."""
    shrink: int = 1
    """The side of the squares of pixels that are averaged."""
    epochs: int = 8
    """How many epochs there are."""
    measure_every: int = 1
    """Epochs from one measurement of ranks, which takes decompositions, to the next; the start and the end have one."""
    steps: int | None = 75
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
    weight_decay: Annotated[float, FROM_ZERO] = 5e-4
    """The L2 penalty of SGD; with Muon and Adam the decay is decoupled and multiplied by the learning rate."""
    window: int = 100
    """How many of the last steps the trajectory's rank is measured over."""
    sketch: int = 4096
    """How many numbers the trajectory keeps of each layer's update."""
    probe: int = 128
    """How many images the ranks within a batch are measured on."""

    arms = ("trainings",)

    def unread(self) -> tuple[str, ...]:
        """Adam stands beside Muon alone."""
        adam = any(name.endswith("muon") for name in self.trainings)
        return (*super().unread(), *(() if adam else ("adam_rate",)))


def arms(config: Config) -> list[Arm]:
    """Every rule, with or without normalisation, by each optimizer, and the controls."""
    dataset = load(config, NETWORKS[config.network].data, config.shrink)
    known = rank_report.PUBLISHED
    return [
        Arm(name, name, None, task(config, name, dataset), known.get(name), origin=rank_report.ORIGIN)
        for name in config.trainings
    ]


def study(config: Config, histories: Histories) -> Study:
    """The ranks along the trainings."""
    dataset = load(config, NETWORKS[config.network].data, config.shrink)
    same = as_published(EXPERIMENT, identity(EXPERIMENT.name, config))
    return rank_report.study(histories, dataset.classes, same)


def task(config: Config, name: ArmName, dataset: data.Dataset) -> Task:
    """The training of one arm."""
    network, (like, change) = NETWORKS[config.network], CONTROLS.get(name, (name, None))
    shape, classes = dataset.train_images.shape[1:], dataset.classes

    def make(rngs: nnx.Rngs) -> nnx.Module:
        options = {"normalised": "norm" in name, "kernel_init": INITIALIZER}
        return network.make(shape, classes, config.widths, **options, rngs=rngs)

    hidden = hidden_kernels(nnx.eval_shape(lambda: make(nnx.Rngs(0))), but=(network.first, "head"))
    filled = len(dataset.train_labels) // config.batch
    # To a hundredth: at zero there would be no update.
    falling = partial(
        optax.cosine_decay_schedule, decay_steps=config.epochs * min(config.steps or filled, filled), alpha=0.01
    )
    rate, decay = falling(config.rate or network.rates[like]), config.weight_decay
    if name.endswith("muon"):
        optimizer = muon(rate, hidden, adam_rate=falling(config.adam_rate), weight_decay=decay)
    else:
        changes = [change(hidden)] if change else []
        momentum = optax.chain(optax.add_decayed_weights(decay), optax.trace(0.9))
        optimizer = optax.chain(momentum, *changes, optax.scale_by_learning_rate(rate))
    return Task(
        make=make,
        # The paper draws feedback as it draws weights.
        rule=jaxfa.fa(distribution=INITIALIZER) if name.startswith("fa") else jaxfa.backprop(),
        optimizer=optax.chain(spectra.remember(config.window, config.sketch, hidden), optimizer),
        data=dataset,
        batch=config.batch,
        steps=config.steps,
        measure=partial(
            ranks, probe=config.probe, blocks=network.blocks, epochs=config.epochs, every=config.measure_every
        ),
    )


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(shrink=2, widths=(16, 32, 64)),
        "resnet": Config(network="resnet18", trainings=MAIN, shrink=2, widths=(8, 16, 32, 64)),
        # A step of 128 images is some 4.5 ms on an H100, where 256 take 8.2, and 2 more by Muon: an epoch of the three
        # arms is 6 to 7 s, all 40 are 4 to 5 minutes, compiling and the ranks, if after every epoch, some 3 more.
        "gpu15": Config(
            network="resnet18",
            trainings=("bp-norm", "fa-norm", "fa-norm-muon"),
            widths=(64, 128, 256, 512),
            epochs=40,
            measure_every=4,
            steps=None,
            images=None,
            test_images=None,
            batch=128,
            seeds=1,
            apart=True,
            save_every=1,
            minutes=11.0,
        ),
        "paper": Config(
            network="resnet18",
            trainings=MAIN,
            widths=(64, 128, 256, 512),
            epochs=100,
            measure_every=5,
            steps=None,
            images=None,
            test_images=None,
            batch=128,
            seeds=3,
        ),
    },
    Page(
        "What undoes the rank collapse of feedback alignment?",
        "ResNet-18 on CIFAR-100: a gain of 9 points by Boeshertz, Pascanu and Clopath 2026, all else by a third party",
    ),
    arms,
    study,
    size=("network", "widths", "shrink"),
)
