"""What the SSA experiments share: the networks, the training, and how the rank falls."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.common import sweep
from experiments.common.augment import crop_and_flip
from experiments.common.data import Dataset
from experiments.common.task import Task
from experiments.common.trainer import State
from experiments.models.networks import ConvNet, ResNet
from experiments.models.vgg import VGG

NetworkName = Literal["smallconv", "vgg13", "resnet32"]
# What the presets share. One seed: on a CPU, XLA runs the convolutions of several at once many times slower.
CPU: dict[str, Any] = {"seeds": 1, "learning_rate": 2e-3, "period": 1, "multiple": 16}
PAPER: dict[str, Any] = {"epochs": 164, "batch": 100}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(sweep.Config):
    """The training, the local losses and the rank; the paper names only the pruning."""

    beta: float = 1e-3
    """The weight of the alignment loss."""
    hoyer: float = 0.03
    """The weight of Hoyer's penalty; Yang et al. take .03, and .005 for ResNet-32."""
    period: int = 10
    """Hoyer's penalty is on in one epoch of so many, during the first 30 %."""
    energy: float = 0.95
    """Pruning keeps this part of the squared singular values, after every epoch past the first 30 %."""
    multiple: int = 8
    """Ranks are rounded up to multiples of it, so that few different programs are compiled."""
    scale: float = 1.0
    """The numbers of channels are multiplied by this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}.")


def maker(name: NetworkName, config: Config, dataset: Dataset) -> Callable[[nnx.Rngs], nnx.Module]:
    """How to make a network, dense."""
    shape, classes = dataset.train_images.shape[1:], dataset.classes

    def wide(*channels: int) -> tuple[int, ...]:
        return tuple(max(4, round(config.scale * count)) for count in channels)

    makers: dict[NetworkName, Callable[[nnx.Rngs], nnx.Module]] = {
        "smallconv": lambda rngs: ConvNet(shape, classes, wide(16, 32, 64), rngs=rngs),
        "vgg13": lambda rngs: VGG(shape, classes, widths=wide(64, 128, 256, 512, 512), rngs=rngs),
        "resnet32": lambda rngs: ResNet(shape, classes, wide(16, 32, 64), repeats=5, rngs=rngs),
    }
    return makers[name]


def dense(name: NetworkName, config: Config, dataset: Dataset, rule: jaxfa.Rule, *, taps: bool = False) -> Task:
    """The training of a network by any rule; with ``taps`` a direct one, delivered to residual blocks' outputs."""
    residual = name == "resnet32"
    return Task(
        make=maker(name, config, dataset),
        rule=rule,
        optimizer=_optimizer(config, dataset),
        data=dataset,
        batch=config.batch,
        at=("stem", "blocks/*") if residual and taps else None,
        # SSA delivers to every layer's input, from where errors go on by the shortcuts, too, which have no weights.
        allow=("stem", "blocks") if residual and rule.weights is not None else (),
        # An eighth of the side, as is usual: four pixels of CIFAR's.
        augment=partial(crop_and_flip, padding=dataset.train_images.shape[1] // 8),
    )


def ssa(name: NetworkName, config: Config, dataset: Dataset, rule: jaxfa.Rule) -> Task:
    """The training of a factored network by SSA, whose rank falls."""
    return _falling(dense(name, config, dataset, rule), config)


def svd_bp(name: NetworkName, config: Config, dataset: Dataset) -> Task:
    """The same by backpropagation, with the same steps along the Stiefel manifold."""
    task = dense(name, config, dataset, jaxfa.backprop())
    on_factors = [
        optax.masked(way, jaxfa.factored.orthonormal_factors)
        for way in (jaxfa.factored.stiefel(retract=False), jaxfa.factored.stiefel())
    ]
    task = task._replace(
        make=lambda rngs: jaxfa.nn.factorise(maker(name, config, dataset)(rngs)),
        optimizer=optax.chain(on_factors[0], task.optimizer, on_factors[1]),
    )
    return _falling(task, config)


def _optimizer(config: Config, dataset: Dataset) -> optax.GradientTransformation:
    """Adam whose rate falls tenfold after a half and after three quarters, as in Yang et al. (81 and 122 of 164)."""
    steps = len(dataset.train_labels) // config.batch
    drops = {round(part * config.epochs) * steps: 0.1 for part in (0.5, 0.75)}
    return optax.adam(optax.piecewise_constant_schedule(config.learning_rate, drops))


def _falling(task: Task, config: Config) -> Task:
    steps, last = len(task.data.train_labels) // config.batch, round(0.3 * config.epochs)

    def strength(step: Any) -> Any:
        epoch = step // steps
        return jnp.where((epoch < last) & (epoch % config.period == 0), config.hoyer, 0.0)

    def prune(state: State, epoch: int) -> State:
        if epoch <= last:
            return state
        trees = (state.params, state.feedback, state.optimizer)
        params, feedback, optimizer = jaxfa.factored.prune(*trees, energy=config.energy, multiple=config.multiple)
        return state._replace(params=params, feedback=feedback, optimizer=optimizer)

    return task._replace(optimizer=optax.chain(jaxfa.factored.hoyer_penalty(strength), task.optimizer), between=prune)
