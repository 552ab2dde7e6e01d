"""Every rule of the table against its equations in NumPy, in a dense and a convolutional network, float64."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfa
from jaxfa.base import is_direct
from jaxfa.nn.model.variables import init_at
from tests.methods import METHODS
from tests.oracles import backwards, phases
from tests.oracles.backwards import REFERENCES
from tests.oracles.networks import Conv, Dense, Network, plain

KEY = jax.random.key(7)
CLASSES, IMAGES = 3, 6
NETWORKS = {
    "dense": ((Dense(), Dense(), Dense()), ((5,), (5, 7), (7, 6), (6, CLASSES))),
    "conv": (
        (Conv(1), Conv(2), Dense(), Dense()),
        ((8, 8, 2), (3, 3, 2, 4), (3, 3, 4, 3), (48, 6), (6, CLASSES)),
    ),
}
# Their references, as independent, are in test_forward_gradient and test_pepita.
ELSEWHERE = {"forward_gradient", "pepita", "pepita_mirrored"}
ROWS = {method.name: method.rule for method in METHODS if method.name not in ELSEWHERE}
grid = pytest.mark.parametrize("kind", NETWORKS)


def operation(layer):
    """The layer that the reference has, as jaxfa computes it."""
    if isinstance(layer, Dense):
        return jaxfa.linear
    return lambda x, w, feedback=None: jaxfa.conv(x, w, feedback, strides=layer.stride)


def block(op):
    """A hidden layer, as a rule is told of it."""

    def run(x, w):
        y = op(x, w[0]["w"])
        return jnp.tanh(y + w[0]["b"].reshape(*[1] * (y.ndim - 1), -1))

    return run


def create(kind, rule):
    """A network, parameters, a batch, and feedback for the input of every layer but the first."""
    layers, (inputs, *shapes) = NETWORKS[kind]
    rng = np.random.default_rng(3)
    x, labels = jnp.asarray(rng.normal(size=(IMAGES, *inputs))), rng.integers(CLASSES, size=IMAGES)
    params = [
        {"w": jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))), "b": jnp.zeros(shape[-1])}
        for shape in shapes
    ]
    if rule.weights is not None:
        params = [p | {"w": rule.weights(p["w"], f"layer {i}")} for i, p in enumerate(params)]
    xs = Network(layers, [plain(p) for p in params], np.asarray(x), labels).xs

    def ops(params):
        return [
            jaxfa.Layer(operation(one), jax.ShapeDtypeStruct(x.shape, x.dtype), p["w"])
            for one, x, p in zip(layers, xs, params, strict=False)
        ]

    # One program, which compiles sooner than as many as there are operations.
    feedback = jax.jit(lambda params: feedback_of(rule, ops(params), params))(params)
    return layers, params, (x, labels), ops(params), [None, *feedback]


def feedback_of(rule, ops, params):
    """Feedback for the input of every layer but the first."""
    keys, logits = jax.random.split(KEY, len(ops)), jax.ShapeDtypeStruct((IMAGES, CLASSES), jnp.float64)
    if not is_direct(rule):
        return [rule.init(k, one.w) for k, one in zip(keys, ops, strict=True)][1:]
    hidden = [jaxfa.Layer(block(one.op), one.x, (p, {})) for one, p in zip(ops[:-1], params, strict=False)]
    known = [{"layer": one, "above": tuple(hidden[i:]), "below": i - 1} for i, one in enumerate(ops)]
    feedback = [init_at(rule, **own)(k, own["layer"].x, logits) for k, own in zip(keys, known, strict=True)][1:]
    return [max(feedback, key=lambda f: f.b.size)] * len(feedback) if feedback[0].shared else feedback


def forward(layers, params, feedback, x, taps=None):
    """The logits, every error as the feedback says."""
    wire = jaxfa.error_wire(jnp.zeros((len(x), CLASSES)))
    for i, (layer, p, f) in enumerate(zip(layers, params, feedback, strict=True)):
        x = x.reshape(len(x), -1) if isinstance(layer, Dense) else x
        x = x if taps is None or i == 0 else x + taps[i - 1]
        x, wire = jaxfa.direct(x, wire, f) if isinstance(f, jaxfa.DirectFeedback) else (x, wire)
        y = operation(layer)(x, p["w"], f if isinstance(f, jaxfa.LayerFeedback) else None)
        y = y + p["b"].reshape(*[1] * (y.ndim - 1), -1)
        x = jnp.tanh(y)
    return jaxfa.with_wire(y, wire, feedback)


def signals(layers, params, feedback, data):
    """What the parameters and the feedback learn."""
    x, labels = data

    def loss(params, feedback):
        logits = forward(layers, params, feedback, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, feedback)


def arrays(feedback):
    """A feedback's arrays by name; drawn magnitudes, whose distribution has tests of its own, are read off."""
    if hasattr(feedback, "seed_bytes"):
        return SimpleNamespace(magnitude=None)
    return plain(feedback)


