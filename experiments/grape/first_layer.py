"""The first layer under learned direct feedback: which of the rule's options turns its update away from the truth.

Claim: none published. What lowers the estimate's noise should bring updates closer to the true gradient; with tiles,
scales and a Kalman mean at once the first layer's came out farther from it than without.

Command: ``python -m experiments run grape_first_layer``; ``--preset whole`` for images of 32 x 32 pixels.

One option at a time is turned on, in the network of ``grape_shallow`` on images averaged to 16 x 16 pixels. A tile
repeats the feedback over the map. What that costs without any noise is computed in every trained network: of the linear
feedback that gives the first layer's errors with the least squared error, what repeats, and by how much it turns the
layer's update away.

Verdict: on images of 16 x 16 pixels tiles do it, the only option whose turn is beyond its error: scales turn nothing
and the mean little, alone or together. At 32 x 32 no option's turn is beyond it: seeds lie tens of degrees apart there,
without any option, too, so that what one seed showed was its own, and tiles alone are rather closer. What repeats holds
a fifth of the squares of the feedback that least squares give, or a tenth on the larger images, and turns the layer by
a few degrees more, in every network: a part of what is seen, and less than the error of seeds. So ``jaxfa.grape`` has
no tile by default, though in so short a training tiles do not lose accuracy. Noise in weights leaves the first layer
where noise in activations does, and on the smaller images turns the others away, where they learn less by it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import jaxfa
import jaxfa.nn
from experiments.common import experiment, plots, seeds
from experiments.common.bounds import among, between
from experiments.common.checkpoint import last_state
from experiments.common.experiment import Arm, Experiment, Histories, Page, Study, Table, finished, load
from experiments.common.metrics import shown
from experiments.common.trainer import State, Trainer
from experiments.grape import shallow
from experiments.grape.variants import VARIANTS

PLAIN = "activations"
TILE = 4
PROBE = 512  # examples
CAPTION = (
    "The angle between each layer's update and backpropagation's, after the last epoch. Bars are deviations of seeds."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """The options, and the images' size."""

    variants: Annotated[tuple[str, ...], among(VARIANTS)] = (
        *(PLAIN, "letter", "scaled", "kalman", "tile-4", "tile-1", "full", "tiled"),
    )
    """The forms of GrAPE, beside backpropagation and DFA."""
    shrink: Annotated[int, between(1, 2)] = 2
    """The side in pixels of the squares over which images are averaged; the network needs more than 8 pixels a side."""

    arms = ("variants",)


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation, DFA and every form of GrAPE."""
    dataset = load(config, "cifar10", config.shrink)
    rules = {"bp": ("Backpropagation", jaxfa.backprop()), "dfa": ("DFA", jaxfa.dfa())}
    for name, (title, rule) in (rules | {name: VARIANTS[name] for name in config.variants}).items():
        yield Arm(name, title, None, shallow.task(config, dataset, rule, config.learning_rate))


class Linear(NamedTuple):
    """What linear feedback does for the first layer without any noise, for every seed.

    Attributes:
      fitted: the angle in degrees between the true gradient of the kernel and its update by the feedback that gives the
        true errors of a probe with the least squared error, which is not the least angle.
      tiled: the same by that feedback's mean over the repeats.
      share: of the feedback's squares, the mean's.
    """

    fitted: Any
    tiled: Any
    share: Any


def linear(config: Config, arm: Arm) -> Linear:
    """What linear feedback does for the first layer in the network that an arm's run has trained."""
    trainer = Trainer(arm.task, range(config.seed, config.seed + config.seeds), config.loop)
    state = last_state(config.out / arm.name, trainer.init())

    @jax.jit
    def one(state: State, images: jax.Array, labels: jax.Array) -> Linear:
        model, x = jaxfa.nn.plain(trainer.model(state, copy=True)), trainer.inputs(images)
        model.train()
        exact = jaxfa.nn.attach(model, jaxfa.backprop(), rngs=nnx.Rngs(0))
        errors = jaxfa.nn.layer_errors(exact, lambda model: trainer.task.loss(model(x), labels))
        e, delta = errors["head"], errors["conv1"]
        b = (jnp.linalg.pinv(e) @ delta.reshape(len(delta), -1)).reshape(-1, *delta.shape[1:])
        tiled = repeated(b)
        graph, kernel = nnx.split(model.conv1)
        pull = jax.vjp(lambda kernel: nnx.merge(graph, kernel)(x), kernel)[1]
        true, fitted, by_tile = (
            jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(pull(error))])
            for error in (delta, jnp.tensordot(e, b, 1), jnp.tensordot(e, tiled, 1))
        )
        share = (tiled**2).sum() / (b**2).sum()
        return Linear(_angle(fitted, true), _angle(by_tile, true), share)

    each = seeds.apart(state, config.seeds)
    found = jax.device_get([one(seed, *(array[:PROBE] for array in trainer.data)) for seed in each])
    return jax.tree.map(lambda *values: np.stack(values), *found)


