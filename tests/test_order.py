"""The order of what a compiled program computes is asked for in the words of the device that it is compiled for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfa.order import after, from_memory
from jaxfa.varying import varying_axes


def lowered(platform):
    program = jax.jit(lambda x, y: after({"x": x}, {"y": jnp.sin(y)})["x"] + 1)
    return program.trace(jnp.ones(3), jnp.ones(2)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_a_program_for_an_accelerator_has_a_barrier_wherever_it_is_compiled(platform):
    text = lowered(platform)
    assert "optimization_barrier" in text
    assert "compare" not in text  # nothing is computed to choose a branch by


def test_in_a_shard_map_nothing_varies_over_more_devices_than_before():
    # Joined in one barrier, what is the same everywhere would be taken to vary as the rest does.
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

    def function(x, y):
        found = after({"x": x, "y": y}, {"z": jnp.sin(y)})
        return {name: varying_axes(jax.typeof(one)) for name, one in found.items()}, found

    kinds = []

    def mapped(x, y):
        kind, found = function(x, y)
        kinds.append(kind)
        return found

    specs = {"x": jax.P(), "y": jax.P("a")}
    program = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=(jax.P(), jax.P("a")), out_specs=specs))
    text = program.trace(jnp.ones(3), jnp.ones(2)).lower(lowering_platforms=("cuda",)).as_text()
    assert kinds[0] == {"x": frozenset(), "y": frozenset("a")}
    assert text.count("optimization_barrier") == 2


def test_a_program_for_a_cpu_has_a_branch_that_xla_keeps():
    text = lowered("cpu")
    assert "optimization_barrier" not in text
    assert "compare" in text


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", 1), ("cuda", 0)])
def test_a_program_for_a_cpu_reads_an_activation_behind_a_barrier(platform, barriers):
    program = jax.jit(lambda x: from_memory(jnp.sin(x)) + 1).trace(jnp.ones(3)).lower(lowering_platforms=(platform,))
    assert program.as_text().count("optimization_barrier") == barriers


def test_what_is_read_from_memory_is_the_same_in_value_and_derivatives():
    x = jnp.arange(6.0).reshape(2, 3)
    found = jax.jvp(jax.vmap(jax.grad(lambda x: jnp.sum(from_memory(x) ** 3))), (x,), (x,))
    np.testing.assert_array_equal(found[0], 3 * x**2)
    np.testing.assert_array_equal(found[1], 6 * x**2)
