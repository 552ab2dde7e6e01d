"""Why GrAPE perturbs activations and not weights: weights have fewer dimensions only where they can't see enough.

A layer's weights ``W + P`` with white ``P`` shift its output by ``x P``, for all examples the same ``P``. Expectations
are exact here: of what is quadratic in white noise, the expectation is the sum over the unit vectors of its space.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxfa
from tests.jacobians import KEY

N, INPUTS, UNITS, CLASSES = 9, 6, 7, 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def head(a, last):
    """What is above the layer, from its output before the nonlinearity to the logits."""
    return jax.nn.relu(a).reshape(N, -1) @ last.reshape(-1, CLASSES)


def jacobian(a, last):
    """Each example's own ``d logits / d a``."""
    return jnp.einsum("bob...->bo...", jax.jacrev(head)(a, last))


def expectation(estimator, shape):
    """The expectation of a function that is quadratic in white noise of a shape."""
    units = jnp.eye(math.prod(shape)).reshape(-1, *shape)
    return jnp.sum(lax.map(estimator, units), 0)


def dense_estimator(x, w, last):
    """``<y' (x P) / |x|^2>``, without bias for each example's Jacobian whatever the others' are."""

    def estimate(p):
        _, y = jax.jvp(lambda w: head(x @ w, last), (w,), (p,))
        return jnp.einsum("bo,bi->oi", y, x @ p / jnp.sum(jnp.square(x), 1, keepdims=True)) / N

    return estimate


def test_in_a_dense_layer_it_is_unbiased(x64):
    x, w, last = normal(N, INPUTS), normal(INPUTS, UNITS, seed=1), normal(UNITS, CLASSES, seed=2)
    found = expectation(dense_estimator(x, w, last), w.shape)
    np.testing.assert_allclose(found, jacobian(x @ w, last).mean(0), atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_in_a_dense_layer_its_variance_is_more_than_independent_noises_at_the_same_cost(shift, x64):
    # Examples b and c share noise by the cosine r of their inputs: E |J^ - J|^2 = <r^2 (n + 1) <J_b, J_c>>, of which
    # independent noise has the terms b = c alone. The dimensions, n_in n_out, are never fewer than n_out.
    x, w, last = normal(N, INPUTS) + shift, normal(INPUTS, UNITS, seed=1), normal(UNITS, CLASSES, seed=2)
    each = np.asarray(jacobian(x @ w, last)).reshape(N, -1)
    unit = np.asarray(x / jnp.linalg.norm(x, axis=1, keepdims=True))
    terms = (UNITS + 1) * np.square(unit @ unit.T) * (each @ each.T) / N**2
    keys = jax.random.split(KEY, 16000)
    found = lax.map(lambda key: dense_estimator(x, w, last)(jax.random.normal(key, w.shape)), keys, batch_size=500)
    measured = np.mean(np.sum(np.square(np.asarray(found) - np.asarray(jacobian(x @ w, last).mean(0))), (1, 2)))
    np.testing.assert_allclose(measured, terms.sum(), rtol=0.05)
    assert measured > (1.3 if shift == 0 else 2) * np.trace(terms)


def conv_layer():
    x, w, last = normal(N, 6, 6, 2), normal(3, 3, 2, 3, seed=1), normal(6, 6, 3, CLASSES, seed=2)
    patches = lax.conv_general_dilated_patches(
        x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(N, 36, 18)
    return x, w, last, patches


def test_in_a_convolution_it_is_smoothed_by_the_patches_products(x64):
    x, w, last, patches = conv_layer()

    def estimate(p):
        _, y = jax.jvp(lambda w: head(jaxfa.conv(x, w), last), (w,), (p,))
        noise = jaxfa.conv(x, p).reshape(N, 36, 3) / jnp.sum(jnp.square(patches), 2, keepdims=True)
        return jnp.einsum("bo,bui->oui", y, noise) / N

    each = jacobian(jaxfa.conv(x, w), last).reshape(N, CLASSES, 36, 3)
    products = jnp.einsum("bus,bvs->buv", patches, patches) / jnp.sum(jnp.square(patches), 2, keepdims=True)
    found = expectation(estimate, w.shape)
    np.testing.assert_allclose(found, jnp.einsum("buv,bovi->oui", products, each) / N, atol=1e-12)
    true = each.mean(0)
    assert jnp.linalg.norm(found - true) > 0.5 * jnp.linalg.norm(true)


def test_where_a_kernel_has_fewer_dimensions_than_the_map_nothing_could_undo_that(x64):
    # All that a kernel's perturbation shows of J is patches^T J. 3 x 3 x 2 < 6 x 6: other Jacobians show the same.
    x, w, last, patches = conv_layer()
    each = jacobian(jaxfa.conv(x, w), last).reshape(N, CLASSES, 36, 3)
    unseen = np.linalg.svd(np.asarray(patches[0]).T)[2][18:]
    assert len(unseen) == 36 - 18
    other = each[0] + 10 * jnp.einsum("u,i->ui", unseen[0], jnp.ones(3))[None]
    assert jnp.linalg.norm(other - each[0]) > jnp.linalg.norm(each[0])
    for seed in range(5):
        noise = jaxfa.conv(x[:1], normal(*w.shape, seed=seed)).reshape(36, 3)
        seen = [jnp.einsum("oui,ui->o", j, noise) for j in (each[0], other)]
        np.testing.assert_allclose(*seen, atol=1e-9)
