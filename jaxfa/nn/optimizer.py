"""Flax's optimizer for a model that learns by a rule, with any optax wrapper around :func:`jaxfa.optimizer`."""

from typing import Any

import optax
from flax import nnx

from jaxfa.nn.model.variables import Feedback
from jaxfa.optim.trees import unboxed


class Optimizer(nnx.Optimizer):
    """``nnx.Optimizer`` of parameters and feedback, whose state holds arrays alone.

    ``nnx.Optimizer`` itself does as well, but for wrappers *outside* :func:`jaxfa.optimizer` that keep copies of what
    they are given, such as ``optax.MultiSteps``: it loses the structure of a feedback, or of factors, in these.

    Args:
      model: what :func:`jaxfa.nn.attach` returned.
      tx: what :func:`jaxfa.optimizer` made, with or without wrappers around it.
      wrt: which variables learn, as for ``nnx.Optimizer``; the gradient is taken in the same.

    Example:
      >>> import jax.numpy as jnp, jaxfa, jaxfa.nn, optax
      >>> from flax import nnx
      >>> rule, model = jaxfa.kolen_pollack(), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> model = jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1))
      >>> tx = optax.MultiSteps(jaxfa.optimizer(optax.sgd(0.1), rule), 4)
      >>> optimizer = jaxfa.nn.Optimizer(model, tx)

    Source: Flax's documentation, https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/training/optimizer.html
    """

    def __init__(self, model: nnx.Module, tx: Any, *, wrt: Any = (nnx.Param, Feedback), **options: Any) -> None:
        bare = optax.GradientTransformationExtraArgs(lambda tree: tx.init(unboxed(tree)), tx.update)
        super().__init__(model, bare, wrt=wrt, **options)
