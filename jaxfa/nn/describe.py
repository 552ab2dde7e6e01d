"""What a table says in words."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfa.nn.contraction import Contraction
from jaxfa.nn.tap import Tap
from jaxfa.nn.variables import modules_of
from jaxfa.svd import is_factors

LOST = (
    "- {0!r} is contracted with an activation in a way that cannot be followed, as weights that data scales or chooses "
    "and sums written out are, so that an error may go on through it by backpropagation. Write it as one contraction, "
    "such as jnp.einsum, of the parameter with the activation, or allow={0!r}."
)
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def feedback_of(aligned: Any) -> dict[str, str]:
    """The feedback of each layer or tap, in words."""
    parts = [module for _, module in modules_of(aligned.model) if isinstance(module, Contraction | Tap)]
    found: dict[str, str] = {}
    for part in (*parts, *aligned.own):
        if part.feedback is not None:
            path = layer_name(part.path)
            found[path] = ", ".join(filter(None, [found.get(path), _describe(part.feedback.get_value())]))
    return found


def _describe(feedback: Any) -> str:
    leaves = jax.tree.leaves(feedback)
    shapes = "".join(f" {leaf.shape}" for leaf in leaves if leaf.shape)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    unit, scale = next(unit for unit in _UNITS if size >= unit[1] or unit[1] == 1)
    return f"{type(feedback).__name__}{shapes} {size / scale:.3g} {unit}"


def layer_name(name: str) -> str:
    """The layer that a parameter stands for: what holds a kernel, else the parameter itself."""
    return name.removesuffix("/kernel")


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a parameter, or of the weights that factors stand for."""
    return value.shape if is_factors(value) else jnp.shape(value)
