"""Contractions that a model makes by itself: found in the traced program, forward as they are, backward by the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxfa
import jaxfa.nn


class Own(nnx.Module):
    """Weights, and a function ``(weights, input) -> output`` of the model's own, above a layer that needs an error."""

    def __init__(self, call, shape, width=4):
        rngs = nnx.Rngs(0)
        self.below = nnx.Linear(width, width, param_dtype=float, rngs=rngs)
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.mask = jnp.asarray(np.tri(4, 6))
        self.call = call

    def __call__(self, x):
        return self.call(self, jnp.tanh(self.below(x)))


def conv(spec, groups=1):
    return lambda s, x: lax.conv_general_dilated(
        x, s.w[...], (1, 1), "SAME", dimension_numbers=spec, feature_group_count=groups
    )


def chosen(x):
    return jnp.argsort(lax.stop_gradient(x)[:, 0]) % 3


def scanned(s, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, s.w[...].astype(x.dtype))[0]


def recurrent(s, x):
    return lax.scan(lambda h, u: (jnp.tanh((h + u) @ s.w[...]),) * 2, jnp.zeros(x[0].shape), x)[1]


def nested(s, x):
    def outer(x, ws):
        return jnp.tanh(lax.scan(lambda x, w: (x @ w, None), x, ws)[0]), None

    return lax.scan(outer, x, s.w[...])[0]


ROWS, IMAGE, SEQUENCE = (5, 4), (2, 6, 6, 4), (3, 5, 4)
# name: (what the model does, the weights' shape, the input's, how many times an error passes them)
KINDS = {
    "matmul": (lambda s, x: x @ s.w[...], (4, 6), ROWS, 1),
    "transposed": (lambda s, x: x @ s.w[...].T, (6, 4), ROWS, 1),
    "weights on the left": (lambda s, x: (s.w[...] @ x.T).T, (6, 4), ROWS, 1),
    "one output": (lambda s, x: x @ s.w[...], (4,), SEQUENCE, 1),
    "einsum": (lambda s, x: jnp.einsum("btd,ndh->btnh", x, s.w[...]), (2, 4, 3), SEQUENCE, 1),
    "einsum of heads": (lambda s, x: jnp.einsum("bnd,ndh->bhn", x, s.w[...]), (5, 4, 3), SEQUENCE, 1),
    "vectors of heads": (lambda s, x: jnp.einsum("bnd,nd->bn", x, s.w[...]), (5, 4), SEQUENCE, 1),
    "reshaped": (lambda s, x: x @ s.w[...].reshape(4, 6), (4, 2, 3), ROWS, 1),
    "scaled": (lambda s, x: x @ (s.w[...] * 0.5), (4, 6), ROWS, 1),
    "cast": (lambda s, x: x @ s.w[...].astype(jnp.float32).astype(float), (4, 6), ROWS, 1),
    "gate": (lambda s, x: nnx.silu(x @ s.w[0]) * (x @ s.w[1]), (2, 4, 6), ROWS, 1),
    "normed by hand": (lambda s, x: x @ (s.w[...] / jnp.linalg.norm(s.w[...], axis=0, keepdims=True)), (4, 6), ROWS, 1),
    "masked": (lambda s, x: x @ (s.w[...] * s.mask), (4, 6), ROWS, 1),
    "masked by a choice": (lambda s, x: x @ jnp.where(s.mask > 0, s.w[...], 0.0), (4, 6), ROWS, 1),
    "conv": (conv(("NHWC", "HWIO", "NHWC")), (3, 3, 4, 5), IMAGE, 1),
    "conv, channels first": (
        lambda s, x: conv(("NCHW", "OIHW", "NCHW"))(s, x.transpose(0, 3, 1, 2)), (5, 4, 3, 3), IMAGE, 1
    ),
    "conv, in groups": (conv(("NHWC", "HWIO", "NHWC"), 2), (3, 3, 2, 6), IMAGE, 1),
    "experts, all": (lambda s, x: jnp.einsum("bd,edh->beh", x, s.w[...]), (3, 4, 2), ROWS, 1),
    "experts, mapped": (lambda s, x: jax.vmap(lambda w, x: x @ w)(s.w[...], x), (3, 4, 2), SEQUENCE, 1),
    "experts by index": (lambda s, x: jnp.einsum("bd,bdh->bh", x, s.w[chosen(x)]), (3, 4, 2), ROWS, 1),
    "experts by one-hot": (
        lambda s, x: jnp.einsum("bd,bdh->bh", x, jnp.einsum("be,edh->bdh", jax.nn.one_hot(chosen(x), 3), s.w[...])),
        (3, 4, 2), ROWS, 1,
    ),
    "one of a stack": (lambda s, x: x @ s.w[jnp.int32(x[0, 0] > 9)], (3, 4, 2), ROWS, 1),
    "jit": (lambda s, x: jax.jit(lambda w, x: jnp.tanh(x @ w))(s.w[...], x), (4, 6), ROWS, 1),
    "remat": (lambda s, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(s.w[...], x), (4, 6), ROWS, 1),
    "remat, closed over": (lambda s, x: jax.checkpoint(lambda x: jnp.tanh(x @ s.w[...]))(x), (4, 6), ROWS, 1),
    "cond": (lambda s, x: lax.cond(x[0, 0] < 9, jnp.dot, lambda x, w: 2 * x @ w, x, s.w[...]), (4, 6), ROWS, 1),
    "scan over a stack": (scanned, (3, 4, 4), ROWS, 3),
    "scan in a scan": (nested, (2, 3, 4, 4), ROWS, 6),
    "scan over time": (recurrent, (4, 4), SEQUENCE, None),
}  # fmt: skip


