"""What the SSA experiments share: the networks, the rules, the training, top-5, and how the rank falls."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.common import experiment, seeds
from experiments.common.augment import crop_and_flip
from experiments.common.bounds import FROM_ZERO, SHARE
from experiments.common.data import Dataset
from experiments.common.task import Task
from experiments.common.trainer import State, Trainer
from experiments.models.networks import MLP, ConvNet, ResNet
from experiments.models.vgg import VGG

NetworkName = Literal["mlp", "vgg5", "resnet8", "smallconv", "vgg13", "resnet32"]
# The reading that is the paper's words to the letter: errors to all layers at once, alignment that moves the weights.
LITERAL = "parallel-weights"
# What the presets share; the small networks' images are 16 x 16. The first 30 % are two epochs, both with the penalty.
CPU: dict[str, Any] = {
    "seeds": 3,
    "epochs": 6,
    "period": 1,
    "images": 2500,
    "test_images": 2000,
    "batch": 50,
    "learning_rate": 2e-3,
    "shrink": 2,
    "multiple": 4,
}
# A step of 256 images of VGG-13 is some 3 ms on an H100, where ResNet-18 takes 8.2 for 2.4 times the operations;
# factors take twice that, and 6 ms more of retractions: 15 s for an epoch of all nine arms, 5 minutes for 20. Ranks in
# multiples of 128 change a few times, and each time the five arms compile anew for a minute, side by side.
GPU15: dict[str, Any] = {
    "epochs": 20,
    "batch": 256,
    "multiple": 128,
    "seeds": 1,
    "apart": True,
    "save_every": 1,
    "minutes": 11.0,
}
PAPER: dict[str, Any] = {"epochs": 164, "batch": 100, "seeds": 5}


def readings(beta: float, **options: Any) -> dict[str, tuple[str, jaxfa.Rule]]:
    """SSA as the paper leaves it open: how errors reach a layer, and what alignment moves; at ``beta`` 0 nothing."""
    found: dict[str, tuple[str, jaxfa.Rule]] = {}
    for way, parallel in (("parallel", True), ("sequential", False)):
        if not beta:
            found[way] = f"SSA, {way}, no alignment", jaxfa.ssa(parallel=parallel, beta=0.0, **options)
            continue
        for moved, transport in (("weights pulled", False), ("feedback pulled: transport", True)):
            pulls = {"pull_weights": not transport, "pull_feedback": transport}
            rule = jaxfa.ssa(parallel=parallel, beta=beta, **pulls, **options)
            found[f"{way}-{moved.split()[0]}"] = f"SSA, {way}, {moved}", rule
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """The training and the rank; the paper names only the pruning."""

    hoyer: Annotated[float, FROM_ZERO] = 1.0
    """The weight of Hoyer's penalty. At Yang et al.'s .03 and .005, in so few epochs, ranks hardly fall."""
    period: int = 10
    """Hoyer's penalty is on in one epoch of so many, during the first 30 %."""
    energy: Annotated[float, SHARE] = 0.95
    """Pruning keeps this part of the squared singular values, after every epoch past the first 30 %."""
    multiple: int = 8
    """Ranks are rounded up to multiples of it, so that few different programs are compiled."""
    scale: float = 1.0
    """The numbers of channels are multiplied by this."""
    shrink: int = 1
    """Images are made smaller by this factor."""


def maker(name: NetworkName, config: Config, dataset: Dataset) -> Callable[[nnx.Rngs], nnx.Module]:
    """How to make a network, dense."""
    shape, classes = dataset.train_images.shape[1:], dataset.classes

    def wide(*channels: int) -> tuple[int, ...]:
        return tuple(max(4, round(config.scale * count)) for count in channels)

    makers: dict[NetworkName, Callable[[nnx.Rngs], nnx.Module]] = {
        "mlp": lambda rngs: MLP(shape, classes, wide(64, 64, 64), rngs=rngs),
        "vgg5": lambda rngs: VGG(shape, classes, widths=wide(8, 16, 32), repeats=(1, 1, 1), dropout=0.0, rngs=rngs),
        "resnet8": lambda rngs: ResNet(shape, classes, wide(8, 16, 32), repeats=1, rngs=rngs),
        "smallconv": lambda rngs: ConvNet(shape, classes, wide(16, 32, 64), rngs=rngs),
        "vgg13": lambda rngs: VGG(shape, classes, widths=wide(64, 128, 256, 512, 512), rngs=rngs),
        "resnet32": lambda rngs: ResNet(shape, classes, wide(16, 32, 64), repeats=5, rngs=rngs),
    }
    return makers[name]


