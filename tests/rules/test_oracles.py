"""Every rule of the table against its equations in NumPy, in a dense and a convolutional network, float64."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfa
from tests.methods import METHODS
from tests.oracles import backwards, phases
from tests.oracles.backwards import REFERENCES
from tests.oracles.networks import Conv, Dense, Network, plain
from tests.twins import CLASSES, IMAGES, KEY, NETWORKS, close, create, operation, refined, signals

# Their references, as independent, are in test_forward_gradient, test_pepita and, of the mirror, test_oracle_phases.
ELSEWHERE = {"forward_gradient", "pepita", "pepita_mirrored"}
ROWS = {method.name: method.rule for method in METHODS if method.name not in ELSEWHERE}
# Of these rules one factor learns alone.
ROWS |= {
    f"{name}, {factor} alone": rule(8 if name == "dldfa" else 0.8, **{f"learn_{other}": False})
    for name, rule in (("ldfa", jaxfa.ldfa), ("dldfa", jaxfa.dldfa))
    for factor, other in ("pq", "qp")
}
grid = pytest.mark.parametrize("kind", NETWORKS)


def arrays(feedback):
    """A feedback's arrays by name; drawn magnitudes, whose distribution has tests of its own, are read off."""
    if hasattr(feedback, "seed_bytes"):
        return SimpleNamespace(magnitude=None)
    return plain(feedback)


def begun(feedback):
    """The same, where training begins with none, some steps later."""
    if not hasattr(feedback, "b") or jax.tree.leaves(feedback.b)[0].any():
        return feedback
    return dataclasses.replace(feedback, b=jnp.sin(1.0 + jnp.arange(feedback.b.size)).reshape(feedback.b.shape))


@grid
@pytest.mark.parametrize("name", ROWS)
def test_gradients_and_signals_are_the_equations(name, kind, x64):
    layers, params, data, _, feedback = create(kind, ROWS[name])
    feedback = [begun(f) for f in feedback]
    net = Network(layers, [plain(p) for p in params], np.asarray(data[0]), data[1])
    known = [arrays(f) for f in feedback]
    if name == "brsf":
        magnitudes = [np.abs(f.matrix(jnp.ones_like(p["w"]))) for f, p in zip(feedback[1:], params[1:], strict=True)]
        known = [None, *(SimpleNamespace(magnitude=np.asarray(one)) for one in magnitudes)]
    grads, slots = net.learn(REFERENCES[name.partition(",")[0]], known)
    got, slot = signals(layers, params, feedback, data)
    for expected, found in zip(grads, got, strict=True):
        close(found["b"], expected["b"])
        jax.tree.map(close, plain_factors(found["w"]), expected["w"])
    for expected, found in zip(slots, slot[1:], strict=True):
        for path, leaf in jax.tree.leaves_with_path(found):
            close(leaf, backwards.at(expected, path))


def plain_factors(w):
    return {"u": w.u, "s": w.s, "v": w.v} if hasattr(w, "u") else w


@grid
def test_the_weight_mirror_reflects_its_own_noise(kind, x64):
    rule = jaxfa.weight_mirror(learning_rate=0.3, weight_decay=0.1)
    layers, _, _, ops, feedback = create(kind, rule)
    for layer, one, f in zip(layers[1:], ops[1:], feedback[1:], strict=True):
        seen = []

        def spy(x, w, op=one.op, seen=seen):
            if not isinstance(x, jax.core.Tracer) and not isinstance(w, jax.core.Tracer):
                seen.append(np.asarray(x))
            return op(x, w)

        found = rule.refine(one._replace(op=spy), f, KEY)
        close(
            found.b,
            phases.weight_mirror(np.asarray(f.b), np.asarray(one.w), layer, seen[0], learning_rate=0.3, decay=0.1),
        )


@grid
def test_normative_factors_are_alternating_least_squares(kind, x64):
    rule = jaxfa.normative_ldfa(2)
    _, _, _, ops, feedback = create(kind, rule)
    moved = [one._replace(w=one.w + 0.1 * jnp.cos(jnp.arange(one.w.size).reshape(one.w.shape))) for one in ops]
    found = rule.refine([None, *moved[1:]], feedback, KEY)
    for one, before, after in zip(moved[1:], feedback[1:], found[1:], strict=True):
        p, q = phases.alternating_least_squares(np.asarray(before.p), np.asarray(before.q), np.asarray(one.w))
        close(after.p, p, 1e-10)
        close(after.q, q, 1e-10)


