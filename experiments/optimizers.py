"""The optimizers that several experiments share."""

import optax


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
