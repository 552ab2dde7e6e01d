"""Weight mirror: in a phase of its own, noise sent through a layer teaches the feedback what the weights are.

Akrout, Wilson, Humphreys, Lillicrap, Tweed, "Deep Learning without Weight Transport", 2019,
https://arxiv.org/abs/1904.05391
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxfa.base import FixedFeedback, Initializer, Layer, LayerRule, is_layer, transpose


def weight_mirror(
    *,
    learning_rate: float = 0.1,
    weight_decay: float | None = None,
    distribution: Initializer | None = None,
    scale: float = 1.0,
) -> LayerRule:
    """Weight mirror: ``b <- (1 - lambda) b + eta <x y^T>`` with noise ``x`` and the layer's answer ``y = op(x, w)``.

    Standard normal noise gives ``E[x y^T] = w`` (any other size would cancel: the layer is linear). The mean is over
    every use of a weight, so it holds for convolutions too: one step moves ``b`` by ``eta`` times an unbiased estimate
    of ``w``. The noise phase is the rule's ``refine`` and sees one layer at a time, without bias or
    nonlinearity, as in the paper (its code keeps a sigmoid and rescales ``b`` instead of letting it decay).

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

    def reflect(layer: Layer, feedback: FixedFeedback, key: jax.Array) -> FixedFeedback:
        x = jax.random.normal(key, layer.x.shape, layer.x.dtype)
        w = layer.w.astype(x.dtype)
        correlation = _outer(layer, x, layer.op(x, w))
        # With ones for x and y the same sum counts how often each weight is used: border taps of a kernel less often,
        # on a map smaller than the kernel some never.
        uses = _outer(layer, jnp.ones_like(x), jnp.ones_like(layer.op(x, w)))
        estimate = (correlation / jnp.maximum(uses, 1)).astype(feedback.b.dtype)
        return FixedFeedback((1 - decay) * feedback.b + learning_rate * estimate)

    def refine(forward: Any, feedback: Any, key: jax.Array) -> Any:
        keys = iter(jax.random.split(key, len(jax.tree.leaves(forward, is_leaf=is_layer))))
        return jax.tree.map(lambda layer, b: reflect(layer, b, next(keys)), forward, feedback, is_leaf=is_layer)

    return LayerRule(lambda key, w: FixedFeedback(scale * draw(key, w.shape, w.dtype)), refine)


def _outer(layer: Layer, x: jax.Array, y: jax.Array) -> jax.Array:
    """``x y^T`` summed over every use of each weight, in the weights' shape."""
    return transpose(lambda w: layer.op(x, w), layer.w.astype(x.dtype), y)
