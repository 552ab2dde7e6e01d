"""Angles and ranks against numbers known without the code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfa
from jaxfa.measure import diagnostics

RANKS = (diagnostics.entropy_rank, diagnostics.participation_ratio, diagnostics.stable_rank)
KEY = jax.random.PRNGKey(0)


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 1e-3, 0.5, 30.0, 90.0, 135.0, 179.5, 180.0 - 1e-3, 180.0 - 1e-5, 180.0])
def test_angle_keeps_its_digits_near_0_and_180(degrees, x64):
    u, v = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 2)))[0].T
    radians = np.deg2rad(degrees)
    turned = 3.0 * (np.cos(radians) * u + np.sin(radians) * v)
    got = float(jax.jit(diagnostics.angle)(jnp.asarray(u.reshape(4, 6)), jnp.asarray(turned.reshape(4, 6))))
    assert abs(got - degrees) < 1e-12 * max(degrees, 1)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_angle_and_ratio_do_not_depend_on_scale(scale):
    a, b = jnp.array([1.0, 2.0, 2.0]), jnp.array([2.0, 1.0, -2.0])
    alignment = diagnostics.compare(scale * a, scale * b)
    np.testing.assert_allclose(alignment.angle, 90, rtol=1e-6)
    np.testing.assert_allclose(alignment.norm_ratio, 1, rtol=1e-6)


def test_angle_of_low_precision_arrays_is_computed_in_single():
    a, b = jnp.array([1.0, 2.0, 3.0], jnp.bfloat16), jnp.array([1.0, 2.0, 3.03125], jnp.bfloat16)
    expected = diagnostics.angle(a.astype(jnp.float32), b.astype(jnp.float32))
    assert diagnostics.angle(a, b).dtype == jnp.float32
    assert diagnostics.angle(a, b) == expected > 0.2


def test_no_angle_with_zero_and_no_silent_nan():
    assert np.isnan(diagnostics.angle(jnp.zeros(3), jnp.ones(3)))
    assert np.isnan(diagnostics.angle(jnp.ones(3), jnp.zeros(3)))
    assert np.isnan(diagnostics.angle(jnp.array([1.0, jnp.nan]), jnp.ones(2)))
    for rank in RANKS:
        assert np.isnan(rank(jnp.full((3, 2), jnp.nan)))


def test_compare_keeps_the_tree_and_measures_each_array():
    true = {"a": jnp.array([[3.0, 4.0]]), "b": [jnp.array([2.0])]}
    pseudo = {"a": jnp.array([[8.0, -6.0]]), "b": [jnp.array([-1.0])]}
    result = jax.jit(diagnostics.compare)(pseudo, true)
    np.testing.assert_allclose(result["a"], (90, 2), rtol=1e-6)
    np.testing.assert_allclose(result["b"][0], (180, 0.5), rtol=1e-6)
    assert isinstance(result["a"], diagnostics.Alignment)


def test_arrays_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(3, 2\)"):
        diagnostics.angle(jnp.ones((2, 3)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="one shape"):
        diagnostics.compare({"a": jnp.ones(2)}, {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"structure|key"):
        diagnostics.compare({"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    for rank in RANKS:
        with pytest.raises(ValueError, match=r"reshape it first"):
            rank(jnp.ones((2, 3, 4)))


def test_weight_angle_compares_what_stands_in_the_weights_place():
    w = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    cosine = 6.5 / (2 * np.sqrt(1 + 4 + 9 + 0.25))
    np.testing.assert_allclose(
        diagnostics.weight_angle(w, jaxfa.usf().init(KEY, w)), np.degrees(np.arccos(cosine)), rtol=1e-5
    )
    np.testing.assert_allclose(jax.jit(diagnostics.weight_angle)(w, jaxfa.FixedFeedback(-w)), 180, rtol=1e-6)
    with pytest.raises(ValueError, match="DirectMatrix has no matrix in the place of the weights"):
        diagnostics.weight_angle(w, jaxfa.DirectMatrix(w))
    with pytest.raises(ValueError, match="no matrix in the place"):
        diagnostics.weight_angle(w, jaxfa.LayerFeedback())
    with pytest.raises(ValueError, match="NoneType has no matrix"):
        diagnostics.weight_angle(w, None)
    with pytest.raises(ValueError, match="one shape"):
        diagnostics.weight_angle(w, jaxfa.FixedFeedback(jnp.ones((2, 3))))


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_ranks_of_a_known_spectrum(scale):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 64)))[0] for n in (80, 64))
    matrix = jnp.asarray(scale * (left / np.arange(1, 65)) @ right.T, jnp.float32)
    got = [float(jax.jit(rank)(matrix)) for rank in RANKS]
    np.testing.assert_allclose(got, [29.1, 2.45, 1.63], rtol=2e-3)
    np.testing.assert_allclose([float(rank(matrix.T)) for rank in RANKS], got, rtol=1e-4)


def test_ranks_of_extreme_matrices():
    for rank in RANKS:
        assert float(jax.jit(rank)(jnp.zeros((4, 3)))) == 0
        np.testing.assert_allclose(rank(jnp.eye(5)), 5, rtol=1e-5)
        np.testing.assert_allclose(rank(jnp.outer(jnp.arange(1.0, 5), jnp.ones(3))), 1, atol=1e-4)
        np.testing.assert_allclose(rank(jnp.eye(4, dtype=jnp.bfloat16)), 4, rtol=1e-5)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def convolve(x, w, strides=(1, 1), padding="VALID"):
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_flops_of_products_and_convolutions_are_exact():
    assert diagnostics.flops(jnp.matmul, shape(6, 128), shape(128, 32)) == 2 * 6 * 128 * 32
    assert diagnostics.flops(jnp.matmul, shape(5, 8, 9), shape(5, 9, 7)) == 2 * 5 * 8 * 9 * 7
    image, kernel = shape(2, 9, 9, 3), shape(3, 3, 3, 8)
    assert diagnostics.flops(convolve, image, kernel) == 2 * 2 * 7 * 7 * 27 * 8
    assert diagnostics.flops(lambda x, w: convolve(x, w, (2, 2)), image, kernel) == 2 * 2 * 4 * 4 * 27 * 8
    # (3 * 9 - 2) ** 2 of 9 * 9 places times 3 * 3 taps meet the image.
    assert diagnostics.flops(lambda x, w: convolve(x, w, padding="SAME"), image, kernel) == 2 * 2 * 25**2 * 3 * 8


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_flops_of_both_halves_of_a_convolutions_backward_are_the_forwards(strides):
    image, kernel = shape(2, 9, 9, 3), shape(3, 3, 3, 8)
    forward = diagnostics.flops(lambda x, w: convolve(x, w, strides), image, kernel)
    for argument, primal in enumerate((image, kernel)):

        def half(x, w, delta, argument=argument, primal=primal):
            linear = (lambda x: convolve(x, w, strides)) if argument == 0 else (lambda w: convolve(x, w, strides))
            return jax.linear_transpose(linear, primal)(delta)

        delta = jax.eval_shape(lambda x, w: convolve(x, w, strides), image, kernel)
        assert diagnostics.flops(half, image, kernel, delta) == forward


def test_flops_are_of_the_compiled_program():
    product = 2 * 16**3
    square = shape(16, 16)
    assert diagnostics.flops(lambda x: (x @ x, x)[1], square) == 0  # unused
    assert diagnostics.flops(lambda x: (x @ x) + (x @ x), square) == product + 16 * 16  # computed twice
    assert diagnostics.flops(jnp.exp, square) == 0


def test_flops_of_the_backward_are_the_difference():
    w, x = shape(16, 8), shape(5, 16)

    def loss(w, x):
        return jnp.tanh(x @ w).sum()

    backward = diagnostics.flops(jax.value_and_grad(loss), w, x) - diagnostics.flops(loss, w, x)
    product = 2 * 5 * 16 * 8
    assert product <= backward <= product + 5 * 5 * 8


def test_flops_count_a_loops_body_once_and_no_decomposition():
    square, product = shape(16, 16), 2 * 16**3

    def looped(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=10)[0]

    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert product <= diagnostics.flops(looped, square) < 1.01 * product
    assert 2 * product <= diagnostics.flops(branched, square) < 2.01 * product
    assert diagnostics.flops(jnp.linalg.svd, square) < product
    assert diagnostics.flops(jnp.linalg.qr, square) < product
