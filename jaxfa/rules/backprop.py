"""Backpropagation itself, as a rule: no feedback, ordinary autodiff."""

from jaxfa.base import LayerRule


def backprop() -> LayerRule:
    """Backpropagation itself, so that it stands in every table: no feedback, ordinary autodiff.

    Returns:
      A :class:`LayerRule`.

    Example:
      >>> import jax, jaxfa
      >>> jaxfa.backprop().init(jax.random.key(0), jax.numpy.ones((3, 2))) is None
      True
    """
    return LayerRule(lambda key, w: None)
