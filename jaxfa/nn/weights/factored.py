"""Factored layers: Flax's dense ones and convolutions with weights kept as ``u diag(s) v^T``."""

import dataclasses
import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jaxfa.base import Operation
from jaxfa.factored.svd import Factors
from jaxfa.layers import Convolution, dot
from jaxfa.nn.model.variables import modules_of
from jaxfa.nn.weights.views import Bound, Call, Matrices, bias_shape, of_einsum
from jaxfa.ops import INNER


@dataclasses.dataclass(frozen=True)
class Product:
    """The operation of ``nnx.LinearGeneral`` and ``nnx.Einsum`` on a matrix or its factors; its outputs are one axis.

    Attributes:
      view: how their kernel is seen as a matrix.
    """

    view: Matrices

    def bound(self, x: jax.Array) -> Bound:
        """The einsum in a rule's terms."""
        return self.view.bind(Call(jnp.einsum, (self.view.subscripts,)), x)

    def __call__(self, x: jax.Array, w: Any) -> jax.Array:
        """``(..., m)``."""
        if not isinstance(w, Factors):
            return self.bound(x).op(x, w)
        first, second = w.kernels()
        h = self.bound(x).op(x, first)
        with jax.named_scope(INNER):
            return dot(h, second)


class Factored(nnx.Module):
    """A layer whose ``kernel`` is :class:`jaxfa.factored.Factors`; the dense weights are never formed.

    Attributes:
      kernel: the factors.
      bias: as the layer's own.
      operation: ``(x, factors) -> y``.
      product: what the operation is made of, if its outputs are on several axes.
    """

    def __init__(self, layer: Any, factors: Factors, path: str = "") -> None:
        operation = operation_of(layer, path)
        self.kernel = nnx.Param(factors)
        self.bias = nnx.data(layer.bias)
        self.operation = nnx.static(operation)
        self.product = nnx.static(operation if isinstance(operation, Product) else None)
        self.shape = factors.shape
        self.dtype = layer.dtype
        self.own = nnx.static(nnx.split(layer)[0])

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """As the layer that it replaces."""
        w = self.kernel.get_value()
        dtype = self.dtype or jnp.result_type(inputs, w.dtype)
        x = inputs.astype(dtype)
        y = self.operation(x, w.astype(dtype))
        bias = None if self.bias is None else self.bias[...].astype(dtype)
        if self.product is not None:
            y = self.product.bound(x).join(y)
            bias = None if bias is None else bias.reshape(bias_shape(self.product.view, y.ndim))
        y = y if bias is None else y + jnp.broadcast_to(bias, y.shape)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


_OWN_CALLS = tuple(kind.__call__ for kind in (nnx.Linear, nnx.Conv, nnx.LinearGeneral, nnx.Einsum))


def operation_of(layer: Any, path: str = "") -> Operation:
    """A layer's operation as a value.

    Raises:
      ValueError: if the layer has a forward pass, an operation, a padding, groups, batch axes, a mask or a precision of
        its own, which two thin layers have not.
    """
    operation: Any = None
    numbers = (layer.promote_dtype, layer.preferred_element_type, layer.precision)
    if type(layer).__call__ not in _OWN_CALLS or numbers != (promote_dtype, None, None):
        pass
    elif isinstance(layer, nnx.Conv):
        operation = _convolution(layer)
    elif isinstance(layer, nnx.LinearGeneral | nnx.Einsum):
        operation = _product(layer)
    elif layer.dot_general is jax.lax.dot_general:
        operation = dot
    ndim = 2 if operation is dot else len(layer.kernel_size) + 2 if isinstance(layer, nnx.Conv) else None
    if operation is None or ndim not in (None, layer.kernel.get_value().ndim):
        raise ValueError(
            f"No factors can take the place of {path!r}, a layer {type(layer).__name__}: only nnx.Linear, "
            f"LinearGeneral, Einsum and Conv with their own __call__ (no subclass's, such as LoRALinear's), JAX's own "
            f"operation, SAME, VALID or explicit zero padding, and without groups, batch axes, mask, input dilation, "
            f"precision, promote_dtype, preferred_element_type or a stack of layers (nnx.vmap). Name the others with "
            f"at=."
        )
    return operation


def _product(layer: Any) -> Product | None:
    shape = layer.kernel.get_value().shape
    if isinstance(layer, nnx.Einsum):
        own, made, subscripts = layer.einsum_op is jnp.einsum, tuple(layer.kernel_shape), layer.einsum_str
    else:
        ins, outs = len(layer.in_features), len(layer.out_features)
        trailing = layer.axis == tuple(range(-ins, 0)) and not layer.batch_axis
        own = layer.dot_general in (None, jax.lax.dot_general) and layer.dot_general_cls is None and trailing
        made, letters = (*layer.in_features, *layer.out_features), string.ascii_lowercase[: ins + outs]
        subscripts = f"...{letters[:ins]},{letters}->...{letters[ins:]}"
    view = of_einsum(subscripts, made) if own and subscripts and shape == made else None
    return Product(view) if isinstance(view, Matrices) and view.batch == 0 else None


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
    kinds = nnx.Linear | nnx.Conv | nnx.LinearGeneral | nnx.Einsum | Factored
    layers = {path: module for path, module in modules_of(model) if isinstance(module, kinds)}
    chosen = {path: layer for path, layer in layers.items() if is_chosen(path)}
    if not chosen:
        raise ValueError(f"There is no layer to factor; the layers here are {sorted(layers)}.")
    dense = {path: layer for path, layer in chosen.items() if not isinstance(layer, Factored)}
    _refuse_normed(model, list(dense))
    for path, layer in dense.items():
        operation_of(layer, path)  # refuses before anything is decomposed
    made = {path: weights(_matrix(layer), path) for path, layer in chosen.items()}
    return swap(model, {id(layer): Factored(layer, made[path], path) for path, layer in dense.items()})


def _matrix(layer: Any) -> Any:
    kernel, operation = layer.kernel.get_value(), None if isinstance(layer, Factored) else operation_of(layer)
    return operation.view.matrices(kernel) if isinstance(operation, Product) else kernel


def _refuse_normed(model: Any, paths: list[str]) -> None:
    for path, module in modules_of(model):
        if isinstance(module, nnx.SpectralNorm | nnx.WeightNorm):
            inside = [one for one in paths if one.startswith(f"{path}/" if path else "")]
            if inside:
                raise ValueError(
                    f"No factors can take the place of {inside}: {path!r}, an nnx.{type(module).__name__}, norms their "
                    f"weights, which factors are not. Name the other layers with at=."
                )


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
