"""GrAPE in deep networks: direct feedback with one true gradient per epoch, with none, and those gradients alone.

Claim (Caillon et al. 2026, CIFAR-100): learned direct feedback is ahead of fixed, and one mini-batch of backpropagation
per epoch lifts both by tens of points: ResNet-20 to 64.8 % (fixed: 59.8) of backpropagation's 68.7.

Command: ``python -m experiments run grape_deep`` (``--preset paper`` for the published networks and CIFAR-100).

The control that the paper lacks stands beside every network: as many steps of backpropagation, and no others. ResNets
are tapped after every block, inside which the backward is exact; the others after every layer. The paper states neither
taps nor rates. Every rule may have a rate of its own; none was tuned.

GrAPE is the library's best form for convolutions, ``grape(averaging=jaxfa.rules.kalman())``; ``grape_ablation`` has the
others, the literal one among them.

Measured with the preset ``cpu`` (channels halved, CIFAR-10 averaged to 16 x 16 pixels, 4000 training and the first 2000
test images, 5 epochs of 80 steps, Adam at 3e-3, the control at 1e-2, one seed: a standard error of 1 point; last epoch;
angle of all layers but the last, mean; time of a step relative to backpropagation's), VGG-16 with ``--scale 0.25``, 6
to 25 min a network on one of two CPU cores, the other being busy:

=========================  ===================  ===================  ===================  ===================
.                          AlexNet              VGG-16               ResNet-20            ResNet-56
=========================  ===================  ===================  ===================  ===================
backpropagation            31.6                 29.8                 36.4                 32.4
DFA                        19.2  100   .80      21.1  91   .63       20.9  90   .86       19.4  95   1.04
DFA, calibrated            16.2  84    .81      23.2  85   .64       23.4  88   .88       19.0  89   .98
GrAPE                      22.2  86    1.34     27.0  78   1.47      31.4  45   1.65      29.3  86   1.39
GrAPE, calibrated          14.4  72    1.35     27.0  54   1.60      30.2  54   1.37      28.4  58   1.38
those five steps alone     9.7   0     1.01     9.8   0    1.01      11.3  0    1.02      10.2  0    .94
=========================  ===================  ===================  ===================  ===================

(ResNet-20's calibrated arm had GrAPE with tiles alone, under which the plain one got 30.6 and 54 degrees; its plain arm
is ``grape_ablation``'s.) Learned feedback is ahead of fixed everywhere, without any calibration, and within 3 to 5
points of backpropagation but in AlexNet, which has no normalisation and is the farthest from it. Five true gradients in
400 steps bring the angles down by tens of degrees and the accuracy nowhere up by more than 2.5 points; in AlexNet,
through the rule's own Adam at this rate, they do harm (``grape_schedule`` has arms that give them an optimizer of their
own). The published leap is not seen, and runs this short cannot deny it. The preset ``paper`` has not been run, so that
whether GrAPE passes 45 % on CIFAR-100 without calibration is open.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optax

import jaxfa
from experiments.common import data, records, sweep
from experiments.common.task import Task
from experiments.models.alexnet import AlexNet
from experiments.models.networks import ResNet
from experiments.models.vgg import VGG

NetworkName = Literal["alexnet", "vgg16", "resnet20", "resnet56"]
AXIS = "true gradients per epoch"


class Network(NamedTuple):
    """A network of the paper's table.

    Attributes:
      title: its name.
      make: ``(shape, classes, scale, rngs) -> module``, its channels multiplied by the scale.
      taps: where direct rules tap it; None taps the input of every layer but the first.
      published: accuracy by rule and by true gradients per epoch.
    """

    title: str
    make: Callable[..., Any]
    taps: tuple[str, ...] | None
    published: dict[tuple[str, int], float]


def _scaled(widths: tuple[int, ...], scale: float) -> tuple[int, ...]:
    return tuple(max(1, round(width * scale)) for width in widths)


def _alexnet(shape: Any, classes: int, scale: float, rngs: Any) -> AlexNet:
    widths, hidden = _scaled((64, 192, 384, 256, 256), scale), round(1024 * scale)
    return AlexNet(shape, classes, widths=widths, hidden=hidden, rngs=rngs)


def _vgg16(shape: Any, classes: int, scale: float, rngs: Any) -> VGG:
    return VGG(shape, classes, widths=_scaled((64, 128, 256, 512, 512), scale), repeats=(2, 2, 3, 3, 3), rngs=rngs)


def _resnet(shape: Any, classes: int, scale: float, rngs: Any, *, repeats: int) -> ResNet:
    width = round(16 * scale)
    return ResNet(shape, classes, (width, 2 * width, 4 * width), repeats=repeats, rngs=rngs)


def _published(bp: float, dfa: float, dfa_c: float, grape: float, grape_c: float) -> dict[tuple[str, int], float]:
    return {("bp", 0): bp, ("dfa", 0): dfa, ("dfa", 1): dfa_c, ("grape", 0): grape, ("grape", 1): grape_c}


_BLOCKS = ("stem", "blocks/*")
NETWORKS: dict[NetworkName, Network] = {
    "alexnet": Network("AlexNet", _alexnet, None, _published(64.61, 42.59, 49.37, 45.45, 62.63)),
    "vgg16": Network("VGG-16", _vgg16, None, _published(70.33, 1.00, 29.40, 32.40, 56.93)),
    "resnet20": Network(
        "ResNet-20", partial(_resnet, repeats=3), _BLOCKS, _published(68.72, 20.94, 59.80, 24.28, 64.82)
    ),
    "resnet56": Network(
        "ResNet-56", partial(_resnet, repeats=9), _BLOCKS, _published(71.42, 24.29, 62.43, 29.33, 66.92)
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size(sweep.Config):
    """The networks, their size and the rate of each rule, for all experiments on deep networks."""

    networks: tuple[NetworkName, ...] = ("alexnet", "vgg16", "resnet20", "resnet56")
    """The networks to train."""
    dataset: Literal["cifar10", "cifar100"] = "cifar100"
    """The images to learn."""
    shrink: int = 1
    """Images are averaged over squares of so many pixels a side."""
    scale: float = 1.0
    """The published numbers of channels are multiplied by this."""
    dfa_rate: float = 1e-3
    """The learning rate of Adam under DFA."""
    grape_rate: float = 1e-3
    """The learning rate of Adam under GrAPE."""

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_below_one(self, "shrink")
        records.refuse_empty(self, "networks")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Size):
    """The same, and what calibration needs."""

    control_rate: float = 1e-3
    """The learning rate of Adam where a few steps of backpropagation are all there is."""
    tile: int | None = 4
    """The side of GrAPE's repeated feedback, in pixels; None is the whole map."""
    out: Path = Path("runs/grape_deep")
    """The folder of the results."""

    arms = ("networks",)

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_below_one(self, "tile")


