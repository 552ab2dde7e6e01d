"""How much of an example's own Jacobian a map of the error can tell, if it sees the activation or the output.

Claim (ours): a direct rule delivers errors by a map that is the same for all examples, while the Jacobian is each
example's own; a map with gates that see the example is closer to it.

Command: ``python -m experiments run grape_gates``.

The Jacobian of the logits by the activation is measured for every image, after the stem and every block of a ResNet-20
that backpropagation or GrAPE has trained. Each form of the map is fitted to three quarters of the images, training
images all, and judged on the rest by the cosine of the error that it delivers with the true one. The true one is linear
in the output's error, so all forms are: ``J(x) = sum_k g_k(x) B_k``, with gates ``g_k``. One gate that is always 1 is
GrAPE's linear map. The gates that learn are fitted by Adam: a low rank, whose maps ``B_k`` beside the first are outer
products, and a small network with a hidden layer. Both see the 64 directions along which activations vary most.

Errors and Jacobians are of the network as it is evaluated, and a form is fitted and judged on some of a layer's units.

Verdict: holds at every tap and in every seed, most in the middle of the network, and yet does not come near the true
error in its first blocks. The more directions of the activation gates see, the more they tell. The output's
probabilities tell about as much as a quarter of these directions do; a unit's own ReLU hardly anything; gates of low
rank less than full ones; a small network no more than linear gates. While the network learns none of it comes through:
``grape_resnet20 --preset maps``, where gated maps must follow a network that moves, has them teach less than one map.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure

import jaxfa
import jaxfa.nn
from experiments.common import plots, seeds
from experiments.common.checkpoint import last_state
from experiments.common.experiment import Arm, Experiment, Histories, Page, Study, Table, finished
from experiments.common.metrics import shown
from experiments.common.trainer import Trainer
from experiments.grape.forms import FORMS, SEEN, Seen, judge
from experiments.grape.networks import CPU, NETWORKS, Size, images, task
from experiments.grape.variants import VARIANTS

PROBES, UNITS, CHUNK = 4000, 128, 250
ARMS = {"bp": ("Backpropagation", jaxfa.backprop()), "full": VARIANTS["full"]}


def arms(config: Size) -> Iterator[Arm]:
    """Backpropagation and GrAPE."""
    network, plain = NETWORKS["resnet20"], task(config, images(config), "resnet20")
    for name, (title, rule) in ARMS.items():
        at = network.taps if isinstance(rule, jaxfa.DirectRule) else None
        yield Arm(name, title, None, plain._replace(rule=rule, at=at))


def study(config: Size, histories: Histories) -> Study:
    """Fits and judges every form, in every network, after every block but the last, whose Jacobian is one for all."""
    chosen = finished(config, arms(config), histories)
    found = {arm.title or arm.group: np.array(judged(config, arm)) for arm in chosen}
    tables = []
    for name, cosines in found.items():
        taps = ["stem", *(f"block {i}" for i in range(1, cosines.shape[-1]))]
        rows = [["form of the map", *taps]]
        rows += [[FORMS[form][0], *map(shown, cosines[:, i].T)] for i, form in enumerate(FORMS)]
        tables.append(Table(f"Cosine of delivered and true error, network trained by {name}", rows))
    caption = (
        "Cosine of the error that a form of the map delivers with the true one, on images that it was not fitted to, "
        "after the stem and every block, mean and deviation over seeds."
    )
    numbers = {"forms": list(FORMS), **{name: cosines.tolist() for name, cosines in found.items()}}
    return Study(figure(found), caption, tables, findings(found), numbers)


def findings(found: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """In each network one map beside the best form, over all taps."""
    told = []
    for name, cosines in found.items():
        means = cosines.mean((0, 2))
        best = int(means.argmax())
        said = (
            f"is the cosine of one map's errors with the true ones, over all taps, in a network trained by {name}; "
            f"the best form's is {means[best]:.2f} ({FORMS[list(FORMS)[best]][0]})."
        )
        told.append((f"{means[0]:.2f}", said))
    return told


def judged(config: Size, arm: Arm) -> list[list[list[float]]]:
    """For every seed and form the mean cosine of delivered and true error at each tap."""
    trainer = Trainer(arm.task, range(config.seed, config.seed + config.seeds), config.loop)
    state = last_state(config.out / arm.name, trainer.init())
    x, labels = trainer.inputs(arm.task.data.train_images[:PROBES]), arm.task.data.train_labels[:PROBES]
    each = []
    for one in seeds.apart(state, config.seeds):
        model = jaxfa.nn.plain(trainer.model(one))
        model.eval()
        taps = measured(model, x, labels)
        each.append([[judge(predict, tap) for tap in taps] for _, predict in FORMS.values()])
    return each


def measured(model: Any, x: jax.Array, labels: jax.Array) -> list[Seen]:
    """What is known of the images at every tap but the last."""

    def forward(taps: Any, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        hidden = []
        for layer, tap in zip((model.stem, *model.blocks), taps, strict=True):
            x = layer(x) + tap
            hidden.append(x)
        return model.head(x.mean((1, 2))), hidden

    shapes = jax.eval_shape(partial(forward, [0.0] * (1 + len(model.blocks))), x[:1])[1]
    chosen = [np.random.default_rng(0).permutation(one.size)[:UNITS] for one in shapes]
    batch = jax.jit(partial(_jacobians, forward, [one.shape[1:] for one in shapes], chosen))
    chunks = [batch(x[at : at + CHUNK]) for at in range(0, len(x), CHUNK)]
    logits, hidden, jacobians = jax.tree.map(lambda *parts: jnp.concatenate(parts), *chunks)
    probabilities = jax.nn.softmax(logits)
    error = probabilities - jax.nn.one_hot(labels, logits.shape[-1])
    parts = list(zip(hidden, chosen, jacobians, strict=True))[:-1]
    return [Seen(principal(h), h.reshape(len(h), -1)[:, own], probabilities, error, j) for h, own, j in parts]


def _jacobians(forward: Callable[..., Any], shapes: Any, chosen: Any, x: jax.Array) -> tuple[Any, Any, list[jax.Array]]:
    """Logits, every tap's activation, and the Jacobians by the chosen units."""
    logits, pull, hidden = jax.vjp(partial(forward, x=x), [jnp.zeros((len(x), *own)) for own in shapes], has_aux=True)
    rows = jnp.broadcast_to(jnp.eye(logits.shape[-1])[:, None], (logits.shape[-1], *logits.shape))

    def row(output: jax.Array) -> list[jax.Array]:
        return [one.reshape(len(x), -1)[:, own] for one, own in zip(pull(output)[0], chosen, strict=True)]

    # One output after the other: all at once hold as many batches' activations as there are classes.
    return logits, hidden, [jnp.moveaxis(one, 0, 1) for one in lax.map(row, rows)]