def repeated(b: jax.Array) -> jax.Array:
    """The feedback ``(classes, H, W, C)`` closest to this one that repeats from tile to tile of whole ones."""
    classes, rows, columns, channels = b.shape[0], b.shape[1] // TILE, b.shape[2] // TILE, b.shape[3]
    tiles = b.reshape(classes, rows, TILE, columns, TILE, channels)
    return jnp.tile(tiles.mean((1, 3)), (1, rows, columns, 1))


def _angle(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.degrees(jnp.arccos(jnp.clip(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b), -1, 1)))


def study(config: Config, histories: Histories) -> Study:
    """Each layer's angle, in each arm that was trained."""
    every = finished(config, arms(config), histories)
    last = {arm.name: histories[arm.name][-1] for arm in every}
    layers = [layer for layer in last[every[0].name]["angle"] if layer != "head"]
    angles = {name: np.array([found["angle"][layer] for layer in layers], float) for name, found in last.items()}
    rows = [["", *layers, "accuracy, %"]]
    for arm in every:
        accuracy = 100 * np.array(last[arm.name]["test_accuracy"], float)
        rows.append([arm.group, *(f"{shown(angle, 0)}°" for angle in angles[arm.name]), shown(accuracy, 1)])
    titles = {arm.name: arm.group for arm in every}
    found = findings(layers[0], titles, {name: one[0] for name, one in angles.items()})
    fits = {arm.name: linear(config, arm) for arm in every}
    tables = [Table("Angles by layer", rows), _fits(titles, angles, fits)]
    numbers = {"angles": angles, "linear": {name: one._asdict() for name, one in fits.items()}}
    return Study(_figure(layers, titles, angles), CAPTION, tables, found, jax.tree.map(np.ndarray.tolist, numbers))


def _fits(titles: dict[str, str], angles: dict[str, np.ndarray], fits: dict[str, Linear]) -> Table:
    """What linear feedback does in each form's network without any noise."""
    rows = [["in the network that it trained", "its own", "least squares", "what repeats of it", "share of squares"]]
    for name, title in titles.items():
        fitted, tiled, share = fits[name]
        turns = (f"{shown(angle, 0)}°" for angle in (angles[name][0], fitted, tiled))
        rows.append([title, *turns, shown(share)])
    return Table(f"The first layer's angle by its own feedback, by linear least squares, and by tiles of {TILE}", rows)


def findings(layer: str, titles: dict[str, str], angles: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """How far the forms that end farthest from the truth and closest to it are from the one without options."""
    forms = {name: angle for name, angle in angles.items() if name not in (PLAIN, "bp", "dfa")}
    if not forms or PLAIN not in angles:
        return []
    others, found = {name: angle - angles[PLAIN] for name, angle in forms.items()}, []
    for which, of in (("farthest from", max), ("closest to", min)):
        name = of(others, key=lambda one: others[one].mean())
        gap = others[name]
        said = f"from the angle without options in {layer}: {titles[name]}, {which} the truth."
        found.append((f"{gap.mean():+.0f}" + (f" ± {gap.std(ddof=1):.0f}°" if gap.size > 1 else "°"), said))
    return found


def _figure(layers: list[str], titles: dict[str, str], angles: dict[str, np.ndarray]) -> Figure:
    drawn = Figure(figsize=(10.4, 3.2), layout="constrained")
    grid = drawn.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    names = [name for name in titles if name != "bp"]
    for at, (layer, axes) in enumerate(zip(layers, grid, strict=True)):
        for row, name in enumerate(names):
            color = plots.BLUE if name == PLAIN else plots.GREY
            axes.errorbar(angles[name][at].mean(), row, xerr=angles[name][at].std(), fmt="o", ms=4, color=color)
        axes.axvline(90, color=plots.GREY, linewidth=0.7, linestyle=":")
        axes.set(title=layer, xlabel="angle (°)", xlim=(0, 120))
    grid[0].set_yticks(range(len(names)), [titles[name] for name in names])
    grid[0].invert_yaxis()
    return drawn


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(epochs=6, images=4000, test_images=2000, batch=64, seeds=5),
        "whole": Config(
            variants=(PLAIN, "letter", "scaled", "full", "tile-4", "tiled"),
            shrink=1,
            epochs=6,
            images=4000,
            test_images=2000,
            batch=64,
            seeds=3,
        ),
    },
    Page("What turns the first layer away?"),
    arms,
    study,
)