def close(got, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(got), expected, atol=tolerance, rtol=tolerance)


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
    grads, slots = net.learn(REFERENCES[name], known)
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


def refined(kind, rule, steps):
    """Feedback after some phases, with each phase's perturbations and the logits' derivatives along them, in NumPy."""
    layers, params, (x, labels), _, feedback = create(kind, rule)
    net, seen, found = Network(layers, [plain(p) for p in params], np.asarray(x), labels), [], [feedback[1:]]

    def logits(taps):
        return forward(layers, params, [None] * len(layers), x, taps)

    spy = jax.custom_jvp(logits)

    @spy.defjvp
    def perturb(primals, tangents):
        seen.append([np.asarray(one) for one in tangents[0]])
        return jax.jvp(logits, primals, tangents)

    for step in range(steps):
        found.append(rule.refine(spy, found[-1], jax.random.fold_in(KEY, step)))
    return [[plain(f) for f in one] for one in found], seen, [net.derivative(one) for one in seen]


@grid
def test_fdfa_is_the_running_mean_of_its_estimates(kind, x64):
    found, tangents, moved = refined(kind, jaxfa.fdfa(learning_rate=0.3), 2)
    for before, after, along, y in zip(found, found[1:], tangents, moved, strict=False):
        for f, new, p in zip(before, after, along, strict=True):
            estimate = phases.jacobian(p, y, f.b.shape[:-1], 1.0).mean(0).reshape(f.b.shape)
            close(new.b, f.b + 0.3 * (estimate - f.b))


@grid
def test_tiles_scales_and_the_kalman_mean_are_the_equations(kind, x64):
    rule = jaxfa.grape(averaging=jaxfa.rules.kalman(0.5), tile=4, scaling=0.3, learning_rate=0.2, epsilon=0.0)
    found, tangents, moved = refined(kind, rule, 3)
    known = [(0.0, None)] * len(found[0])
    for before, after, along, y in zip(found, found[1:], tangents, moved, strict=False):
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


@pytest.mark.parametrize("schedule", ["stored", "parallel", "stream"])
def test_stacks_of_blocks_are_the_equations(schedule, x64):
    rng = np.random.default_rng(5)
    w, x = jnp.asarray(rng.normal(size=(3, 4, 4)) / 2), jnp.asarray(rng.normal(size=(IMAGES, 4)))
    head, labels = jnp.asarray(rng.normal(size=(4, CLASSES))), rng.integers(CLASSES, size=IMAGES)
    b = jnp.asarray(rng.normal(size=(3, 4, CLASSES)))

    def loss(w, head):
        wire = jaxfa.error_wire(jnp.zeros((IMAGES, CLASSES)))
        feedback = jaxfa.DirectMatrix(b)
        how = getattr(jaxfa.stacks, schedule)
        h, wire = jaxfa.stacks.direct_stack(lambda w, h: jnp.tanh(h @ w), w, x, wire, feedback, schedule=how)
        return optax.softmax_cross_entropy_with_integer_labels(h @ head + wire, labels).mean()

    got = jax.grad(loss, argnums=(0, 1))(w, head)
    params = [{"w": np.asarray(one), "b": np.zeros(one.shape[-1])} for one in (*w, head)]
    net = Network((Dense(),) * 4, params, np.asarray(x), labels)
    grads, _ = net.learn(backwards.dfa, [None, *(SimpleNamespace(b=np.asarray(one)) for one in b)])
    close(got[0], np.stack([g["w"] for g in grads[:-1]]))
    close(got[1], grads[-1]["w"])


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
