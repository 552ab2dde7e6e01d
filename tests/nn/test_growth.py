"""How the work of ``attach`` grows: as the network does, since nothing in it sets each layer against each."""

import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxfa.nn
from tests.methods import METHODS

SMALL = 5


class Tower(nnx.Module):
    """So many layers of one shape, and a head."""

    def __init__(self, depth):
        self.layers = nnx.List([nnx.Linear(SMALL, SMALL, rngs=nnx.Rngs(i)) for i in range(depth)])
        self.head = nnx.Linear(SMALL, 3, rngs=nnx.Rngs(depth))

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return self.head(x)


def calls_of(function):
    """How many Python functions run in it, which, unlike its time, is the same on every machine."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_network_twice_as_deep_takes_attach_twice_the_work(method):
    def work(depth):
        model, x = Tower(depth), jnp.ones((4, SMALL))
        jax.clear_caches()  # a full one forgets what the shallow network has done, and the deep one does it again
        return calls_of(lambda: jaxfa.nn.attach(model, method.rule, rngs=nnx.Rngs(0), example=x))

    assert work(80) < 2.2 * work(40)
