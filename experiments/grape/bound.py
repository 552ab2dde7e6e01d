"""GrAPE's guarantee beside what happens: the cosine with the Jacobian that its lemma grants, and the one that it has.

Claim (Caillon et al. 2026): with ``a = cos(B, J^)`` and ``b = cos(J^, J)`` the feedback has ``cos(B, J) >= a b -
sqrt(1 - a^2) sqrt(1 - b^2)``. It is tight, and says nothing where ``a^2 + b^2 < 1``.

Command: ``python -m experiments run grape_bound`` (no data needed).

Two convolutions (3x3, 8 channels, the second strided) and a linear layer learn scikit-learn's digits, with noise in
activations. The Jacobian is exact: the mean over the batch of every example's own, by reverse mode. To the letter,
weights are perturbed where they have fewer dimensions than the map, as the first kernel has (72 against 512): another
rule, by which the first layer's feedback ends elsewhere. What it estimates in expectation is known exactly, too: every
example's Jacobian where its ReLU is open, summed over positions by the products of their patches. Its cosine, along the
training by perturbed weights, is the bias: of one batch, while feedback averages over many.

Verdict: the lemma holds and says nothing here. Its guarantee is empty in both layers to the end, where the feedback is
close to the Jacobian; what perturbed weights estimate is far from it, also in expectation, and so is the feedback that
they teach. On these digits accuracy does not tell.
"""

import dataclasses
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
from experiments.common import data, plots
from experiments.common.experiment import Experiment, Histories, Page, Seeds, Study, Table
from experiments.common.metrics import shown
from experiments.common.task import cross_entropy
from jaxfa.base import Initializer, keep
from jaxfa.rules import ForwardPass

LAYERS = {"first layer": plots.BLUE, "second layer": plots.GREEN}
ACTIVATIONS, LETTER = "GrAPE, activations perturbed", "GrAPE to the letter"
RULES: dict[str, tuple[jaxfa.Rule, str]] = {
    "backpropagation": (jaxfa.backprop(), plots.GREY),
    "DFA": (jaxfa.dfa(), plots.VERMILLION),
    ACTIVATIONS: (jaxfa.rules.published_grape(weights=False), plots.BLUE),
    LETTER: (jaxfa.rules.published_grape(), plots.PURPLE),
}
# One batch's estimate itself, by perturbations of activations.
ESTIMATOR = jaxfa.fdfa(learning_rate=1.0, perturbation=jax.random.normal)
CAPTION = (
    "(a) Cosines with the exact Jacobian along training, and the lemma's bound (dotted). (b) A point for every step "
    "and layer: left of 1, where a^2 + b^2 < 1, the guarantee is empty, and the feedback is aligned all the "
    "same: it averages over steps, and the lemma looks at one. (c) It learns: accuracy on held-out digits. Thin "
    "lines are seeds."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Seeds):
    """For how long the cosines are followed."""

    steps: int = 200
    """How many steps every network learns for."""
    batch: int = 64
    """How many examples a step has."""


