"""Compiled programs: how a step is compiled, and that JAX keeps them, since much of a short run is compiling."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told of another, or to keep none."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "jaxfa"))


def jit_step(step: Callable[..., Any], **options: Any) -> Any:
    """``jax.jit`` of a training step, which gives up its first argument. On a CPU, XLA leaves reshapes where they are.

    Else it moves those of batch normalisation before it looks for what is computed twice, and so runs the forward pass
    that ``refine`` and the gradient have in common once for each.
    """
    stay = {"xla_disable_hlo_passes": "reshape-mover"} if jax.default_backend() == "cpu" else {}
    return jax.jit(step, donate_argnums=0, compiler_options=stay, **options)
