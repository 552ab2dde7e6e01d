"""The order of what a compiled program computes is asked for in the words of the device that it is compiled for."""

import jax
import jax.numpy as jnp
import pytest

from jaxfa.order import after


def lowered(platform):
    program = jax.jit(lambda x, y: after({"x": x}, {"y": jnp.sin(y)})["x"] + 1)
    return program.trace(jnp.ones(3), jnp.ones(2)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_a_program_for_an_accelerator_has_a_barrier_wherever_it_is_compiled(platform):
    text = lowered(platform)
    assert "optimization_barrier" in text
    assert "compare" not in text  # nothing is computed to choose a branch by


def test_a_program_for_a_cpu_has_a_branch_that_xla_keeps():
    text = lowered("cpu")
    assert "optimization_barrier" not in text
    assert "compare" in text