@pytest.fixture(params=KINDS, name="case")
def make_case(request, x64):
    call, shape, size, passes = KINDS[request.param]
    return Own(call, shape), jax.random.normal(jax.random.key(2), size), passes


def gradient(model, x, **argnums):
    def loss(model):
        y = model(x)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=float).reshape(y.shape)))

    return nnx.grad(loss, **argnums)(model)


def as_feedback(factor):
    return jaxfa.Rule(lambda key, kernel: jaxfa.FixedFeedback(kernel * factor))


def attach(model, rule, x, **options):
    return jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(3), example=x, **options)


def test_forward_is_bit_identical_and_w_as_feedback_is_backprop(case):
    model, x, _ = case
    aligned = attach(model, as_feedback(1.0), x)
    np.testing.assert_array_equal(aligned(x), model(x))
    np.testing.assert_array_equal(nnx.jit(lambda m: m(x))(aligned), nnx.jit(lambda m: m(x))(model))
    ours, true = gradient(aligned, x)["model"], gradient(model, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12), ours, true)


def test_error_goes_through_the_feedback_and_nothing_else(case):
    model, x, passes = case
    ours, true = gradient(attach(model, as_feedback(-2.0), x), x)["model"], gradient(model, x)
    if passes == 1:
        np.testing.assert_allclose(ours["w"][...], true["w"][...], rtol=1e-6, atol=1e-12)
    if passes:
        below = ours["below"]["kernel"][...], (-2.0) ** passes * true["below"]["kernel"][...]
        np.testing.assert_allclose(*below, rtol=1e-6, atol=1e-12)
    assert np.linalg.norm(ours["below"]["kernel"][...] - true["below"]["kernel"][...]) > 1e-2


def test_coverage_lists_the_parameter_by_its_path(case):
    model, x, _ = case
    rows = attach(model, jaxfa.fa(), x).coverage().rows
    assert [row[:4] for row in rows] == [
        ("below", (4, 4), "through feedback", "not needed: first"),
        ("w", model.w.shape, "through feedback" if case[2] != 1 else "exact: last", "through its feedback"),
    ]
    assert "FixedFeedback" in rows[1].feedback
