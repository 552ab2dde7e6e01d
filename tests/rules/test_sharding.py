"""Several devices: gradients of a sharded batch are those of the batch, with parameters and feedback replicated."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.nn import initializers
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfa
from tests.methods import METHODS, batch, create, loss, signals

# A zero feedback would hide every factor.
RULES = {method.name: method.rule for method in METHODS}
RULES |= {"dkp": jaxfa.dkp(distribution=initializers.glorot_normal())}
# What the loss is divided by must be told.
LOCAL = RULES | {"pepita": jaxfa.pepita(activation=jnp.tanh, examples=4)}
RULES |= {"pepita": jaxfa.pepita(activation=jnp.tanh, examples=8)}
# Whose signals are statistics of the batch; whose devices would share their draws; whose option another row has.
REFUSED = {"ldfa", "dldfa", "predsim", "forward_gradient", "pepita_mirrored"}


def every_rule(rules):
    accepted = {name: rule for name, rule in rules.items() if name not in REFUSED}
    return pytest.mark.parametrize("rule", accepted.values(), ids=accepted)


@pytest.fixture
def mesh():
    devices = jax.devices("cpu")[:2]
    assert len(devices) == 2
    return Mesh(np.array(devices), ("data",))


def sharded(gradient, mesh, **settings):
    specs = (P(), P(), P("data"), P("data"))
    return jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=P(), **settings))


def with_pmean_inside(params, feedback, x, y):
    return jax.grad(lambda *both: lax.pmean(loss(*both, x, y), "data"), argnums=(0, 1))(params, feedback)


def averaged_outside(params, feedback, x, y):
    return lax.pmean(jax.grad(loss, argnums=(0, 1))(params, feedback, x, y), "data")


@every_rule(RULES)
def test_shard_map_with_its_type_checks_sums_over_the_devices_by_itself(rule, mesh, x64):
    # The loss is the mean over all devices: what is replicated gets the sum of its cotangents, as in plain autodiff.
    both, data = create(rule, jax.random.PRNGKey(0)), batch()
    expected = signals(*both, *data)
    chex.assert_trees_all_close(sharded(with_pmean_inside, mesh)(*both, *data), expected, atol=1e-14, rtol=1e-12)


@every_rule(LOCAL)
def test_shard_map_without_type_checks_averages_local_gradients(rule, mesh, x64):
    name = next(name for name, one in LOCAL.items() if one is rule)
    both, data = create(rule, jax.random.PRNGKey(0)), batch()
    got = sharded(averaged_outside, mesh, check_vma=False)(*both, *data)
    expected = signals(*create(RULES[name], jax.random.PRNGKey(0)), *data)
    chex.assert_trees_all_close(jax.tree.leaves(got), jax.tree.leaves(expected), atol=1e-14, rtol=1e-12)


def test_the_gradient_of_a_sharded_loss_is_the_single_devices(mesh, x64):
    both, data = create(RULES["drtp"], jax.random.PRNGKey(0)), batch()
    whole = sharded(lambda *inputs: lax.pmean(loss(*inputs), "data"), mesh)
    got = jax.jit(jax.grad(whole, argnums=(0, 1)))(*both, *data)
    chex.assert_trees_all_close(got, signals(*both, *data), atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("name", ["ldfa", "dldfa", "pepita", "forward_gradient", "predsim"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_what_a_device_can_not_know_is_refused_unless_it_is_alone(name, check_vma, mesh, x64):
    rule = next(method.rule for method in METHODS if method.name == name)
    both, data = create(rule, jax.random.PRNGKey(0)), batch()
    with pytest.raises(ValueError, match=r"Inside shard_map over \['data'\]: .* under jit instead"):
        jax.eval_shape(sharded(with_pmean_inside, mesh, check_vma=check_vma), *both, *data)
    alone = sharded(with_pmean_inside, Mesh(mesh.devices[:1], ("data",)), check_vma=check_vma)
    jax.eval_shape(alone, *both, *data)


def test_a_device_does_not_learn_a_jacobian_of_its_own(mesh):
    rule, h, e = jaxfa.grape(), jnp.ones((8, 4)), jnp.ones((8, 3))
    feedback = [rule.init(jax.random.PRNGKey(0), h, e)]

    def refined(h, key):
        return rule.refine(lambda taps: (h + taps[0]) @ jnp.ones((4, 3)), feedback, key)

    specs = {"mesh": mesh, "in_specs": (P("data"), P()), "out_specs": P(), "check_vma": False}
    with pytest.raises(ValueError, match=r"Inside shard_map .* Call refine outside"):
        jax.eval_shape(jax.shard_map(refined, **specs), h, jax.random.PRNGKey(1))


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


def test_a_step_of_split_and_of_whole_weights_is_that_of_one_device(mesh):
    rule, weights = jaxfa.kolen_pollack(), {"split": jnp.ones((8, 4)), "whole": jnp.ones((4, 6))}
    keys = jax.random.split(jax.random.key(0))
    both = weights, {name: rule.init(key, weights[name]) for key, name in zip(keys, weights, strict=True)}
    tx = jaxfa.optimizer(optax.adam(1e-2), rule)

    def step(gradient, state, both):
        updates, state = tx.update(gradient, state, both)
        return optax.apply_updates(both, updates), state

    def specs(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: P("data") if "split" in str(path) else P(), tree)

    args = jax.tree.map(jnp.sin, both), tx.init(both), both
    ins, outs = tuple(map(specs, args)), (specs(both), specs(args[1]))
    got = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=ins, out_specs=outs))(*args)
    chex.assert_trees_all_close(got, jax.jit(step)(*args), rtol=1e-6)
