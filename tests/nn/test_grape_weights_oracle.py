"""The paper's own perturbation of weights on a Flax model, against the equations in NumPy given its noise, float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from jaxfa.nn.taps.tap import taps_of
from tests.oracles import phases
from tests.oracles.networks import Conv, Dense, Network
from tests.twins import CLASSES, IMAGES, KEY, close, spied

RATE = 0.2
RULE = jaxfa.rules.published_grape(learning_rate=RATE, weights=True)
# Two convolutions of 76 and 185 weights, maps of 256 and 320 after them; a strided one and a dense layer of too many.
LAYERS = (Conv(1), Conv(1), Conv(2), Dense(), Dense())
SHAPES = ((3, 3, 2, 4), (3, 3, 4, 5), (3, 3, 5, 3), (48, 6), (6, CLASSES))
FEWER = [True, True, False, False]


class Model(nnx.Module):
    """Convolutions and dense layers with tanh between them."""

    def __init__(self, rngs):
        options = {"bias_init": nnx.initializers.normal(), "param_dtype": float, "rngs": rngs}
        self.layers = nnx.List(
            nnx.Linear(*shape, **options)
            if isinstance(layer, Dense)
            else nnx.Conv(*shape[2:], shape[:2], strides=layer.stride, **options)
            for layer, shape in zip(LAYERS, SHAPES, strict=True)
        )

    def __call__(self, x):
        for i, (layer, kind) in enumerate(zip(self.layers, LAYERS, strict=True)):
            x = jnp.tanh(x) if i else x
            x = layer(x.reshape(len(x), -1) if isinstance(kind, Dense) else x)
        return x


def refined(model, x):
    """Every layer's feedback before and after a phase; what this draws of weights and shifts activations by."""
    drawn, shifts = {}, []

    def refine(forward, feedback, key):
        def moved(key, noise):
            def draw(key, shape, dtype):
                assert shape not in drawn
                drawn[shape] = np.asarray(noise(key, shape, dtype))
                return drawn[shape]

            return forward.moved(key, draw)

        run, seen = spied(forward.run)
        feedback = RULE.refine(jaxfa.rules.ForwardPass(run, moved), feedback, key)
        shifts.extend(seen)
        return feedback

    attached = jaxfa.nn.attach(model, jaxfa.DirectRule(RULE.init, refine), rngs=nnx.Rngs(1), example=x)
    paths = [f"layers/{i}" for i in range(1, len(LAYERS))]
    before, after = [], []
    for found in (before, after):
        taps = taps_of(attached.model)
        found.extend(np.asarray(taps[path].feedback.get_value().b) for path in paths)
        if found is before:
            attached.refine(KEY, x)
    (shift,) = shifts
    return before, after, drawn, [shift[path] for path in paths]


@pytest.fixture
def phase(x64):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(IMAGES, 8, 8, 2))
    model = Model(nnx.Rngs(0))
    params = [{"w": np.asarray(one.kernel[...]), "b": np.asarray(one.bias[...])} for one in model.layers]
    return Network(LAYERS, params, x, rng.integers(CLASSES, size=IMAGES)), *refined(model, jnp.asarray(x))


def test_weights_noise_is_drawn_where_these_are_fewer_and_moves_activations_to_first_order(phase):
    net, _, _, drawn, shifts = phase
    sizes = [math.prod(p["w"].shape) + len(p["b"]) for p in net.params[:-1]]
    assert [size < math.prod(x.shape[1:]) for size, x in zip(sizes, net.xs[1:-1], strict=True)] == FEWER
    shapes = [p[name].shape for p in net.params[:2] for name in ("b", "w")]
    (noise,) = drawn.values()
    each = np.split(noise, np.cumsum([math.prod(shape) for shape in shapes]))
    assert not each.pop().size  # all of it is some weight's
    b0, w0, b1, w1 = (one.reshape(shape) for one, shape in zip(each, shapes, strict=True))
    for i, (shift, w, b) in enumerate(zip(shifts, (w0, w1), (b0, b1), strict=False)):
        close(shift, phases.moved_by(net, i, w, b))
    # The second's own weights alone move it, not what the first layer's noise does there.
    together = shifts[1] + net.slope(1) * net.layers[1](shifts[0], net.w[1])
    assert np.abs(together - shifts[1]).max() > 0.1


def test_feedback_turns_to_the_mean_of_the_movements_and_the_derivative_along_all(phase):
    net, before, after, _, shifts = phase
    y = net.derivative(shifts)
    alone = net.derivative([shifts[0], *(np.zeros_like(one) for one in shifts[1:])])
    for b, found, p in zip(before, after, shifts, strict=True):
        goal, wrong = (phases.jacobian(p, one, p.shape[1:], 1.0).mean(0).reshape(b.shape) for one in (y, alone))
        close(found, phases.turn(b, goal, p.shape[1:], RATE), 1e-7)  # the rule's epsilon is 1e-8
        assert np.abs(found - phases.turn(b, wrong, p.shape[1:], RATE)).max() > 1e-3
