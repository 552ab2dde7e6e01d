"""What every test runs under: eight CPU devices, no silent broadcasting, double precision where a test asks for it."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # no XLA flag: a jaxlib that does not know one ends the process, in silence
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# Programs are tiny, so that most time goes to compiling them.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config):
    """What one process has compiled its neighbours need not compile, nor the next run on this machine."""
    if hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


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
