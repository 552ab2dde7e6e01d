"""What a model's convolutions without feedback learn from: their inputs where the forward pass has left them."""

from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxfa.nn.model.variables import modules_of
from jaxfa.order import from_memory


def read_from_memory(model: nnx.Module) -> None:
    """Gives every layer whose operation is JAX's convolution one that learns from an input in memory.

    A layer with a mask is left alone, since rules look for its contraction in the traced program.
    """
    for _, module in modules_of(model):
        is_plain = isinstance(module, nnx.Conv) and module.mask is None
        if is_plain and module.conv_general_dilated is lax.conv_general_dilated:
            module.conv_general_dilated = _convolution


def restore_convolution(module: Any) -> None:
    """Undoes :func:`read_from_memory`."""
    if getattr(module, "conv_general_dilated", None) is _convolution:
        module.conv_general_dilated = lax.conv_general_dilated


def _convolution(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, w, *args, **kwargs)

    def differentiate(primals: Any, tangents: Any) -> Any:
        (x, w), (dx, dw) = primals, tangents
        parts = [] if isinstance(dx, SymbolicZero) else [run(dx, w)]
        parts += [] if isinstance(dw, SymbolicZero) else [run(from_memory(x), dw)]
        return run(x, w), sum(parts[1:], parts[0])

    convolution = jax.custom_jvp(run)
    convolution.defjvp(differentiate, symbolic_zeros=True)
    return convolution(lhs, rhs)
