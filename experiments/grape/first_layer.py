"""The first layer under learned direct feedback: which of the rule's options turns its update away from the truth.

Claim: none published. What lowers the estimate's noise should bring updates closer to the true gradient; with tiles,
scales and a Kalman mean at once the first layer's came out farther from it than without.

Command: ``python -m experiments run grape_first_layer``, 10 minutes.

One option at a time is turned on, in the network of ``grape_shallow`` on images averaged to 16 x 16 pixels. A tile
repeats the feedback over the map; below a dense layer the Jacobian does not repeat, so that most of it is lost.

Verdict: tiles do it, the only option whose turn is beyond its error: scales turn nothing and the mean little, alone or
together. Accuracy does not tell in so short a training. So ``jaxfa.grape`` has no tile by default. Noise in weights
leaves the first layer where noise in activations does, and turns the others away; they learn less by it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import numpy as np
from matplotlib.figure import Figure

import jaxfa
from experiments.common import experiment, plots
from experiments.common.bounds import among
from experiments.common.experiment import Arm, Experiment, Histories, Page, Study, Table, load
from experiments.common.metrics import shown
from experiments.grape import shallow
from experiments.grape.variants import VARIANTS

PLAIN = "activations"
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
    shrink: int = 2
    """The side in pixels of the squares over which images are averaged."""

    arms = ("variants",)


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation, DFA and every form of GrAPE."""
    dataset = load(config, "cifar10", config.shrink)
    rules = {"bp": ("Backpropagation", jaxfa.backprop()), "dfa": ("DFA", jaxfa.dfa())}
    for name, (title, rule) in (rules | {name: VARIANTS[name] for name in config.variants}).items():
        yield Arm(name, title, None, shallow.task(config, dataset, rule, config.learning_rate))


def study(config: Config, histories: Histories) -> Study:
    """Each layer's angle, in each arm that was trained."""
    every = [arm for arm in arms(config) if arm.name in histories]
    last = {arm.name: histories[arm.name][-1] for arm in every}
    layers = [layer for layer in last[every[0].name]["angle"] if layer != "head"]
    angles = {name: np.array([found["angle"][layer] for layer in layers], float) for name, found in last.items()}
    rows = [["", *layers, "accuracy, %"]]
    for arm in every:
        accuracy = 100 * np.array(last[arm.name]["test_accuracy"], float)
        rows.append([arm.group, *(f"{shown(angle, 0)}°" for angle in angles[arm.name]), shown(accuracy, 1)])
    titles = {arm.name: arm.group for arm in every}
    found = findings(layers[0], titles, {name: one[0] for name, one in angles.items()})
    return Study(_figure(layers, titles, angles), CAPTION, [Table("Angles by layer", rows)], found)


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
    {"cpu": Config(epochs=6, images=4000, test_images=2000, batch=64, seeds=5)},
    Page("What turns the first layer away?"),
    arms,
    study,
)
