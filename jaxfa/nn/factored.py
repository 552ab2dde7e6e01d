"""Factored layers: ``nnx.Linear`` and ``nnx.Conv`` with weights kept as ``u diag(s) v^T``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfa.base import Operation
from jaxfa.layers import Convolution, dot
from jaxfa.nn.variables import modules_of
from jaxfa.svd import Factors


class Factored(nnx.Module):
    """A dense layer or convolution whose ``kernel`` is :class:`jaxfa.Factors`; the dense weights are never formed.

    Attributes:
      kernel: the factors.
      bias: as the layer's own.
      operation: ``(x, factors) -> y``.
    """

    def __init__(self, layer: nnx.Linear | nnx.Conv, factors: Factors) -> None:
        self.kernel = nnx.Param(factors)
        self.bias = nnx.data(layer.bias)
        self.operation = nnx.static(operation_of(layer))
        self.shape = factors.shape
        self.dtype = layer.dtype
        self.own = nnx.static(nnx.split(layer)[0])

    def __call__(self, x: jax.Array) -> jax.Array:
        """As the layer that it replaces."""
        w = self.kernel.get_value()
        dtype = self.dtype or jnp.result_type(x, w.dtype)
        x, w = x.astype(dtype), w.astype(dtype)
        spatial = len(self.shape) - 1
        batch = x.shape[: x.ndim - spatial]
        is_conv = spatial > 1 and len(batch) != 1
        y = self.operation(x.reshape(-1, *x.shape[x.ndim - spatial :]) if is_conv else x, w)
        y = y.reshape(*batch, *y.shape[1:]) if is_conv else y
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(dtype), y.shape)


def operation_of(layer: nnx.Linear | nnx.Conv) -> Operation:
    """A layer's operation as a value.

    Raises:
      ValueError: if the layer has an operation, a padding, groups, a mask or a precision that two thin layers have not.
    """
    operation: Any = None
    if isinstance(layer, nnx.Conv):
        operation = _convolution(layer)
    elif layer.dot_general is jax.lax.dot_general and layer.precision is None:
        operation = dot
    if operation is None or layer.kernel.get_value().ndim != (2 if operation is dot else len(layer.kernel_size) + 2):
        raise ValueError(
            f"No factors can take the place of {layer!r}: only nnx.Linear and nnx.Conv with JAX's own operation, SAME, "
            f"VALID or explicit zero padding, and without groups, mask, input dilation, precision or a stack of layers "
            f"(nnx.vmap). Name the others with at=."
        )
    return operation


def _convolution(layer: nnx.Conv) -> Convolution | None:
    dims = len(layer.kernel_size)

    def each(value: Any) -> tuple[int, ...]:
        return (1 if value is None else value,) * dims if value is None or isinstance(value, int) else tuple(value)

    padding = layer.padding
    if not isinstance(padding, str):
        pairs = (padding,) * dims if isinstance(padding, int) else tuple(padding)
        padding = tuple((pair, pair) if isinstance(pair, int) else tuple(pair) for pair in pairs)
    is_plain = (
        layer.conv_general_dilated is jax.lax.conv_general_dilated
        and padding not in ("CIRCULAR", "REFLECT", "CAUSAL")
        and set(each(layer.input_dilation)) == {1}
        and (layer.feature_group_count, layer.mask, layer.precision) == (1, None, None)
    )
    return Convolution(each(layer.strides), padding, each(layer.kernel_dilation)) if is_plain else None


def factorise_chosen(model: Any, weights: Callable[[Any, str], Factors], is_chosen: Callable[[str], bool]) -> Any:
    """Replaces the chosen ones of a model's dense layers and convolutions by factored ones, in place; returns the root.

    Raises:
      ValueError: if one has no factors, or none is chosen.
    """
    layers = {path: module for path, module in modules_of(model) if isinstance(module, nnx.Linear | nnx.Conv)}
    chosen = {path: layer for path, layer in layers.items() if is_chosen(path)}
    if not chosen and not any(isinstance(module, Factored) for _, module in modules_of(model)):
        raise ValueError(f"There is no layer to factor; the layers here are {sorted(layers)}.")
    for layer in chosen.values():
        operation_of(layer)  # refuses before anything is decomposed
    made = {id(one): Factored(one, weights(one.kernel.get_value(), path)) for path, one in chosen.items()}
    return swap(model, made)


def swap(model: Any, made: dict[int, Any]) -> Any:
    """Puts modules in the places of others, wherever these are referred to; returns the root."""
    for _, module in list(modules_of(model)):
        for name, value in list(vars(module).items()):
            if id(value) in made:
                setattr(module, name, made[id(value)])
    return made.get(id(model), model)
