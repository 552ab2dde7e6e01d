"""A model's weights as factors, and back: to factored layers, to dense ones, to pairs of thin ones."""

import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfa.base import transpose
from jaxfa.factored.pruning import prune as prune_tree
from jaxfa.factored.svd import Factors
from jaxfa.factored.svd import factorise as factorise_weights
from jaxfa.nn.attached import Attached, plain
from jaxfa.nn.model.variables import Feedback, modules_of
from jaxfa.nn.weights.factored import Factored, factorise_chosen, swap
from jaxfa.nn.weights.views import Matrices
from jaxfa.paths import matches


def factorise(model: nnx.Module, rank: float | None = None, *, at: str | tuple[str, ...] = ()) -> Any:
    """Replaces dense layers and convolutions by factored ones, ``w = u diag(s) v^T``; any rule can be attached then.

    With ``jaxfa.backprop()`` the result is SVD training by backpropagation. ``jaxfa.ssa`` does this by itself.

    Args:
      model: any NNX model; it stays as it is.
      rank: every layer's, as for ``jaxfa.factored.factorise``; None is full rank, at which the function is the same.
      at: globs of module paths in which layers are factored; by default all. Without a rank, those that are factored
        already stay as they are.

    Returns:
      A model of the user's own class.

    Raises:
      ValueError: if a layer has no factors, such as a convolution in groups, or is factored already and there is a
        rank for it, or there is no layer.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> model = jaxfa.nn.factorise(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rank=2)
      >>> model(jnp.ones((5, 4))).shape, model.kernel.get_value().u.shape
      ((5, 3), (4, 2))

    Source: Yang et al., "Learning Low-rank Deep Neural Networks via Singular Vector Orthogonality Regularization and
    Singular Value Sparsification", 2020, https://arxiv.org/abs/2004.09031
    """
    globs = (at,) if isinstance(at, str) else at

    def weights(w: jax.Array | Factors, path: str) -> Factors:
        return factorise_weights(w, rank, name=path)

    return factorise_chosen(nnx.clone(model), weights, lambda path: not globs or matches(path, globs, under=True))


def to_dense(model: Any) -> Any:
    """The dense model: every factored layer becomes the one that it replaced, with the product as its weights.

    Args:
      model: what :func:`jaxfa.nn.attach` returned for ``jaxfa.ssa(...)``, or its plain twin; it stays as it is.

    Returns:
      A model of the user's own class and layers.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
      >>> attached = jaxfa.nn.attach(model, jaxfa.ssa(), rngs=nnx.Rngs(1), example=x)
      >>> bool(jnp.allclose(jaxfa.nn.to_dense(attached).kernel[...], model.kernel[...], atol=1e-6))
      True
    """
    return _converted(model, _dense)


def to_thin(model: Any) -> Any:
    """A plain model for inference: every factored layer becomes two thin ones, ``u sqrt(s)`` and ``sqrt(s) v^T``.

    Args:
      model: as for :func:`to_dense`; it stays as it is.

    Returns:
      A model of the user's own class in which each factored layer is an ``nnx.Sequential`` of two of its own kind.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> attached = jaxfa.nn.attach(model, jaxfa.ssa(rank=2), rngs=nnx.Rngs(1), example=jnp.ones((2, 4)))
      >>> [layer.kernel.shape for layer in jaxfa.nn.to_thin(attached).layers]
      [(4, 2), (2, 3)]

    Source: Yang et al., "Learning Low-rank Deep Neural Networks via Singular Vector Orthogonality Regularization and
    Singular Value Sparsification", 2020, https://arxiv.org/abs/2004.09031
    """
    return _converted(model, _thin)


def _converted(model: Any, convert: Callable[[Factored], Any]) -> Any:
    model = nnx.clone(plain(model) if isinstance(model, Attached) else model)
    made = {id(layer): convert(layer) for _, layer in modules_of(model) if isinstance(layer, Factored)}
    if not made:
        raise ValueError("This model has no factored layers: attach jaxfa.ssa(...) first.")
    return swap(model, made)


def _dense(layer: Factored) -> Any:
    kernel = layer.kernel.get_value().dense()
    if layer.product is not None:
        view = layer.product.view
        # The view only moves entries, so that its transpose is its inverse.
        sizes = [size for _, size in sorted(zip(view.permutation, view.permuted, strict=True))]
        kernel = transpose(view.matrices, jnp.zeros(sizes, kernel.dtype), kernel)
    state = {"kernel": nnx.Param(kernel)}
    state |= {} if layer.bias is None else {"bias": nnx.Param(layer.bias.get_value())}
    return nnx.merge(layer.own, nnx.State(state), copy=True)


