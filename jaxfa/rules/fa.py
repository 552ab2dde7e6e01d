"""Feedback alignment: ``delta_l = (B_{l+1} delta_{l+1}) * phi'(a_l)`` with a fixed random ``B``.

Lillicrap, Cownden, Tweed, Akerman, "Random synaptic feedback weights support error backpropagation for deep learning",
2016, https://doi.org/10.1038/ncomms13276
"""

from jax.nn import initializers

from jaxfa.base import FixedFeedback, Initializer, LayerRule


def fa(*, distribution: Initializer | None = None, scale: float = 1.0) -> LayerRule:
    """Feedback alignment: errors return through fixed random weights.

    ``dx = delta b^T``, ``dw = x^T delta``, ``b`` never changes.

    Args:
      distribution: an initializer ``(key, shape, dtype) -> b``. The default is Glorot's uniform one, as in BioTorch,
        whose tables are the ones usually quoted; the 2016 paper tuned a uniform range by hand.
      scale: factor on the drawn ``b``.

    Returns:
      A :class:`jaxfa.LayerRule`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> w = jnp.ones((784, 10))
      >>> jaxfa.fa().init(jax.random.key(0), w).b.shape
      (784, 10)

    Source: Lillicrap et al., "Random synaptic feedback weights support error backpropagation for deep learning", 2016,
    https://doi.org/10.1038/ncomms13276
    """
    draw = distribution or initializers.glorot_uniform()
    return LayerRule(lambda key, w: FixedFeedback(scale * draw(key, w.shape, w.dtype)))
