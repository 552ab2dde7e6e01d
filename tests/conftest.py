"""What every test runs under: eight CPU devices, no silent broadcasting, double precision where a test asks for it."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # tiny programs: compiling them is where the time goes


@pytest.fixture
def x64():
    """Double precision: what is claimed to be exact is tested as exact."""
    with jax.enable_x64(True):
        yield
