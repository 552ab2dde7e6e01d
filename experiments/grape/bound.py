"""GrAPE's guarantee beside what happens: the cosine with the Jacobian that its lemma grants, and the one that it has.

Claim (Caillon et al. 2026): with ``a = cos(B, J^)`` and ``b = cos(J^, J)`` the feedback has ``cos(B, J) >= a b -
sqrt(1 - a^2) sqrt(1 - b^2)``. It is tight, and says nothing where ``a^2 + b^2 < 1``.

Command: ``python -m experiments run grape_bound``, a minute (no data needed).

Two convolutions (3x3, 8 channels, the second strided) and a linear layer learn scikit-learn's digits by the rule to
the letter. The Jacobian is exact: the mean over the batch of every example's own, by reverse mode. The paper perturbs
weights where they have fewer dimensions than the map, as the first kernel has (72 against 512). What that estimates in
expectation is known exactly, too: each pixel's Jacobian smoothed by the products of patches; its angle is the bias.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure

import jaxfa
from experiments.common import data, plots, records
from experiments.common.experiment import Experiment, Histories, Options, Page, Study, Table
from experiments.common.metrics import shown
from experiments.common.task import cross_entropy
from jaxfa.base import keep

TAPS = ("first layer", "second layer")
RULES: dict[str, tuple[Callable[[], jaxfa.Rule], str]] = {
    "backpropagation": (jaxfa.backprop, plots.GREY),
    "DFA": (jaxfa.dfa, plots.VERMILLION),
    "GrAPE to the letter": (jaxfa.rules.published_grape, plots.BLUE),
}
# One batch's estimate itself, by the letter's perturbations.
ESTIMATOR = jaxfa.fdfa(learning_rate=1.0, perturbation=jax.random.normal)
CAPTION = (
    "(a) Cosines with the exact Jacobian along training, and the lemma's bound (dotted). (b) A point for every step "
    "and layer: left of the line, where a^2 + b^2 < 1, the guarantee is empty, and the feedback is aligned all the "
    "same: it averages over steps, and the lemma looks at one. (c) It learns: accuracy on held-out digits. Thin "
    "lines are seeds."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """For how long the cosines are followed."""

    steps: int = 400
    """How many steps every network learns for."""
    batch: int = 64
    """How many examples a step has."""
    seeds: int = 3
    """How many networks learn by each rule."""
    seed: int = 0
    """The first seed; the others follow it."""

    def __post_init__(self) -> None:
        records.refuse_below_one(self, "steps", "batch", "seeds")


def study(config: Config, _: Histories) -> Study:
    """Follows every rule's training."""
    seeds = range(config.seed, config.seed + config.seeds)
    found = {name: [follow(rule(), config, seed) for seed in seeds] for name, (rule, _) in RULES.items()}
    letter = {key: np.stack([one[key] for one in found["GrAPE to the letter"]]) for key in ("cosines", "bias")}
    rows = [["last quarter of the steps", "a", "b", "a^2 + b^2", "the lemma's bound", "cos(B, J)", "angle, degrees"]]
    late = slice(-max(1, config.steps // 4), None)
    for layer, name in enumerate(TAPS):
        a, b, c = letter["cosines"][:, late, layer].mean(1).T
        numbers = (*map(shown, (a, b, a * a + b * b, _bound(a, b), c)), shown(np.degrees(np.arccos(c)), 0))
        rows.append([f"activations perturbed, {name}", *numbers])
    bias = letter["bias"][:, late].mean(1)
    rows.append(
        ["weights perturbed, first layer, expectation", "", "", "", "", shown(np.cos(bias)), shown(np.degrees(bias), 0)]
    )
    accuracies = {name: 100 * np.stack([one["accuracy"] for one in runs]) for name, runs in found.items()}
    rest = [["rule", "accuracy, %"], *([name, shown(one[:, late].mean(1), 1)] for name, one in accuracies.items())]
    tables = [Table("The guarantee and what happens", rows), Table("Held-out digits", rest)]
    return Study(_figure(letter["cosines"], accuracies), CAPTION, tables)


def above(params: Any, x: jax.Array, taps: Any) -> jax.Array:
    """Logits, with the hidden activations shifted by ``taps``."""
    first, second, head = params
    h = jax.nn.relu(jaxfa.conv(x, first)) + taps[0]
    h = jax.nn.relu(jaxfa.conv(h, second, strides=2)) + taps[1]
    return h.reshape(len(x), -1) @ head


def follow(rule: jaxfa.Rule, config: Config, seed: int) -> dict[str, np.ndarray]:
    """One training: at every step the accuracy, every layer's cosines ``(a, b, c)`` and the first layer's bias."""
    found = data.load("digits")
    x, test = (jnp.asarray(one, jnp.float32) / 8 - 1 for one in (found.train_images, found.test_images))
    y, expected = jnp.asarray(found.train_labels), jnp.asarray(found.test_labels)
    keys = jax.random.split(jax.random.key(seed), config.steps + 1)
    draw = jax.nn.initializers.he_normal()
    params = [
        draw(jax.random.fold_in(keys[0], i), shape)
        for i, shape in enumerate(((3, 3, x.shape[-1], 8), (3, 3, 8, 8), (128, 10)))
    ]
    maps = [jax.ShapeDtypeStruct((config.batch, *own), jnp.float32) for own in ((8, 8, 8), (4, 4, 8))]
    logits = jax.ShapeDtypeStruct((config.batch, 10), jnp.float32)
    direct = isinstance(rule, jaxfa.DirectRule)
    feedback = [rule.init(jax.random.fold_in(keys[0], 3 + i), h, logits) for i, h in enumerate(maps)] if direct else []
    optimizer = optax.adam(3e-3)

    def loss(params: Any, feedback: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        first, second, head = params
        wires = jnp.zeros((len(x), 10))
        h = jax.nn.relu(jaxfa.conv(x, first))
        h, wires = jaxfa.direct(h, wires, feedback[0]) if direct else (h, wires)
        h = jax.nn.relu(jaxfa.conv(h, second, strides=2))
        h, wires = jaxfa.direct(h, wires, feedback[1]) if direct else (h, wires)
        return cross_entropy(h.reshape(len(x), -1) @ head + wires, y)

    def step(carry: Any, key: jax.Array) -> Any:
        params, feedback, state = carry
        batch = jax.random.choice(key, len(x), (config.batch,), replace=False)
        forward = partial(above, params, x[batch])
        feedback = rule.refine(forward, feedback, key) if direct else feedback
        measured = {} if rule.refine is keep else _measure(params, x[batch], feedback, key)
        updates, state = optimizer.update(jax.grad(loss)(params, feedback, x[batch], y[batch]), state, params)
        accuracy = jnp.mean(above(params, test, (0.0, 0.0)).argmax(-1) == expected)
        return (optax.apply_updates(params, updates), feedback, state), measured | {"accuracy": accuracy}

    start = params, feedback, optimizer.init(params)
    return jax.tree.map(np.asarray, jax.jit(partial(lax.scan, step))(start, keys[1:])[1])


def _measure(params: Any, x: jax.Array, feedback: Any, key: jax.Array) -> dict[str, jax.Array]:
    """The lemma's cosines in every layer, and the angle of perturbed weights' expectation to the first Jacobian."""
    shapes = [jnp.zeros((1, 8, 8, 8)), jnp.zeros((1, 4, 4, 8))]
    each = jax.vmap(lambda one: jax.jacrev(lambda taps: above(params, one[None], taps)[0])(shapes))(x)
    estimated = ESTIMATOR.refine(
        partial(above, params, x), [replace(one, b=jnp.zeros_like(one.b)) for one in feedback], key
    )
    cosines = []
    for node, guess, j in zip(feedback, estimated, each, strict=True):
        true = jnp.moveaxis(j[:, :, 0].mean(0), 0, -1)
        cosines.append(jnp.stack([_cosine(node.b, guess.b), _cosine(guess.b, true), _cosine(node.b, true)]))
    patches = lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    patches = patches.reshape(len(x), 64, -1)
    products = jnp.einsum("bus,bvs->buv", patches, patches) / jnp.sum(jnp.square(patches), 2, keepdims=True)
    open_ = (jaxfa.conv(x, params[0]) > 0)[:, None]
    before = (each[0][:, :, 0] * open_).reshape(len(x), 10, 64, 8)
    seen = jnp.einsum("buv,bovi->oui", products, before)
    return {"cosines": jnp.stack(cosines), "bias": jnp.arccos(_cosine(seen, before.sum(0)))}


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


def _bound(a: Any, b: Any) -> Any:
    return a * b - np.sqrt(1 - a * a) * np.sqrt(1 - b * b)


def _figure(cosines: np.ndarray, accuracies: dict[str, np.ndarray]) -> Figure:
    drawn = Figure(figsize=(10.4, 3.0), layout="constrained")
    grid = drawn.subplots(1, 3)
    steps = np.arange(1, cosines.shape[1] + 1)
    for layer, (name, color) in enumerate(zip(TAPS, (plots.BLUE, plots.GREEN), strict=True)):
        a, b, c = np.moveaxis(cosines[:, :, layer], -1, 0)
        plots.lines(grid[0], steps, c, color, name)
        grid[0].plot(steps, _bound(a, b).mean(0), color=color, linewidth=0.9, linestyle=":")
        grid[1].plot((a * a + b * b).ravel(), c.ravel(), ".", ms=1.5, color=color, alpha=0.5, label=name)
    grid[1].axvline(1, color=plots.INK, linewidth=0.8)
    for name, accuracy in accuracies.items():
        plots.lines(grid[2], steps, accuracy, RULES[name][1], name)
    grid[0].set(title="(a) cos(B, J), and the bound", xlabel="step", ylim=(-1, 1))
    grid[1].set(title="(b) cos(B, J)", xlabel=r"$a^2 + b^2$", xlim=(0, 2))
    grid[2].set(title="(c) accuracy (%)", xlabel="step")
    for axes in grid:
        axes.grid(axis="y")
        axes.legend(fontsize=7)
    return drawn


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(), "paper": Config(steps=2000, seeds=10)},
    Page(
        "Does GrAPE's guarantee guarantee anything?",
        "The paper bounds the cosine of feedback and Jacobian from below by those with their estimate. The bound is "
        "tight, and empty where the squares of the two add up to less than 1, as they do at almost every step.",
        "Caillon et al. 2026",
    ),
    study=study,
)
