"""Compiled programs: how a step is compiled, and what is kept of it, from run to run and from step to step."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# By malloc.h: M_ARENA_MAX, since other threads' arenas map what is large whatever they are told; M_MMAP_MAX, how much
# is mapped at all; M_TRIM_THRESHOLD, from where on what is free at the end is given back.
_KEPT = {-8: 1, -4: 0, -1: -1}


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told of another, or to keep none."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "jaxfa"))


def keep_memory() -> None:
    """Lets this process keep the memory that it frees, where the C library is GNU's; before JAX's threads begin.

    XLA allocates what a step needs at every call, and GNU's library asks the system for what is large and gives it back
    at once. The system clears every page that it hands out, which on a CPU can take a good part of a step.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option:
        for option, value in _KEPT.items():
            set_option(option, value)


def jit_step(step: Callable[..., Any], **options: Any) -> Any:
    """``jax.jit`` of a training step, which gives up its first argument. On a CPU, XLA leaves reshapes where they are.

    Else it moves those of batch normalisation before it looks for what is computed twice, and so runs the forward pass
    that ``refine`` and the gradient have in common once for each.
    """
    stay = {"xla_disable_hlo_passes": "reshape-mover"} if jax.default_backend() == "cpu" else {}
    return jax.jit(step, donate_argnums=0, compiler_options=stay, **options)
