"""What GrAPE's options and PEPITA's mirror do before a step, against NumPy given the same perturbations, float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfa
from tests.oracles import phases
from tests.oracles.networks import Network, plain
from tests.twins import CLASSES, IMAGES, KEY, NETWORKS, close, create, forward, refined, spied

grid = pytest.mark.parametrize("kind", NETWORKS)

# Normal perturbations where no scale is learned: the scales' own noise is of signs.
NORMAL = {"scaling": 0.0, "perturbation": jax.random.normal}
OPTIONS = {
    "separate": NORMAL | {"separate": True},
    "running mean": {"averaging": 0.9},
    "columns of units": NORMAL | {"norm_axis": 1},
    "columns of units, tiles": NORMAL | {"norm_axis": 1, "tile": 2},
    "free columns": {"column_norm": False},
    "free columns of outputs, tiles": NORMAL | {"column_norm": False, "tile": 2},
    "free columns of units, tiles": NORMAL | {"column_norm": False, "norm_axis": 1, "tile": 2},
    "watched": {"watch": True, "tile": 2},
    "all": NORMAL | {"separate": True, "averaging": 0.9, "norm_axis": 1, "watch": True},
}


def by_layer(tangents, moved, layers, separate):
    """For each phase each layer's perturbation, and the logits' derivative along it and what is perturbed with it."""
    if not separate:
        return [[(p, y) for p in along] for along, y in zip(tangents, moved, strict=True)]
    pairs = [(one[k % layers], y) for k, (one, y) in enumerate(zip(tangents, moved, strict=True))]
    for k, one in enumerate(tangents):
        assert [p.any() for p in one] == [i == k % layers for i in range(layers)]  # no other layer is
    return [pairs[k : k + layers] for k in range(0, len(pairs), layers)]


@grid
@pytest.mark.parametrize("name", OPTIONS)
def test_grapes_options_are_the_equations(name, kind, x64):
    options = OPTIONS[name]
    rule = jaxfa.grape(learning_rate=0.2, epsilon=0.0, **options)
    found, tangents, moved = refined(kind, rule, 2)
    drawn = by_layer(tangents, moved, len(found[0]), options.get("separate"))
    for (before, after), pairs in zip(itertools.pairwise(found), drawn, strict=True):
        for f, new, (p, y) in zip(plain(before), after, pairs, strict=True):
            scale = 1.0 if f.log_scale is None else np.exp(f.log_scale)
            estimates = phases.jacobian(p, y, f.b.shape[:-1], scale)
            goal = estimates.mean(0).reshape(f.b.shape)
            if "watch" in options:
                overlap, square = phases.watch(f.watched, f.b, estimates)
                close(new.watched, [overlap, square])
                close(new.alignment, overlap / np.sqrt(square) if square > 0 else 0)
            if "averaging" in options:
                goal = 0.9 * f.mean + 0.1 * goal
                close(new.mean, goal)
            turned, wrong = (
                phases.turn(f.b, goal, p.shape[1:], 0.2, options.get("norm_axis", 0), normed=normed)
                for normed in (options.get("column_norm", True), not options.get("column_norm", True))
            )
            close(new.b, turned)
            assert np.abs(new.b - wrong).max() > 1e-3


@grid
def test_pepitas_mirror_turns_the_projection_by_its_equations(kind, x64):
    rule = jaxfa.pepita(mirror=0.3, scale=0.5)
    layers, params, (x, labels), _, nothing = create(kind, jaxfa.backprop())
    net = Network(layers, [plain(p) for p in params], np.asarray(x), labels)
    spy, seen = spied(lambda noise: forward(layers, params, nothing, x + noise))
    feedback = rule.init(KEY, x, jnp.zeros((IMAGES, CLASSES)))
    for step in range(2):
        before, feedback = feedback, rule.refine(spy, feedback, jax.random.fold_in(KEY, step))
        tangents = [seen[-1], *(np.zeros_like(one) for one in net.xs[1:-1])]
        assert feedback.b.shape == (*x.shape[1:], CLASSES)
        close(feedback.b, phases.mirror(np.asarray(before.b), seen[-1], net.derivative(tangents), 0.3))