def dense(name: NetworkName, config: Config, dataset: Dataset, rule: jaxfa.Rule, *, taps: bool = False) -> Task:
    """The training of a network by any rule; with ``taps`` a direct one, delivered to residual blocks' outputs."""
    residual = name.startswith("resnet")
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
        measure=top_five,
    )


def top_five(trainer: Trainer) -> Callable[[State], dict[str, Any]]:
    """Measures the part of the test images whose label is among the five that the network finds likeliest."""
    images, labels = (jnp.asarray(one) for one in trainer.task.data[2:4])

    @jax.jit
    def count(state: State, images: jax.Array, labels: jax.Array) -> jax.Array:
        model = trainer.model(state, copy=True)
        model.eval()
        logits = model(trainer.inputs(images))
        return ((logits > jnp.take_along_axis(logits, labels[:, None], 1)).sum(1) < 5).sum()

    def measure(state: State) -> dict[str, Any]:
        each = seeds.apart(state, len(trainer.seeds))
        chunks = [slice(i, i + 1000) for i in range(0, len(labels), 1000)]
        found = [sum(int(count(seed, images[chunk], labels[chunk])) for chunk in chunks) for seed in each]
        return {"top_five": np.array(found) / len(labels)}

    return measure


def ssa(name: NetworkName, config: Config, dataset: Dataset, rule: jaxfa.Rule) -> Task:
    """The training of a factored network by SSA, whose rank falls."""
    return _falling(dense(name, config, dataset, rule), config)


def svd_bp(name: NetworkName, config: Config, dataset: Dataset) -> Task:
    """The same by backpropagation, with the same steps along the Stiefel manifold."""
    return _falling(on_manifold(dense(name, config, dataset, jaxfa.backprop())), config)


def on_manifold(task: Task) -> Task:
    """The training of the factored network, its steps along the Stiefel manifold."""
    before, after = (
        optax.masked(way, jaxfa.factored.orthonormal_factors)
        for way in (jaxfa.factored.stiefel(retract=False), jaxfa.factored.stiefel())
    )
    return task._replace(
        make=lambda rngs: jaxfa.nn.factorise(task.make(rngs)), optimizer=optax.chain(before, task.optimizer, after)
    )


def _optimizer(config: Config, dataset: Dataset) -> optax.GradientTransformation:
    """Adam whose rate falls tenfold after a half and after three quarters, as in Yang et al. (81 and 122 of 164)."""
    steps = len(dataset.train_labels) // config.batch
    drops = {round(part * config.epochs) * steps: 0.1 for part in (0.5, 0.75)}
    return optax.adam(optax.piecewise_constant_schedule(config.learning_rate, drops))


def hoyer(step: Any, *, config: Config, steps: int) -> Any:
    """The weight of Hoyer's penalty at a step, of which an epoch has ``steps``."""
    epoch = step // steps
    return jnp.where((epoch < _first(config)) & (epoch % config.period == 0), config.hoyer, 0.0)


def _first(config: Config) -> int:
    """How many epochs the first 30 % are."""
    return round(0.3 * config.epochs)


def _falling(task: Task, config: Config) -> Task:
    strength = partial(hoyer, config=config, steps=len(task.data.train_labels) // config.batch)

    def prune(state: State, epoch: int) -> State:
        if epoch <= _first(config):
            return state
        trees = (state.params, state.feedback, state.optimizer)
        params, feedback, optimizer = jaxfa.factored.prune(*trees, energy=config.energy, multiple=config.multiple)
        return state._replace(params=params, feedback=feedback, optimizer=optimizer)

    return task._replace(optimizer=optax.chain(jaxfa.factored.hoyer_penalty(strength), task.optimizer), between=prune)