@grid
def test_fdfa_is_the_running_mean_of_its_estimates(kind, x64):
    found, tangents, moved = refined(kind, jaxfa.fdfa(learning_rate=0.3), 2)
    for (before, after), along, y in zip(itertools.pairwise(plain(found)), tangents, moved, strict=True):
        for f, new, p in zip(before, after, along, strict=True):
            estimate = phases.jacobian(p, y, f.b.shape[:-1], 1.0).mean(0).reshape(f.b.shape)
            close(new.b, f.b + 0.3 * (estimate - f.b))


@grid
def test_tiles_scales_and_the_kalman_mean_are_the_equations(kind, x64):
    rule = jaxfa.grape(averaging=jaxfa.rules.kalman(0.5), tile=4, scaling=0.3, learning_rate=0.2, epsilon=0.0)
    found, tangents, moved = refined(kind, rule, 3)
    known = [(0.0, None)] * len(found[0])
    for (before, after), along, y in zip(itertools.pairwise(plain(found)), tangents, moved, strict=True):
        tiles = [f.b.shape[:-1] for f in before]
        logs = [float(f.log_scale) for f in before]
        for i, (f, new, p) in enumerate(zip(before, after, along, strict=True)):
            estimates = phases.jacobian(p, y, tiles[i], np.exp(logs[i]))
            mean, variance = known[i] = phases.kalman(*known[i], estimates, 0.5)
            close(new.mean.reshape(mean.shape), mean)
            close(new.precision, 1 / variance)
            close(new.b, phases.turn(f.b, mean.reshape(f.b.shape), p.shape[1:], 0.2))
        for new, expected in zip(after, phases.scales(logs, along, y, tiles, 0.3), strict=True):
            close(new.log_scale, expected)


STACKS = {"dense": (Dense(), (4,), (4, 4)), "conv": (Conv(1), (4, 4, 2), (3, 3, 2, 2))}


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "straight"])
@pytest.mark.parametrize("schedule", ["stored", "parallel", "stream"])
@pytest.mark.parametrize("name", ["dkp", "dldfa"])
def test_stacks_of_blocks_are_the_equations(name, schedule, unroll, kind, x64):
    rng, (layer, inputs, shape) = np.random.default_rng(5), STACKS[kind]
    size = np.prod(inputs)
    w, x = jnp.asarray(rng.normal(size=(3, *shape)) / 2), jnp.asarray(rng.normal(size=(IMAGES, *inputs)))
    head, labels = jnp.asarray(rng.normal(size=(size, CLASSES))), rng.integers(CLASSES, size=IMAGES)
    # Both rules' feedback learns.
    rule = jaxfa.dkp() if name == "dkp" else jaxfa.dldfa(2)
    one = rule.init(KEY, x, jnp.zeros((IMAGES, CLASSES)))
    feedback = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(3, *leaf.shape))), one)

    def loss(w, feedback, head):
        wire = jaxfa.error_wire(jnp.zeros((IMAGES, CLASSES)))
        how = {"schedule": getattr(jaxfa.stacks, schedule), "unroll": unroll}
        h, wire = jaxfa.direct_stack(lambda w, h: jnp.tanh(operation(layer)(h, w)), w, x, wire, feedback, **how)
        logits = jaxfa.with_wire(h.reshape(IMAGES, size) @ head, wire, feedback)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(w, feedback, head)
    params = [{"w": np.asarray(one), "b": np.zeros(one.shape[-1])} for one in (*w, head)]
    net = Network((layer, layer, layer, Dense()), params, np.asarray(x), labels)
    known = [plain(jax.tree.map(lambda leaf, i=i: leaf[i], feedback)) for i in range(3)]
    grads, slots = net.learn(REFERENCES[name], [None, *known])
    close(got[0], np.stack([g["w"] for g in grads[:-1]]))
    for path, leaf in jax.tree.leaves_with_path(got[1]):
        close(leaf, np.stack([backwards.at(one, path).reshape(leaf.shape[1:]) for one in slots]))
    close(got[2], grads[-1]["w"])


def test_every_method_has_its_equations():
    assert set(REFERENCES) | ELSEWHERE == {method.name for method in METHODS}


@pytest.mark.parametrize("wrong", ["another rule", "a transposed window"])
def test_wrong_equations_are_told(wrong, x64):
    layers, params, data, _, feedback = create("conv", jaxfa.fa())
    net = Network(layers, [plain(p) for p in params], np.asarray(data[0]), data[1])
    reference = REFERENCES["backprop"] if wrong == "another rule" else by_transposed_window
    (first, *_), _ = net.learn(reference, [plain(f) for f in feedback])
    got, _ = signals(layers, params, feedback, data)
    assert np.abs(got[0]["w"] - first["w"]).max() > 1e-3


def by_transposed_window(net, i, feedback, delta, e):
    b = feedback.b
    return net.back(i, b.swapaxes(0, 1) if b.ndim == 4 else b, delta), {}
