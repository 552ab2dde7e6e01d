"""The deep networks of the GrAPE experiments, their training by backpropagation, and the published numbers."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import optax

import jaxfa
from experiments.common import data
from experiments.common.experiment import Config, load
from experiments.common.task import Task
from experiments.models.alexnet import AlexNet
from experiments.models.networks import ResNet
from experiments.models.vgg import VGG

NetworkName = Literal["alexnet", "vgg16", "resnet20", "resnet56"]


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
    return {("bp", 0): bp, ("dfa", 0): dfa, ("dfa", 1): dfa_c, ("letter", 0): grape, ("letter", 1): grape_c}


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
class Size(Config):
    """The data and the networks' size, for all experiments on deep networks."""

    dataset: Literal["cifar10", "cifar100"] = "cifar100"
    """The images to learn."""
    shrink: int = 1
    """The side in pixels of the squares over which images are averaged."""
    scale: float = 1.0
    """The factor on the published numbers of channels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates(Size):
    """The same, and the learning rate of each direct rule."""

    dfa_rate: float = 1e-3
    """The learning rate of Adam under DFA."""
    grape_rate: float = 1e-3
    """The learning rate of Adam under GrAPE."""


# What makes the published data and networks.
SIZE = ("dataset", "shrink", "scale")
# What presets share.
CPU: dict[str, Any] = {
    "dataset": "cifar10",
    "shrink": 2,
    "scale": 0.5,
    "epochs": 5,
    "images": 4000,
    "test_images": 2000,
    "batch": 50,
    "learning_rate": 3e-3,
    "seeds": 1,
}
CPU_RATES: dict[str, Any] = CPU | {"dfa_rate": 3e-3, "grape_rate": 3e-3}
PAPER: dict[str, Any] = {"epochs": 200, "batch": 256, "seeds": 3}


def images(config: Size) -> data.Dataset:
    """The images that a configuration asks for."""
    return load(config, config.dataset, config.shrink)


def task(
    config: Size, dataset: data.Dataset, name: NetworkName, rate: float | None = None, steps: int | None = None
) -> Task:
    """Backpropagation in one of the networks.

    Args:
      config: a :class:`Size`.
      dataset: from :func:`images`.
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
