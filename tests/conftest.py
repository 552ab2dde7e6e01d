"""What every test runs under: eight CPU devices, no silent broadcasting, double precision where a test asks for it."""

import fnmatch
import os
import pathlib
import subprocess
import sys

import jax
import jaxlib
import pytest

from tests.quick import ROWS

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# Programs are tiny, so that most time goes to compiling them.
jax.config.update("jax_disable_most_optimizations", True)
# With it jaxlib 0.10 compiles them in 60 % of the time; 0.12 has no such option.
OPTION = "xla_cpu_use_fusion_emitters"


def pytest_configure(config):
    """What one process has compiled its neighbours need not compile, nor the next run on this machine."""
    if hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        if "XLA_FLAGS" not in os.environ and _is_known(config.cache):
            os.environ["XLA_FLAGS"] = f"--{OPTION}=false"


def _is_known(cache):
    """Whether this jaxlib has the option. As a flag that it does not know it would end the process, in silence."""
    name = f"jaxlib/{jaxlib.__version__}"
    if cache.get(name, None) is None:
        probe = f"import jax; jax.jit(lambda x: x).lower(1.0).compile({{{OPTION!r}: False}})"
        cache.set(name, subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0)
    return cache.get(name, None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what is not in the gate as long; a name or a row that no test has any more is an error."""
    unseen = {(name, row) for name, rows in ROWS.items() for row in ("", *rows)}
    for item in items:
        if item.originalname in ROWS:
            own = item.callspec.id if hasattr(item, "callspec") else ""
            found = [row for row in ROWS[item.originalname] if fnmatch.fnmatchcase(own, row)]
            unseen -= {(item.originalname, row) for row in ("", *found)}
            if not found:
                item.add_marker(pytest.mark.long)
    here = pathlib.Path(__file__).parent
    if unseen and {item.path for item in items} >= set(here.rglob("test_*.py")):
        raise pytest.UsageError(f"No test has the rows of tests/quick.py {sorted(unseen)}.")


@pytest.fixture
def x64():
    """Double precision: what is claimed to be exact is tested as exact."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_dropped():
    """Each holds some memory maps, of which Linux gives a process 65530: one process cannot keep all of the suite's."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 5000:  # some two gigabytes
        jax.clear_caches()
