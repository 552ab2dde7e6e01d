"""Several devices: gradients of a sharded batch are those of the batch, with parameters and feedback replicated."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.nn import initializers
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfa
from tests.methods import batch, create, loss, signals

RULES = {
    "backprop": jaxfa.backprop(),
    "fa": jaxfa.fa(),
    "brsf": jaxfa.brsf(),
    "kolen_pollack": jaxfa.kolen_pollack(),
    "dfa": jaxfa.dfa(),
    "dfa_shared": jaxfa.dfa(shared=True),
    "ssa": jaxfa.ssa(),
    "ssa_sequential": jaxfa.ssa(parallel=False),
    "dkp": jaxfa.dkp(distribution=initializers.glorot_normal()),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.fixture
def mesh():
    devices = jax.devices("cpu")[:2]
    assert len(devices) == 2
    return Mesh(np.array(devices), ("data",))


def sharded(gradient, mesh, **settings):
    specs = (P(), P(), P("data"), P("data"))
    return jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=P(), **settings))


@every_rule
def test_shard_map_with_its_type_checks_sums_over_the_devices_by_itself(rule, mesh, x64):
    # The loss is the mean over all devices: what is replicated gets the sum of its cotangents, as in plain autodiff.
    def gradient(params, feedback, x, y):
        return jax.grad(lambda *both: lax.pmean(loss(*both, x, y), "data"), argnums=(0, 1))(params, feedback)

    both, data = create(rule, jax.random.PRNGKey(0)), batch()
    expected = signals(*both, *data)
    chex.assert_trees_all_close(sharded(gradient, mesh)(*both, *data), expected, atol=1e-14, rtol=1e-12)


@every_rule
def test_shard_map_without_type_checks_averages_local_gradients(rule, mesh, x64):
    def gradient(params, feedback, x, y):
        local = jax.grad(loss, argnums=(0, 1))(params, feedback, x, y)
        return jax.tree.map(lambda leaf: lax.pmean(leaf, "data"), local)

    both, data = create(rule, jax.random.PRNGKey(0)), batch()
    got = sharded(gradient, mesh, check_vma=False)(*both, *data)
    chex.assert_trees_all_close(got, signals(*both, *data), atol=1e-14, rtol=1e-12)


def test_shards_hold_different_data(mesh, x64):
    # The control: one device's gradient is not the batch's, so that a missing sum would show above.
    both, (x, y) = create(jaxfa.dfa(), jax.random.PRNGKey(0)), batch()
    whole, half = signals(*both, x, y)[0], signals(*both, x[:4], y[:4])[0]
    assert jnp.linalg.norm(whole[0]["w"] - half[0]["w"]) > 0.1 * jnp.linalg.norm(whole[0]["w"])


@pytest.mark.parametrize("rule", [jaxfa.kolen_pollack(), jaxfa.dfa(), jaxfa.ldfa(3)], ids=["kp", "dfa", "ldfa"])
def test_the_compiler_shards_a_jitted_gradient(rule, mesh, x64):
    # Oja's covariance, too, is that of the whole batch.
    both, data = create(rule, jax.random.PRNGKey(0)), batch()
    expected = signals(*both, *data)
    split = jax.device_put(data, NamedSharding(mesh, P("data")))
    got = signals(*jax.device_put(both, NamedSharding(mesh, P())), *split)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got))
    assert not split[0].sharding.is_fully_replicated
    chex.assert_trees_all_close(got, expected, atol=1e-14, rtol=1e-12)


def test_a_convolution_shards_too(mesh, x64):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(4, 5, 5, 2))), jnp.asarray(rng.normal(size=(3, 3, 2, 3)))
    feedback = jaxfa.kolen_pollack().init(jax.random.PRNGKey(0), w)

    def objective(w, feedback, x):
        return jnp.mean(jnp.sin(jaxfa.conv(jnp.cos(x), w, feedback)))

    def gradient(w, feedback, x, _):
        return jax.grad(lambda *both: lax.pmean(objective(*both, x), "data"), argnums=(0, 1))(w, feedback)

    expected = jax.grad(objective, argnums=(0, 1))(w, feedback, x)
    chex.assert_trees_all_close(sharded(gradient, mesh)(w, feedback, x, x), expected, atol=1e-14, rtol=1e-12)
