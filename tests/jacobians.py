"""Small networks whose activations can be shifted, their Jacobians by reverse mode, and many estimates of these."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxfa
from jaxfa.rules.shared.estimates import jacobian_estimates
from jaxfa.rules.shared.jacobian import JacobianFeedback
from jaxfa.rules.shared.noise import random_signs

KEY = jax.random.PRNGKey(3)
SIZES = (6, 7, 5, 4)

# GrAPE as published, but for its signs, and without state of its own beside B.
literal = partial(jaxfa.grape, tile=None, scaling=0.0)


def dense(taps, x, weights):
    """A ReLU network whose hidden activations are shifted by ``taps``."""
    *hidden, last = weights
    h = x
    for w, tap in zip(hidden, taps, strict=True):
        h = jax.nn.relu(h @ w) + tap
    return h @ last


def conv(taps, x, weights):
    """Two convolutions, the second strided, a mean over space, a linear layer."""
    first, second, last = weights
    h = jax.nn.relu(jaxfa.conv(x, first)) + taps[0]
    h = jax.nn.relu(jaxfa.conv(h, second, strides=2)) + taps[1]
    return h.mean((1, 2)) @ last


def network(name):
    """``taps -> logits`` on one batch, and its feedback, all zero."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / math.sqrt(math.prod(shape[:-1])))

    if name == "dense":
        x, weights = normal(9, SIZES[0]) * 5, [normal(n, m) for n, m in itertools.pairwise(SIZES)]
        own = [(n,) for n in SIZES[1:-1]]
        run = dense
    else:
        x, weights = normal(9, 4, 4, 2) * 10, [normal(3, 3, 2, 3), normal(3, 3, 3, 4), normal(4, 3)]
        own = [(4, 4, 3), (2, 2, 4)]
        run = conv
    classes = weights[-1].shape[-1]
    nodes = [JacobianFeedback(jnp.zeros((*shape, classes)), None, shape) for shape in own]
    return (lambda taps: run(taps, x, weights)), nodes


def jacobians(forward, nodes):
    """The mean over examples of ``(d logits / d h)^T``, by reverse mode."""
    zeros = [jnp.zeros((9, *node.own)) for node in nodes]
    full = jax.jit(jax.jacrev(forward))(zeros)  # (example, output, example, own...)
    return [np.moveaxis(np.einsum("bob...->o...", np.asarray(j)), 0, -1) / 9 for j in full]


def estimates(forward, nodes, key, separate=False, perturbation=random_signs):
    """One batch's, with their noise."""
    return jax.jit(partial(jacobian_estimates, forward, nodes, perturbation=perturbation, separate=separate))(key)


def estimate(*args, **options):
    """One batch's, of the Jacobians alone."""
    return [one.jacobian for one in estimates(*args, **options)]


def samples(forward, nodes, count, *, separate=False, perturbation=jax.random.normal, of=estimate):
    """Many batches' estimates, each with its own perturbations."""
    one = jax.jit(lambda key: of(forward, nodes, key, separate=separate, perturbation=perturbation))
    return jax.tree.map(np.asarray, lax.map(one, jax.random.split(KEY, count), batch_size=500))