def study(config: Config, _: Histories) -> Study:
    """Follows every rule's training."""
    seeds, late = range(config.seed, config.seed + config.seeds), slice(-max(1, config.steps // 4), None)
    found = {name: [follow(rule, config, seed) for seed in seeds] for name, (rule, _) in RULES.items()}
    cosines, bias = (
        np.stack([one[key] for one in found[rule]]) for rule, key in ((ACTIVATIONS, "cosines"), (LETTER, "bias"))
    )
    rows = [["last quarter of the steps", "a", "b", "the lemma's bound", "cos(B, J)"]]
    for name, measured in zip(LAYERS, np.moveaxis(cosines[:, late].mean(1), 1, 0), strict=True):
        a, b, c = measured.T
        rows.append([name, *map(shown, (a, b, _bound(a, b), c))])
    weights = np.stack([one["cosines"][late, 0, 2].mean() for one in found[LETTER]])
    rows.append(["first layer, to the letter: its weights perturbed", "", "", "", shown(weights)])
    rows.append(["first layer, what that estimates in expectation", "", "", "", shown(bias[:, late].mean(1))])
    accuracies = {name: 100 * np.stack([one["accuracy"] for one in runs]) for name, runs in found.items()}
    ends = [[name, shown(one[:, late].mean(1), 1)] for name, one in accuracies.items()]
    tables = [Table("The guarantee and what happens", rows), Table("Held-out digits", [["rule", "accuracy, %"], *ends])]
    return Study(_figure(cosines, accuracies), CAPTION, tables, _findings(cosines[:, late], bias[:, late]))


def _findings(cosines: np.ndarray, bias: np.ndarray) -> list[tuple[str, str]]:
    """The cosine beside the guarantee in each layer, and what the estimate would be of without noise."""
    found = []
    for name, (a, b, c) in zip(LAYERS, np.moveaxis(cosines.mean(1), 0, -1), strict=True):
        said = f"is the cosine of feedback and Jacobian in the {name}; the lemma grants {_bound(a, b).mean():.2f}."
        found.append((f"{c.mean():.2f}", said))
    said = "is the cosine of what perturbed weights estimate in expectation with the first layer's Jacobian."
    return [*found, (f"{bias.mean():.2f}", said)]


def above(params: Any, x: jax.Array, taps: Any, feedback: Any = ()) -> jax.Array:
    """Logits, with the hidden activations shifted by ``taps`` and errors through ``feedback``, if there is any."""
    h, wires = x, jnp.zeros((len(x), 10))
    for i, kernel in enumerate(params[:2]):
        h = jax.nn.relu(jaxfa.conv(h, kernel, strides=i + 1)) + taps[i]
        h, wires = jaxfa.direct(h, wires, feedback[i]) if feedback else (h, wires)
    return h.reshape(len(x), -1) @ params[2] + wires


def follow(rule: jaxfa.Rule, config: Config, seed: int) -> dict[str, np.ndarray]:
    """One training: at every step the accuracy, every layer's cosines ``(a, b, c)`` and what perturbed weights see."""
    found = data.load("digits")
    x, test = (jnp.asarray(one, jnp.float32) / 8 - 1 for one in (found.train_images, found.test_images))
    y, expected = jnp.asarray(found.train_labels), jnp.asarray(found.test_labels)
    first, *keys = jax.random.split(jax.random.key(seed), config.steps + 1)
    draws, shapes = jax.random.split(first, 5), ((3, 3, x.shape[-1], 8), (3, 3, 8, 8), (128, 10))
    params = [jax.nn.initializers.he_normal()(*one) for one in zip(draws[:3], shapes, strict=True)]
    h, logits = ((8, 8, 8), (4, 4, 8)), jax.ShapeDtypeStruct((config.batch, 10), jnp.float32)
    maps = [jax.ShapeDtypeStruct((config.batch, *own), jnp.float32) for own in h]
    direct = isinstance(rule, jaxfa.DirectRule)
    feedback = [rule.init(*one, logits) for one in zip(draws[3:], maps, strict=True)] if direct else []
    optimizer = optax.adam(3e-3)

    def step(carry: Any, key: jax.Array) -> Any:
        params, feedback, state = carry
        batch = jax.random.choice(key, len(x), (config.batch,), replace=False)
        images = x[batch]
        forward = ForwardPass(partial(above, params, images), partial(_moved, params[0], images))
        feedback = rule.refine(forward, feedback, key) if direct else feedback
        measured = {} if rule.refine is keep else _measure(params, images, feedback, key)
        gradient = jax.grad(lambda params: cross_entropy(above(params, images, (0.0, 0.0), feedback), y[batch]))(params)
        updates, state = optimizer.update(gradient, state, params)
        accuracy = jnp.mean(above(params, test, (0.0, 0.0)).argmax(-1) == expected)
        return (optax.apply_updates(params, updates), feedback, state), measured | {"accuracy": accuracy}

    start = params, feedback, optimizer.init(params)
    return jax.tree.map(np.asarray, jax.jit(partial(lax.scan, step))(start, jnp.stack(keys))[1])


def _moved(kernel: jax.Array, x: jax.Array, key: jax.Array, noise: Initializer) -> list[jax.Array | None]:
    """How noise in the first kernel, which is smaller than the map, moves the activation; the second is larger."""
    change = noise(key, kernel.shape, kernel.dtype)
    return [jax.jvp(lambda kernel: jax.nn.relu(jaxfa.conv(x, kernel)), (kernel,), (change,))[1], None]


def _measure(params: Any, x: jax.Array, feedback: Any, key: jax.Array) -> dict[str, jax.Array]:
    """The lemma's cosines in every layer, and that of perturbed weights' expectation with the first Jacobian."""
    shapes = [jnp.zeros((1, 8, 8, 8)), jnp.zeros((1, 4, 4, 8))]
    each = jax.vmap(lambda one: jax.jacrev(lambda taps: above(params, one[None], taps)[0])(shapes))(x)
    estimated = ESTIMATOR.refine(
        partial(above, params, x), [replace(one, b=jnp.zeros_like(one.b)) for one in feedback], key
    )
    cosines = []
    for node, guess, j in zip(feedback, estimated, each, strict=True):
        true = jnp.moveaxis(j[:, :, 0].mean(0), 0, -1)
        cosines.append(jnp.stack([_cosine(node.b, guess.b), _cosine(guess.b, true), _cosine(node.b, true)]))
    return {
        "cosines": jnp.stack(cosines),
        "bias": _cosine(expected(params[0], x, each[0][:, :, 0]), each[0].mean(0)[:, 0]),
    }


def expected(kernel: jax.Array, x: jax.Array, jacobians: jax.Array) -> jax.Array:
    """What perturbed weights estimate of the first layer's Jacobian, the mean over their noise.

    Args:
      kernel: the first layer's.
      x: images ``(N, H, W, C)``.
      jacobians: every example's own, ``(N, logits, H, W, channels)``.

    Returns:
      The estimate ``(logits, H, W, channels)``.
    """
    patches = lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    patches = patches.reshape(len(x), -1, patches.shape[-1])
    # Each weight moves h by its pixel where the ReLU is open, and the logits by way of all positions at once.
    open_ = (jaxfa.conv(x, kernel) > 0)[:, None]
    before = (jacobians * open_).reshape(*jacobians.shape[:2], patches.shape[1], -1)
    smoothed = jnp.einsum("nup,nvp,novi->noui", patches, patches, before)
    return (smoothed.reshape(jacobians.shape) * open_).mean(0)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


def _bound(a: Any, b: Any) -> Any:
    return a * b - np.sqrt(1 - a * a) * np.sqrt(1 - b * b)


def _figure(cosines: np.ndarray, accuracies: dict[str, np.ndarray]) -> Figure:
    drawn = Figure(figsize=(10.4, 3.0), layout="constrained")
    grid = drawn.subplots(1, 3)
    steps = np.arange(1, cosines.shape[1] + 1)
    for layer, (name, color) in enumerate(LAYERS.items()):
        a, b, c = np.moveaxis(cosines[:, :, layer], -1, 0)
        plots.lines(grid[0], steps, c, color, name)
        grid[0].plot(steps, _bound(a, b).mean(0), color=color, linewidth=0.9, linestyle=":")
        grid[1].plot((a * a + b * b).ravel(), c.ravel(), ".", ms=1.5, color=color, alpha=0.5, label=name)
    for name, accuracy in accuracies.items():
        plots.lines(grid[2], steps, accuracy, RULES[name][1], name)
    grid[0].set(title="(a) cos(B, J), and the bound", xlabel="step", ylim=(-1, 1))
    grid[1].set(title="(b) cos(B, J), empty left of 1", xlabel=r"$a^2 + b^2$", xlim=(0, 2))
    grid[2].set(title="(c) accuracy (%)", xlabel="step")
    for axes in grid:
        axes.grid(axis="y")
        axes.legend(fontsize=7)
    return drawn


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(), "paper": Config(steps=2000, seeds=10)},
    Page("Does GrAPE's guarantee guarantee anything?", "Caillon et al. 2026"),
    study=study,
)
