"""What a backward pass costs: direct feedback skips the errors of the layers above, also once compiled."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxfa
from jaxfa.jaxprs.versions import equations, opened
from tests.methods import create, loss

SIZES = (40, 64, 56, 48, 10)
N = 128
KEY = jax.random.PRNGKey(0)
LAYERS = list(itertools.pairwise(SIZES))
FORWARD = [2 * N * n * m for n, m in LAYERS]
DELIVERED = [2 * N * SIZES[-1] * n for n in SIZES[1:-1]]
EXPECTED = {
    "backprop": 2 * sum(FORWARD) + sum(FORWARD[1:]),
    "fa": 2 * sum(FORWARD) + sum(FORWARD[1:]),
    "dfa": 2 * sum(FORWARD) + sum(DELIVERED),
}
RULES = {"backprop": jaxfa.backprop(), "fa": jaxfa.fa(), "dfa": jaxfa.dfa(), "ldfa": jaxfa.ldfa(5)}


def program(name, steps=None):
    """A gradient, or gradient descent under ``scan``, with the feedback as an argument."""
    params, feedback = create(RULES[name], KEY, SIZES)
    data = jnp.ones((N, SIZES[0])), jnp.zeros(N, jnp.int32)

    def gradient(params, feedback):
        return jax.grad(loss)(params, feedback, *data, jax.nn.relu)

    def descent(params, feedback):
        def step(params, _):
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient(params, feedback)), None

        return lax.scan(step, params, length=steps)[0]

    return (descent if steps else gradient), (params, feedback)


def contractions(jaxpr):
    """Shapes of every matrix product, in all nested programs."""
    products = [eqn for eqn in equations(opened(jaxpr)) if eqn.primitive.name == "dot_general"]
    return [tuple(v.aval.shape for v in (*eqn.invars, *eqn.outvars)) for eqn in products]


def dot_flops(shapes):
    left, right, out = map(math.prod, shapes)
    return 2 * out * math.isqrt(left * right // out)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("steps", [None, 3], ids=["one_gradient", "scanned_steps"])
def test_the_program_has_the_matrix_products_of_the_rule_and_no_other(name, steps):
    function, args = program(name, steps)
    found = contractions(jax.make_jaxpr(jax.jit(function))(*args))
    assert len(found) == 3 * len(LAYERS) - 1
    assert sum(dot_flops(shapes) for shapes in found) == EXPECTED[name]


@pytest.mark.parametrize("steps", [None, 1], ids=["one_gradient", "scanned_steps"])
def test_the_compiled_program_skips_what_direct_feedback_skips(steps):
    flops = {}
    for name, expected in EXPECTED.items():
        function, args = program(name, steps)
        flops[name] = jax.jit(function).lower(*args).compile().cost_analysis()["flops"]
        pointwise = flops[name] - expected
        assert 0 < pointwise < 0.05 * expected, name
    skipped = sum(FORWARD[1:]) - sum(DELIVERED)
    assert skipped > 0.15 * EXPECTED["backprop"]
    assert abs(flops["backprop"] - flops["dfa"] - skipped) < 0.01 * EXPECTED["backprop"]
    assert abs(flops["backprop"] - flops["fa"]) < 0.01 * EXPECTED["backprop"]


def test_a_low_rank_error_costs_what_its_thin_products_cost():
    r = 5
    function, args = program("ldfa")
    results = [shapes[-1] for shapes in contractions(jax.make_jaxpr(function)(*args))]
    thin = 0
    for n, m in LAYERS[1:]:
        assert (m, m) not in results  # no covariance
        assert results.count((n, m)) + results.count((m, n)) == 1  # the weights' gradient, and no product of factors
        transport, oja, hebb = 2 * N * r * (m + n), 2 * N * r * (m + r) + 2 * m * r * r, 2 * n * m * r
        thin += transport + oja + hebb
    # The program projects the error twice, for the transport and for Oja's rule; the compiler does so once.
    expected = 2 * sum(FORWARD) + thin
    found = jax.jit(function).lower(*args).compile().cost_analysis()["flops"]
    assert abs(found - expected) < 0.05 * expected
