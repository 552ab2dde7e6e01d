"""Factored layers: ``nnx.Linear`` and ``nnx.Conv`` with weights kept as ``u diag(s) v^T``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

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
        y = self.operation(x.astype(dtype), w.astype(dtype))
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(dtype), y.shape)


def operation_of(layer: nnx.Linear | nnx.Conv) -> Operation:
    """A layer's operation as a value.

    Raises:
      ValueError: if the layer has a forward pass, an operation, a padding, groups, a mask or a precision of its own,
        which two thin layers have not.
    """
    operation: Any = None
    own = type(layer).__call__ not in (nnx.Linear.__call__, nnx.Conv.__call__)
    if own or layer.promote_dtype is not promote_dtype or layer.preferred_element_type is not None:
        pass
    elif isinstance(layer, nnx.Conv):
        operation = _convolution(layer)
    elif layer.dot_general is jax.lax.dot_general and layer.precision is None:
        operation = dot
    if operation is None or layer.kernel.get_value().ndim != (2 if operation is dot else len(layer.kernel_size) + 2):
        raise ValueError(
            f"No factors can take the place of {layer!r}: only nnx.Linear and nnx.Conv with their own __call__ (no "
            f"subclass's, such as LoRALinear's), JAX's own operation, SAME, VALID or explicit zero padding, and "
            f"without groups, mask, input dilation, precision, promote_dtype, preferred_element_type or a stack of "
            f"layers (nnx.vmap). Name the others with at=."
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
      ValueError: if one has no factors, or none is chosen, or one is where no module can be put in its place.
    """
    kinds = nnx.Linear | nnx.Conv | Factored
    layers = {path: module for path, module in modules_of(model) if isinstance(module, kinds)}
    chosen = {path: layer for path, layer in layers.items() if is_chosen(path)}
    if not chosen:
        raise ValueError(f"There is no layer to factor; the layers here are {sorted(layers)}.")
    dense = {path: layer for path, layer in chosen.items() if not isinstance(layer, Factored)}
    for layer in dense.values():
        operation_of(layer)  # refuses before anything is decomposed
    made = {path: weights(layer.kernel.get_value(), path) for path, layer in chosen.items()}
    return swap(model, {id(layer): Factored(layer, made[path]) for path, layer in dense.items()})


def swap(model: Any, made: dict[int, Any]) -> Any:
    """Puts modules in the places of others, wherever these are referred to; returns the root.

    Raises:
      ValueError: if one is no module's attribute, but inside a tuple.
    """
    places = [(module, *item) for _, module in modules_of(model) for item in vars(module).items()]
    for module, name, value in places:
        if id(value) in made:
            setattr(module, name, made[id(value)])
    lost = made.keys() - {id(value) for _, _, value in places} - {id(model)}
    if lost:
        paths = [path for path, module in modules_of(model) if id(module) in lost]
        raise ValueError(f"Nothing can take the place of {paths}: hold them in nnx.List or nnx.Dict, not in a tuple.")
    return made.get(id(model), model)
