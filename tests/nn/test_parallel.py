"""An attached model under ``shard_map``: two devices with half the batch each do what one does with all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxfa
import jaxfa.nn
from tests.networks import MLP


@pytest.mark.parametrize("rule", [jaxfa.kolen_pollack(), jaxfa.brsf(), jaxfa.dfa(), jaxfa.dkp()])
@pytest.mark.parametrize("check_vma", [True, False])
def test_data_parallel_gradients_and_signals_are_the_single_device_ones(rule, check_vma):
    x, e = jax.random.normal(jax.random.key(0), (8, 6)), jax.random.normal(jax.random.key(1), (8, 3))
    aligned = jaxfa.nn.attach(MLP(nnx.Rngs(0)), rule, rngs=nnx.Rngs(1), example=x)
    graphdef, params, feedback = nnx.split(aligned, nnx.Param, jaxfa.nn.Feedback)

    def signals(params, feedback, x, e):
        def objective(params, feedback):
            return jnp.sum(nnx.merge(graphdef, params, feedback)(x) * e)

        return jax.grad(objective, (0, 1))(params, feedback)

    def sharded(params, feedback, x, e):
        found = signals(params, feedback, x, e)
        # With check_vma JAX sums the cotangents of replicated inputs itself.
        return found if check_vma else jax.lax.psum(found, "data")

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P(), P(), P("data"), P("data"))
    parallel = jax.shard_map(sharded, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    ours, single = jax.jit(parallel)(params, feedback, x, e), jax.jit(signals)(params, feedback, x, e)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, single)
