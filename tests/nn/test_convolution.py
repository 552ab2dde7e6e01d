"""Convolutions without feedback: their derivatives are JAX's own, and a plain model has them back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxfa
import jaxfa.nn

VALID = {"window_strides": (1, 1), "padding": "VALID"}
CALLS = {
    "strided": (((4, 7, 6, 2), (3, 3, 2, 3)), {"window_strides": (2, 1), "padding": "SAME"}),
    "in groups": (((4, 7, 6, 4), (3, 2, 2, 6)), VALID | {"feature_group_count": 2}),
}


class Net(nnx.Module):
    """A block of two convolutions, of which one may be the user's own, and a head."""

    def __init__(self, operation=lax.conv_general_dilated):
        rngs = nnx.Rngs(0)
        self.lower = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.upper = nnx.Conv(3, 3, (3, 3), conv_general_dilated=operation, rngs=rngs)
        self.head = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.upper(nnx.relu(self.lower(x)))).mean((1, 2)))


def attached(model):
    return jaxfa.nn.attach(model, jaxfa.dfa(), rngs=nnx.Rngs(1), at="upper", example=jnp.ones((2, 5, 5, 2)), allow="*")


@pytest.mark.parametrize("name", CALLS)
def test_every_derivative_is_that_of_jaxs_convolution(name, x64):
    shapes, options = CALLS[name]
    own = attached(Net()).model.lower.conv_general_dilated
    keys = jax.random.split(jax.random.key(0), 4)
    primals, tangents = (tuple(map(jax.random.normal, pair, shapes)) for pair in (keys[:2], keys[2:]))

    def derivatives(convolution):
        def energy(x, w):
            y = convolution(lhs=x, rhs=w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
            return jnp.sum(jnp.sin(y))

        both = jax.grad(energy, (0, 1))
        one = [jax.jvp(lambda x: energy(x, primals[1]), primals[:1], tangents[:1])]
        return both(*primals), jax.jvp(both, primals, tangents), one, jax.vmap(both)(*(one[None] for one in primals))

    jax.tree.map(
        lambda found, true: np.testing.assert_allclose(found, true, rtol=1e-12, atol=1e-12),
        derivatives(own),
        derivatives(lax.conv_general_dilated),
    )


def test_a_plain_model_has_its_operations_back_and_the_users_own_stay():
    def own(*args, **kwargs):
        return lax.conv_general_dilated(*args, **kwargs)

    model = attached(Net(own))
    assert model.model.lower.conv_general_dilated is not lax.conv_general_dilated
    assert model.model.upper.conv_general_dilated is own
    assert jaxfa.nn.plain(model).lower.conv_general_dilated is lax.conv_general_dilated


def test_a_program_for_a_cpu_reads_the_inputs_of_all_convolutions_from_memory():
    model, x = attached(Net()), jnp.ones((2, 5, 5, 2))
    graph, arrays = nnx.split(model)
    program = jax.jit(jax.grad(lambda arrays: nnx.merge(graph, arrays)(x).sum(), allow_int=True)).trace(arrays)
    assert program.lower(lowering_platforms=("cpu",)).as_text().count("optimization_barrier") == 2
