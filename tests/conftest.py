"""What every test runs under: eight CPU devices, no silent broadcasting, double precision where a test asks for it."""

import os

# Programs are tiny, so that most time goes to compiling them: the older emitters of fusions do so in half the time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # for the same reason


@pytest.fixture
def x64():
    """Double precision: what is claimed to be exact is tested as exact."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_dropped():
    """Each holds some memory maps, of which Linux gives a process 65530: one process cannot keep all of the suite's."""
    yield
    jax.clear_caches()