def _thin(layer: Factored) -> nnx.Sequential:
    w, dense = layer.kernel.get_value(), _dense(layer)
    root = jnp.sqrt(jnp.abs(w.s))
    first, _ = Factors(w.u, root, w.v, w.shape).kernels()
    _, second = Factors(w.u, w.s, w.v * jnp.expand_dims(root * jnp.sign(w.s), 0), w.shape).kernels()
    if layer.product is not None:
        return nnx.Sequential(*_einsums(layer.product.view, first, second, dense))
    bias = dense.bias
    dense.bias, dense.use_bias = nnx.data(None), False
    pair = []
    for i, kernel in enumerate((first, second)):
        one = nnx.clone(dense)
        one.kernel = nnx.Param(kernel)
        one.in_features, one.out_features = kernel.shape[-2:]
        if isinstance(one, nnx.Conv):
            op = layer.operation.along(slice(0, 1) if i == 0 else slice(1, None))
            one.kernel_shape, one.kernel_size = kernel.shape, kernel.shape[:-2]
            one.strides, one.padding, one.kernel_dilation = op.strides, op.padding, op.dilation
        pair.append(one)
    pair[1].bias, pair[1].use_bias = bias if bias is None else nnx.data(bias), bias is not None
    return nnx.Sequential(*pair)


def _einsums(view: Matrices, first: jax.Array, second: jax.Array, dense: Any) -> list[nnx.Einsum]:
    """Two einsums for one: from its inputs to the rank, and from the rank to its outputs."""
    operands, _, result = str(view.subscripts).partition("->")
    lhs, kernel = operands.split(",")
    letters = "".join(kernel[axis] for axis in view.permutation)
    ins, outs = letters[: -view.outputs], letters[-view.outputs :]
    rank = next(letter for letter in string.ascii_letters if letter not in lhs + kernel + result)
    rest = "".join(letter for letter in lhs if letter not in ins)
    pair = []
    for subscripts, w, sizes, bias in (
        (f"{lhs},{ins}{rank}->{rest}{rank}", first, (*view.permuted[: -view.outputs], first.shape[1]), None),
        (f"{rest}{rank},{rank}{outs}->{result}", second, (first.shape[1], *view.permuted[-view.outputs :]), dense.bias),
    ):
        one = nnx.Einsum(subscripts, sizes, dtype=dense.dtype, param_dtype=dense.param_dtype, rngs=nnx.Rngs(0))
        one.kernel.set_value(w.reshape(sizes))
        one.bias = nnx.data(bias)
        pair.append(one)
    return pair


def prune(
    attached: Attached,
    optimizer: nnx.Optimizer | None = None,
    *,
    energy: float = 0.95,
    multiple: int = 8,
    tolerance: float = 1e-3,
) -> None:
    """Drops singular values of an attached model, its feedback and optimizer, in place: :func:`jaxfa.factored.prune`.

    Args:
      attached: what :func:`jaxfa.nn.attach` returned, with factored layers.
      optimizer: the one that trains it.
      energy: how much of the squared singular values to keep, in (0, 1].
      multiple: ranks are rounded up to whole multiples of it.
      tolerance: as for :func:`jaxfa.factored.prune`.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> model, x = nnx.Linear(64, 64, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
      >>> attached = jaxfa.nn.attach(model, jaxfa.ssa(), rngs=nnx.Rngs(1), example=x)
      >>> jaxfa.nn.prune(attached, energy=0.9)
      >>> attached.model.kernel.get_value().s.shape
      (40,)

    Source: as :func:`jaxfa.factored.prune`.
    """
    trees: Any = (nnx.state(attached, nnx.Param), nnx.state(attached, Feedback))
    trees = (*trees, None if optimizer is None else optimizer.opt_state)
    boxes = jax.tree.leaves(trees, is_leaf=_is_box)
    bare = jax.tree.map(lambda box: box.get_value() if _is_box(box) else box, trees, is_leaf=_is_box)
    pruned = prune_tree(*bare, energy=energy, multiple=multiple, tolerance=tolerance)
    # One box holds a whole node of factors or of feedback, another a single array.
    structure: Any = jax.tree.structure(trees, is_leaf=_is_box)
    for box, value in zip(boxes, structure.flatten_up_to(pruned), strict=True):
        if _is_box(box):
            box.set_value(value)


def _is_box(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
