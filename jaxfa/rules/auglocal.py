"""AugLocal: every block learns from an auxiliary network that is made of what comes after it in the model itself.

Ma, Wu, Si, Tan, "Scaling Supervised Local Learning with Augmented Auxiliary Networks", 2024,
https://openreview.net/forum?id=Qbf1hy8b7m

A block's auxiliary network has ``d`` of the blocks above it, taken at equal distances, with weights of its own, and a
linear classifier on the mean over pixels. Depths are pyramidal: the nearer a block is to the output, the fewer. The
last tapped block has nothing above to take, and its network is the classifier alone.

Where a block expects another shape than arrives, the map is averaged to its size and its channels are mapped linearly;
the paper's code builds the block anew for the channels that arrive. Weights are drawn anew by shuffling every array of
the block's own, which for independent draws is another draw. Running statistics are the block's, and stay. A layer that
is tapped by itself, such as ``nnx.Linear``, is followed by ReLU. Dropout is off in auxiliary networks.

Needs hard targets, which the output error tells, and modules that are called with one array. Costs up to ``d`` more
blocks for each block, forward and backward. It is local between blocks; a block's error goes backward through its
auxiliary network, whose depth is what brings the accuracy, and through the block.

Activations wait for the error, so that memory grows with depth; by ``schedule=jaxfa.stacks.stream`` none beyond a block
is kept.
"""

from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.nn import initializers

from jaxfa.base import DirectRule, Layer, Operation, feedback_dataclass
from jaxfa.rules.shared.local import LocalLoss, affine, classifier, cross_entropy, features, pool


@feedback_dataclass
class AuxiliaryNetwork(LocalLoss):
    """Blocks with weights of their own, and a linear classifier.

    Attributes:
      adapters: for each block what maps the channels that arrive to those it expects; None where they are as many.
      params: the blocks' parameters.
      state: what else they compute with, such as statistics, which stays.
      w: the classifier's weights, ``(n, C)``.
      b: its biases, ``(C,)``.
      blocks: the blocks, ``(x, (params, state)) -> y``.
      sides: to which axes of pixels each block's input is averaged.
    """

    adapters: tuple[Any, ...]
    params: tuple[Any, ...]
    state: tuple[Any, ...]
    w: jax.Array
    b: jax.Array
    blocks: tuple[Operation, ...] = field(metadata={"static": True})
    sides: tuple[tuple[int, ...], ...] = field(metadata={"static": True})

    def loss(self, h: jax.Array, y: jax.Array, c: jax.Array) -> jax.Array:
        for i, block in enumerate(self.blocks):
            sides = self.sides[i]
            h = pool(h, sides) if sides else mean(h, y.ndim - 1)
            h = h if self.adapters[i] is None else h @ self.adapters[i].astype(h.dtype)
            h = block(h, (self.params[i], lax.stop_gradient(self.state[i])))
        return cross_entropy(affine(mean(h, y.ndim - 1), self.w, self.b), y, c)


def mean(h: jax.Array, leading: int) -> jax.Array:
    """The mean over pixels or tokens, if there are any: one vector for each example."""
    return features(h, (1,) * (h.ndim - 1 - leading))


