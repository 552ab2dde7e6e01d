"""Weight mirror: in a phase of its own, noise sent through a layer teaches the feedback what the weights are.

Akrout, Wilson, Humphreys, Lillicrap, Tweed, "Deep Learning without Weight Transport", 2019,
https://arxiv.org/abs/1904.05391
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxfa.base import FixedFeedback, Initializer, Layer, LayerRule, is_layer, transpose
from jaxfa.rules.shared.noise import random_signs
from jaxfa.rules.shared.outputs import counts_outputs_last


def weight_mirror(
    *,
    learning_rate: float = 0.1,
    weight_decay: float | None = None,
    distribution: Initializer | None = None,
    scale: float = 1.0,
) -> LayerRule:
    """Weight mirror: ``b <- (1 - lambda) b + eta <x y^T>`` with noise ``x`` and the layer's answer ``y = op(x, w)``.

    White noise of variance 1 gives ``E[x y^T] = w`` (any other size would cancel: the layer is linear); ours are signs,
    which err least of all. The mean is over every use of a weight, so it holds for convolutions too: one step moves
    ``b`` by ``eta`` times an unbiased estimate of ``w``. The noise phase is the rule's ``refine`` and sees one layer at
    a time, without bias or nonlinearity, as in the paper (its code keeps a sigmoid and rescales ``b`` instead of
    letting it decay).

    Args:
      learning_rate: ``eta``, how far one noise batch moves ``b``. The default is ours.
      weight_decay: ``lambda`` per noise batch; by default ``learning_rate``, so that ``b`` tends to ``w`` itself.
      distribution: an initializer ``(key, shape, dtype) -> b``; Glorot's uniform one by default.
      scale: factor on the drawn ``b``.

    Returns:
      A :class:`jaxfa.LayerRule` whose ``refine`` must run to learn: once per step, or in bursts.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> rule, w = jaxfa.weight_mirror(learning_rate=0.5), jnp.ones((3, 2))
      >>> layer = jaxfa.Layer(jaxfa.linear, jax.ShapeDtypeStruct((64, 3), "float32"), w)
      >>> mirrored = rule.refine(layer, rule.init(jax.random.key(0), w), jax.random.key(1))

    Source: Akrout et al., "Deep Learning without Weight Transport", 2019, https://arxiv.org/abs/1904.05391
    """
    draw = distribution or initializers.glorot_uniform()
    decay = learning_rate if weight_decay is None else weight_decay

    def reflect(layer: Layer, feedback: FixedFeedback, seed: jax.Array) -> FixedFeedback:
        x = random_signs.made(seed, layer.x.shape, layer.x.dtype)
        w = layer.w.astype(x.dtype)
        estimate = _outer(layer, x, layer.op(x, w), w) / jnp.maximum(_uses(layer, x, w), 1)
        return FixedFeedback((1 - decay) * feedback.b + learning_rate * estimate.astype(feedback.b.dtype))

    def refine(forward: Any, feedback: Any, key: jax.Array) -> Any:
        layers = jax.tree.leaves(forward, is_leaf=is_layer)
        seeds = iter(random_signs.seeds(key, [layer.x.shape for layer in layers]))
        return jax.tree.map(lambda layer, b: reflect(layer, b, next(seeds)), forward, feedback, is_leaf=is_layer)

    return LayerRule(lambda key, w: FixedFeedback(scale * draw(key, w.shape, w.dtype)), refine)


def _uses(layer: Layer, x: jax.Array, w: jax.Array) -> jax.Array:
    """How often each weight is used: border taps of a kernel less often, on a map smaller than the kernel some never.

    It is the correlation of ones. All outputs use their weights alike, so that one tells of all where ``op`` takes one:
    the compiler works this out, which for all of them takes it long.
    """
    y = jax.eval_shape(layer.op, x, w)
    if counts_outputs_last(layer.op, x, w, y.shape):
        w, y = w[..., :1], jax.eval_shape(layer.op, x, w[..., :1])
    return _outer(layer, jnp.ones_like(x), jnp.ones(y.shape, y.dtype), w)


def _outer(layer: Layer, x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    """``x y^T`` summed over every use of each weight, in the weights' shape."""
    return transpose(lambda w: layer.op(x, w), w, y)
