"""Measured maps: exact where their form can say what the Jacobians are, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.grape import measured
from experiments.grape.measured import MEASURED, alone, by_activation, by_output

pytestmark = pytest.mark.usefixtures("x64")
SHAPES = ((40, 2, 4), (40, 3), (8, 3), (3, 8, 8))
H, E, W, QUADRATIC = (np.random.default_rng(seed).normal(size=shape) for seed, shape in enumerate(SHAPES))


def linear(h):
    return h.reshape(40, 8) @ W


def quadratic(h):
    """Logits ``h^T A_c h / 2``, whose Jacobians are affine in ``h``."""
    flat = h.reshape(40, 8)
    return jnp.einsum("Nn,Cnm,Nm->NC", flat, QUADRATIC + QUADRATIC.swapaxes(1, 2), flat) / 2


def delivered(gates, logits, ridge, monkeypatch):
    """What one batch's measured maps deliver, and what backpropagation does."""
    monkeypatch.setattr(measured, "RIDGE", ridge)
    rule = measured.measured(gates, 0.5)
    feedback = [rule.init(jax.random.key(0), H, E)]
    for _ in range(2):  # the first batch teaches what the second delivers
        (bound,) = rule.bind(lambda taps: logits(H + taps[0]), feedback)
        changes, _ = rule.transform.update([bound.signal(H, E)], None, feedback)
        feedback = jax.tree.map(jnp.add, feedback, changes)
    return bound.deliver(H, E), jax.vjp(logits, H)[1](E)[0]


def close(found, wanted, tolerance):
    return bool(jnp.linalg.norm(found - wanted) < tolerance * jnp.linalg.norm(wanted))


def test_a_constant_jacobian_is_measured_exactly(monkeypatch):
    assert close(*delivered(alone, linear, 0.0, monkeypatch), 1e-12)


def test_jacobians_that_are_affine_in_the_activation_need_gates_of_it(monkeypatch):
    assert close(*delivered(by_activation, quadratic, 1e-9, monkeypatch), 1e-4)
    assert not close(*delivered(alone, quadratic, 0.0, monkeypatch), 0.5)
    assert not close(*delivered(by_output, quadratic, 1e-9, monkeypatch), 0.5)


def test_jacobians_that_are_affine_in_the_probabilities_need_gates_of_them(monkeypatch):
    def moved(h):
        """Logits whose probabilities gate their derivatives, though not their values."""
        y = linear(h)
        p, still = jax.lax.stop_gradient((jax.nn.softmax(y), h))
        return y + jnp.einsum("Np,pCn,Nn->NC", p, QUADRATIC[:, :3], (h - still).reshape(40, 8))

    assert close(*delivered(by_output, moved, 1e-9, monkeypatch), 1e-4)
    assert not close(*delivered(alone, moved, 0.0, monkeypatch), 0.1)


def test_a_memory_is_the_share_that_a_batch_leaves():
    rule = measured.measured(alone, 0.75)
    feedback = rule.init(jax.random.key(0), H, E)
    for scale in (1.0, 3.0):
        (bound,) = rule.bind(lambda taps, scale=scale: scale * linear(H + taps[0]), [feedback])
        (change,), _ = rule.transform.update([bound.signal(H, E)], None, [feedback])
        feedback = jax.tree.map(jnp.add, feedback, change)
    assert close(feedback.moment[0], (0.75 * 0.25 * 1 + 0.25 * 3) * W, 1e-12)
    assert close(feedback.power, jnp.array([[0.75 * 0.25 + 0.25]]), 1e-12)


def test_every_measured_map_is_made_for_maps_of_pixels():
    h, logits = jax.ShapeDtypeStruct((4, 8, 8, 2), jnp.float32), jax.ShapeDtypeStruct((4, 3), jnp.float32)
    gates = {name: rule.init(jax.random.key(0), h, logits).b.shape for name, (_, rule) in MEASURED.items()}
    assert gates.pop("map-by-output") == (3, 128, 3)
    assert gates.pop("map-by-activation") == (17, 128, 3)
    assert set(gates.values()) == {(1, 128, 3)}