def auglocal(*, depth: int = 3, pyramid: float = 0.5, learning_rate: float = 1e-3) -> DirectRule:
    """AugLocal: ``dh_l = dL_l / dh_l`` with ``L_l`` the cross-entropy of an auxiliary network of ``d_l`` blocks above.

    They are those of ``L`` tapped blocks, counted from 0, at ``round(l + (L - l - 1) i / d_l)``, ``i = 1 ... d_l``,
    with ``d_l = max(1, round(d + (1 - d) t l / (L - 2)))``; all that are above, where these are fewer.

    For classification by softmax cross-entropy with hard labels, a mean, a sum or weighted: the output error tells the
    targets, and examples count as they do there. Any other loss is refused, under ``jit`` by gradients that are NaN.
    What is above the last tap learns from the loss itself.

    Args:
      depth: ``d``, how many blocks the first one's auxiliary network has.
      pyramid: ``t``, how much depths fall towards the output: from 0, not at all, to 1, to a single block.
      learning_rate: of the auxiliary networks' Adam; ours. The paper's have the network's own SGD.

    Returns:
      A :class:`jaxfa.DirectRule` for :func:`jaxfa.nn.attach`, which knows what is above each tap.

    Raises:
      ValueError: if an argument is out of range; by ``init``, if blocks do not fit; by the backward pass, if the error
        does not tell the targets.

    Example:
      >>> import jaxfa
      >>> rule = jaxfa.auglocal(depth=2)  # jaxfa.nn.attach(model, rule, at="blocks/*", ...)

    Source: Ma, Wu, Si, Tan, "Scaling Supervised Local Learning with Augmented Auxiliary Networks", 2024,
    https://openreview.net/forum?id=Qbf1hy8b7m
    """
    if depth < 1 or not 0 <= pyramid <= 1:
        raise ValueError(f"auglocal needs depth >= 1 and pyramid in [0, 1], got {depth} and {pyramid}.")

    def init(
        key: jax.Array, h: Any, logits: Any, *, above: tuple[Layer, ...] | None = None, below: int = 0
    ) -> AuxiliaryNetwork:
        if above is None:
            raise ValueError(
                "auglocal makes auxiliary networks of the modules above a tap: put it on a model by jaxfa.nn.attach, "
                "or tell init(key, h, logits, above=layers, below=how many taps come before)."
            )
        layers = [above[i] for i in sampled(len(above), below, depth, pyramid)]
        key, params_key, *keys = jax.random.split(key, 2 + len(layers))
        leading, made = logits.ndim - 1, []
        for layer, one, params in zip(layers, keys, redrawn(params_key, [layer.w[0] for layer in layers]), strict=True):
            sides, adapter = _adapter(one, h, layer.x, leading)
            state = jax.tree.map(jnp.copy, layer.w[1])
            made.append((adapter, params, state, layer.op, sides))
            h = jax.eval_shape(lambda x, *p, op=layer.op: op(x, p), layer.x, params, state)
        columns: Any = zip(*made, strict=True) if made else [()] * 5
        adapters, params, state, blocks, sides = columns
        w, b = classifier(key, h.shape[-1], h, logits)
        return AuxiliaryNetwork(adapters, params, state, w, b, blocks, sides)

    return DirectRule(init, transform=optax.adam(learning_rate))


def sampled(above: int, below: int, depth: int, pyramid: float) -> list[int]:
    """Which of the blocks above a block its auxiliary network has."""
    taps = below + 1 + above
    share = pyramid * below / max(taps - 2, 1)
    own = max(1, round(depth * (1 - share) + share))
    if own >= above:
        return list(range(above))
    # From the block itself on, as the paper's code rounds.
    return [round(below + above / own * i) - below - 1 for i in range(1, own + 1)]


def redrawn(key: jax.Array, params: Any) -> Any:
    """Parameters with the entries of every array in another order."""
    leaves, structure = jax.tree.flatten(params)
    sizes = [leaf.size for leaf in leaves]
    words = jnp.split(jax.random.bits(key, (sum(sizes),), jnp.uint32), np.cumsum(sizes)[:-1])
    alike: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        alike.setdefault((leaf.size, leaf.dtype), []).append(i)
    # One draw, and arrays of one size side by side: each draw and each sort takes longer to compile than a layer.
    for places in alike.values():
        both = [jnp.stack([arrays[i].reshape(-1) for i in places]) for arrays in (words, leaves)]
        for i, one in zip(places, lax.sort(both, num_keys=1)[1], strict=True):
            leaves[i] = one.reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, leaves)


def _adapter(key: jax.Array, h: Any, expected: Any, leading: int) -> tuple[tuple[int, ...], jax.Array | None]:
    """How what arrives is made what a block expects: the sides of its map, and a matrix for its channels."""
    have, want = h.shape[leading:-1], expected.shape[leading:-1]
    if want and (len(want) != len(have) or any(more > side for more, side in zip(want, have, strict=True))):
        raise ValueError(
            f"auglocal averages what arrives to the size that a block expects, and here {have} pixels or tokens would "
            f"have to become {want}: name with at= blocks whose maps do not grow, or take jaxfa.local_classifier."
        )
    if h.shape[-1] == expected.shape[-1]:
        return want, None
    dtype = jnp.promote_types(h.dtype, jnp.float32)
    return want, initializers.lecun_normal()(key, (h.shape[-1], expected.shape[-1]), dtype)
