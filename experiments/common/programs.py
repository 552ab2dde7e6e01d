"""Compiled programs, kept by JAX from one run to the next: much of a short run is compiling."""

import os
from pathlib import Path

import jax


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told of another, or to keep none."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "jaxfa"))
