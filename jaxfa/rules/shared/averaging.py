"""How much a new estimate of the Jacobian weighs in the running mean of all, by a Kalman filter."""

import jax
import jax.numpy as jnp

from jaxfa.rules.shared.estimates import Estimate
from jaxfa.rules.shared.jacobian import Gain


def kalman(drift: float = 0.1) -> Gain:
    """Averages as long as it pays: the weights of a Kalman filter, by each layer's own noise.

    The Jacobian is taken for a random walk of steps ``q = (drift |J|)^2``, seen through the noise ``r`` of an estimate,
    which the spread of the batch's examples tells: ``1 / p <- 1 / (p + q) + 1 / r`` is the running mean's precision and
    ``p / r`` the new estimate's weight: 1, 1/2, 1/3 at first, as in an ordinary mean, and in the end about
    ``drift |J| / sqrt(r)``. Where the noise is large the mean is long. Examples are taken for independent.

    Args:
      drift: from 0, by what part of itself the Jacobian changes from one step to the next; ours.

    Returns:
      A value for ``averaging`` of :func:`jaxfa.grape`.

    Raises:
      ValueError: if ``drift`` is below 0; from ``refine``, if a batch has one example only.

    Example:
      >>> import jaxfa
      >>> rule = jaxfa.grape(averaging=jaxfa.rules.kalman(0.1))

    Source: Kalman, "A New Approach to Linear Filtering and Prediction Problems", 1960,
    https://doi.org/10.1115/1.3662552
    """
    if not drift >= 0:
        raise ValueError(f"drift must be from 0, got {drift}.")

    def gain(mean: jax.Array, precision: jax.Array, estimate: Estimate) -> tuple[jax.Array, jax.Array]:
        noise = estimate.variance
        if noise is None:
            raise ValueError(
                "kalman measures noise by the spread of a batch: give refine two examples or more, or averaging=0.0."
            )
        # |mean|^2 has the mean's own variance in it. In units of that variance nothing is divided by zero.
        signal = jnp.maximum(precision * jnp.sum(jnp.square(mean)) - 1, 0)
        prior = precision / (1 + drift**2 * signal)
        # No noise at all is a network that nothing moves, such as one whose last layer is zero: it tells nothing.
        return 1 / (1 + prior * noise), jnp.where(noise > 0, prior + 1 / noise, 0)

    return gain
