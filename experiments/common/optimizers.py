"""The optimizers that several experiments share."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers


def adam(
    learning_rate: float, *, weight_decay: float, decay: float, steps: int, amsgrad: bool = False
) -> optax.GradientTransformation:
    """Adam as PyTorch's ``Adam(weight_decay=...)`` with ``ExponentialLR``.

    Args:
      learning_rate: of the first epoch.
      weight_decay: of the L2 penalty, whose gradient goes through Adam's normalisation.
      decay: what each epoch multiplies the learning rate with.
      steps: in an epoch.
      amsgrad: whether second moments never shrink.

    Returns:
      An optax transformation.
    """
    rate = optax.exponential_decay(learning_rate, steps, decay, staircase=True)
    chosen = optax.amsgrad if amsgrad else optax.adam
    return optax.chain(optax.add_decayed_weights(weight_decay), chosen(rate))


def hidden_kernels(model: nnx.Module, *, but: tuple[str, ...]) -> Callable[[Any], Any]:
    """Which parameters Muon is for, and how each is a matrix: the kernels of dense layers and convolutions.

    Inputs are an axis of a dense layer and the window and the channels of a convolution, all flattened into one.
    The axes before them, of layers stacked by ``nnx.vmap``, count matrices, which are never mixed. Biases, norms,
    embeddings, bare parameters and convolutions with groups, depthwise ones among them, are left out. The modules'
    classes decide, not the shapes: a stack of attention's projections has the shape of a convolution.

    Args:
      model: the network, or its shapes by ``nnx.eval_shape``.
      but: paths of modules that are left out, too, with all in them: those of the first and the last layer.

    Returns:
      A function of any tree that holds the model's parameters, to the tree with ``MuonDimensionNumbers`` in the place
      of each matrix and None in that of each other array: ``muon_weight_dimension_numbers`` of ``optax.contrib.muon``.

    Raises:
      ValueError: if there is no such layer at one of these paths.
    """
    found = {"/".join(map(str, path)): _axes(module) for path, module in nnx.iter_modules(model)}
    layers = {path: numbers for path, numbers in found.items() if numbers is not None}
    unmatched = [path for path in but if not any(_is_under(layer, path) for layer in layers)]
    if unmatched:
        raise ValueError(f"but={unmatched} names no layer; the layers here are {sorted(layers)}.")
    left = {layer: numbers for layer, numbers in layers.items() if not any(_is_under(layer, path) for path in but)}
    kernels = {f"{layer}/kernel": numbers for layer, numbers in left.items()}
    names = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]

    def numbers(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        del leaf
        here = f"/{jax.tree_util.keystr(path, simple=True, separator='/')}"
        # The model may lie anywhere in the tree; of two names that fit, the longer is the whole one.
        fitting = [name for name in names if here.endswith(f"/{name}")]
        return kernels.get(max(fitting, key=len)) if fitting else None

    return lambda params: jax.tree_util.tree_map_with_path(numbers, params)


def _is_under(layer: str, path: str) -> bool:
    return f"{layer}/".startswith(f"{path}/")


def _axes(module: Any) -> MuonDimensionNumbers | None:
    """The last axes of a layer's kernel that are its inputs, and its outputs; None for what has no such matrix."""
    match module:
        case nnx.Linear():
            inputs, outputs = 1, 1
        case nnx.LinearGeneral():
            inputs, outputs = len(module.in_features), len(module.out_features)
        case nnx.Conv() if module.feature_group_count == 1:
            inputs, outputs = len(module.kernel_shape) - 1, 1
        case _:
            return None
    axes = range(-inputs - outputs, 0)
    return MuonDimensionNumbers(tuple(axes[:inputs]), tuple(axes[inputs:]))


def muon(
    learning_rate: optax.ScalarOrSchedule,
    hidden: Callable[[Any], Any],
    *,
    adam_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Muon for the matrices of hidden layers, Adam for all else.

    Two points in which optax's Muon differs from the original: Newton and Schulz's five steps are of the update's own
    precision, not bfloat16, and the momentum is corrected for its start. Its update is scaled by ``sqrt(max(1, outputs
    / inputs))`` of the flattened matrix; the original takes a kernel's height over its width for that ratio, which
    is 1.

    Args:
      learning_rate: of Muon.
      hidden: from :func:`hidden_kernels`.
      adam_rate: the learning rate of Adam.
      weight_decay: of all parameters, times the learning rate.

    Returns:
      An optax transformation.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon
    """
    matrices = optax.contrib.muon(learning_rate, weight_decay=weight_decay, muon_weight_dimension_numbers=hidden)
    return beside_adam(matrices, hidden, adam_rate=adam_rate, weight_decay=weight_decay)


def beside_adam(
    matrices: optax.GradientTransformation,
    hidden: Callable[[Any], Any],
    *,
    adam_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """One optimizer for the matrices of hidden layers, and for all else the Adam that stands beside Muon."""
    rest = optax.adamw(adam_rate, b1=0.9, b2=0.95, eps=1e-10, weight_decay=weight_decay)
    return optax.partition({True: matrices, False: rest}, lambda params: is_hidden(hidden, params))


def is_hidden(hidden: Callable[[Any], Any], params: Any) -> Any:
    """The tree with True in the place of each matrix of a hidden layer and False in that of each other array."""
    return jax.tree.map(lambda leaf: leaf is not None, hidden(params), is_leaf=is_numbers)


def is_numbers(node: Any) -> bool:
    """Whether a node of what :func:`hidden_kernels` made stands for one array: the leaf test for such trees."""
    return node is None or isinstance(node, MuonDimensionNumbers)