PRESETS = {
    # One seed: on a CPU, XLA runs the convolutions of several seeds at once many times slower.
    "cpu": Config(
        dataset="cifar10",
        shrink=2,
        scale=0.5,
        epochs=5,
        images=4000,
        test_images=2000,
        batch=50,
        learning_rate=3e-3,
        dfa_rate=3e-3,
        grape_rate=3e-3,
        control_rate=1e-2,
        seeds=1,
    ),
    "paper": Config(epochs=200, batch=256, seeds=3, out=Path("runs/grape_deep-paper")),
}
PAGE = sweep.Page(
    "How much backpropagation does a deep network need?",
    "Direct feedback, fixed (DFA) or learned (GrAPE), with one mini-batch of backpropagation per epoch or none, and as "
    "many of those mini-batches alone. In the paper that one in some 195 lifts ResNet-20 from 24.3 to 64.8 %.",
    "Caillon et al. 2026, CIFAR-100",
    course=True,
)


def run(config: Config) -> Path:
    """Trains every arm and writes the report.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.
    """
    dataset = load(config)
    return sweep.run(config, PAGE, [arm for name in config.networks for arm in _arms(config, dataset, name)])


def load(config: Size) -> data.Dataset:
    """The images that a configuration asks for."""
    return sweep.prepare(config, data.shrink(data.load(config.dataset, config.data), config.shrink))


def _arms(config: Config, dataset: data.Dataset, name: NetworkName) -> Iterator[sweep.Arm]:
    network, same = NETWORKS[name], config.dataset == "cifar100" and config.scale == config.shrink == 1
    published = network.published if same else {}
    bp, axis = task(config, dataset, name), f"{AXIS}, {network.title}"
    yield sweep.Arm(f"{name}-bp", f"{network.title}: backpropagation", None, bp, published.get(("bp", 0)), axis=axis)
    epoch = len(dataset.train_labels) // config.batch
    every = partial(jaxfa.calibrate, every=epoch)
    rules = {"dfa": ("DFA", jaxfa.dfa(), config.dfa_rate), "grape": ("GrAPE", grape(config), config.grape_rate)}
    arms = []
    for rule, (title, value, rate) in rules.items():
        plain = task(config, dataset, name, rate)._replace(rule=value, at=network.taps)
        for count, chosen in enumerate((plain, plain._replace(calibrate=every))):
            number = published.get((rule, count))
            arms.append(sweep.Arm(f"{name}-{rule}-{count}", f"{network.title}: {title}", count, chosen, number))
    alone = task(config, dataset, name, config.control_rate, steps=1)
    arms.append(sweep.Arm(f"{name}-alone-1", f"{network.title}: those steps alone", 1, alone))
    for arm in arms:
        yield arm._replace(reference=f"{name}-bp", axis=axis)


def grape(config: Config) -> jaxfa.Rule:
    """GrAPE as a configuration asks for it."""
    return jaxfa.grape(tile=config.tile, averaging=jaxfa.rules.kalman())


def task(
    config: Size, dataset: data.Dataset, name: NetworkName, rate: float | None = None, steps: int | None = None
) -> Task:
    """Backpropagation in one of the networks.

    Args:
      config: a :class:`Size`.
      dataset: from :func:`load`.
      name: the network's.
      rate: of Adam; by default backpropagation's.
      steps: of an epoch; by default as many as its images fill.

    Returns:
      A :class:`Task`.
    """
    shape, classes = dataset.train_images.shape[1:], dataset.classes
    total = config.epochs * (steps or len(dataset.train_labels) // config.batch)
    schedule = optax.cosine_decay_schedule(rate or config.learning_rate, total)
    return Task(
        make=lambda rngs: NETWORKS[name].make(shape, classes, config.scale, rngs),
        rule=jaxfa.backprop(),
        optimizer=optax.adamw(schedule, weight_decay=1e-4),
        data=dataset,
        batch=config.batch,
        steps=steps,
    )
