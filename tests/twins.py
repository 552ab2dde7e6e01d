"""The networks of ``tests.oracles.networks`` as jaxfa computes them, in float64, and what its rules do in them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfa
from jaxfa.base import is_direct
from jaxfa.nn.model.variables import init_at
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


def close(got, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(got), expected, atol=tolerance, rtol=tolerance)


def spied(function):
    """The same function, and a list of the perturbations along which it is differentiated, as they come."""
    seen, spy = [], jax.custom_jvp(function)

    @spy.defjvp
    def perturb(primals, tangents):
        seen.append(jax.tree.map(np.asarray, tangents[0]))
        return jax.jvp(function, primals, tangents)

    return spy, seen


def refined(kind, rule, steps):
    """Feedback after some phases; all perturbations in these and the logits' derivatives along them, in NumPy."""
    layers, params, (x, labels), _, feedback = create(kind, rule)
    net = Network(layers, [plain(p) for p in params], np.asarray(x), labels)
    spy, seen = spied(lambda taps: forward(layers, params, [None] * len(layers), x, taps))
    found = [feedback[1:]]
    for step in range(steps):
        found.append(rule.refine(spy, found[-1], jax.random.fold_in(KEY, step)))
    return found, seen, [net.derivative(one) for one in seen]