def principal(h: jax.Array) -> jax.Array:
    """Activations along the directions in which they vary most, of deviation 1, the strongest first."""
    flat = np.asarray(h.reshape(len(h), -1))
    flat = flat - flat.mean(0, keepdims=True)
    powers, directions = np.linalg.eigh(flat.T @ flat / len(flat))
    return jnp.asarray(flat @ directions[:, : -SEEN - 1 : -1] / np.sqrt(np.maximum(powers[: -SEEN - 1 : -1], 1e-12)))


def figure(found: dict[str, np.ndarray]) -> Figure:
    """A panel for every network."""
    drawn = Figure(figsize=(9.0, 3.2), layout="constrained")
    panels = drawn.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, cosines) in zip(panels, found.items(), strict=True):
        for i, ((title, _), color) in enumerate(zip(FORMS.values(), plots.COLORS, strict=False)):
            plots.lines(axes, np.arange(cosines.shape[-1]), cosines[:, i], color, title)
        axes.set(title=f"trained by {name}", xlabel="block", ylim=(0, 1))
        axes.grid(axis="y")
    plots.legend_below(drawn, 3)
    return drawn


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Size(**CPU | {"seeds": 3}), "full": Size()},
    Page("Is it the map that holds direct feedback back?"),
    arms,
    study,
)
