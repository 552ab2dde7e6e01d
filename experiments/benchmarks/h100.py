"""An H100 as a target for JAX's compiler, on a machine that has none.

The plugin that compiles is JAX's own: ``pip install '.[cuda]'``. What a program does can then be read, not timed.
"""

from typing import Any

from jax.experimental import topologies

# NVIDIA's figures of the SXM board with 80 GB, in the words of XLA's target configuration.
_TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
}
"""
# Without a device no kernel can be timed against another.
OPTIONS = {"xla_gpu_autotune_level": 0}


def device() -> Any:
    """The target, as a device that programs can be compiled for.

    Raises:
      ValueError: if JAX's plugin is not there.
    """
    try:
        return topologies.get_topology_desc(platform="cuda", target_config=_TARGET, topology="1x1x1").devices[0]
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"JAX has nothing that compiles for a GPU ({error}). Install its plugin, pip install '.[cuda]', and on a "
            f"machine without a GPU set JAX_PLATFORMS=cpu, without which the plugin looks for one."
        ) from None
