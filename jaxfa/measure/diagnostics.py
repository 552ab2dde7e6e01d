"""How well a rule is aligned with the true gradient, and how many directions its signals span, what a step costs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from jaxfa.base import LayerFeedback
from jaxfa.factored.svd import is_factors
from jaxfa.measure.pair import matrix_of


class Alignment(NamedTuple):
    """One layer's pseudo-gradient beside the true one.

    Attributes:
      angle: degrees between them; 0 is backpropagation, 90 is no information.
      norm_ratio: the pseudo-gradient's norm over the true one's.
    """

    angle: jax.Array
    norm_ratio: jax.Array


def angle(a: jax.Array, b: jax.Array) -> jax.Array:
    """The angle between two arrays of one shape: ``arccos(<a, b> / (|a| |b|))``.

    Args:
      a: an array.
      b: an array of the same shape.

    Returns:
      A scalar, in degrees; NaN if either is zero, where no angle is defined.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> float(jaxfa.diagnostics.angle(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])))
      90.0

    Source: Lillicrap et al., "Random synaptic feedback weights support error backpropagation for deep learning", 2016,
    https://doi.org/10.1038/ncomms13276
    """
    if a.shape != b.shape:
        raise ValueError(f"angle compares arrays of one shape, got {a.shape} and {b.shape}.")
    a, b = _at_least_single(a), _at_least_single(b)
    # Kahan's form keeps its digits near 0 and 180 degrees, where arccos of a rounded cosine loses half of them.
    a, b = a / _norm(a), b / _norm(b)
    return jnp.degrees(2 * jnp.arctan2(jnp.linalg.norm(a - b), jnp.linalg.norm(a + b)))


def compare(pseudo: Any, true: Any) -> Any:
    """Angle and norm ratio of two gradients, array by array.

    Args:
      pseudo: a tree of a rule's pseudo-gradients.
      true: a tree of the same structure with backpropagation's.

    Returns:
      The tree with an :class:`Alignment` in place of each array.

    Raises:
      ValueError: if the structures or shapes differ.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> float(jaxfa.diagnostics.compare({"w": 3 * jnp.ones(4)}, {"w": jnp.ones(4)})["w"].norm_ratio)
      3.0

    Source: as :func:`angle`.
    """

    def one(p: jax.Array, t: jax.Array) -> Alignment:
        return Alignment(angle(p, t), _norm(_at_least_single(p)) / _norm(_at_least_single(t)))

    return jax.tree.map(one, pseudo, true)


def weight_angle(w: jax.Array, feedback: LayerFeedback) -> jax.Array:
    """The angle between a layer's weights and the matrix through which its errors return.

    Args:
      w: the weights, of the shape that ``rule.init`` was given.
      feedback: the layer's feedback, of a rule that has a matrix of ``w``'s shape.

    Returns:
      A scalar, in degrees.

    Raises:
      ValueError: if the feedback has no matrix of ``w``'s shape, such as a direct or a low-rank one.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> w = jnp.ones((3, 2))
      >>> float(jaxfa.diagnostics.weight_angle(w, jaxfa.FixedFeedback(2 * w)))
      0.0

    Source: as :func:`angle`.
    """
    arrays = [one.dense() if is_factors(one) else one for one in (matrix_of(feedback, w), w)]
    return angle(*arrays)


def entropy_rank(matrix: jax.Array) -> jax.Array:
    """Effective rank by Roy & Vetterli: ``exp(-sum_i p_i log p_i)``, ``p_i = sigma_i / sum sigma``, ``0 log 0 = 0``.

    Args:
      matrix: ``(rows, columns)``.

    Returns:
      A scalar from 1 to the rank; 0 for a zero matrix.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> round(float(jaxfa.diagnostics.entropy_rank(jnp.eye(4))), 3)
      4.0

    Source: Roy, Vetterli, "The effective rank: A measure of effective dimensionality", 2007,
    https://ieeexplore.ieee.org/document/7098875
    """
    sigma = _singular_values(matrix)
    total = sigma.sum()
    p = sigma / jnp.where(total == 0, 1, total)
    return jnp.where(total == 0, 0, jnp.exp(entr(p).sum()))


def participation_ratio(matrix: jax.Array) -> jax.Array:
    """Participation ratio of the squared singular values: ``(sum sigma_i^2)^2 / sum sigma_i^4``.

    Args:
      matrix: ``(rows, columns)``.

    Returns:
      A scalar from 1 to the rank; 0 for a zero matrix.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> round(float(jaxfa.diagnostics.participation_ratio(jnp.eye(4))), 3)
      4.0

    Source: Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", 2017,
    https://doi.org/10.1101/214262
    """
    square = _singular_values(matrix) ** 2
    return _ratio(square.sum() ** 2, (square**2).sum())


def stable_rank(matrix: jax.Array) -> jax.Array:
    """Stable rank: ``|A|_F^2 / |A|_2^2``.

    Args:
      matrix: ``(rows, columns)``.

    Returns:
      A scalar from 1 to the rank; 0 for a zero matrix.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> round(float(jaxfa.diagnostics.stable_rank(jnp.eye(4))), 3)
      4.0

    Source: Rudelson, Vershynin, "Sampling from large matrices", 2007, https://arxiv.org/abs/math/0503442
    """
    square = _singular_values(matrix) ** 2
    return _ratio(square.sum(), square.max())


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of one call, counted by XLA on the compiled program: ``2 a b c`` for a matrix product.

    Counted after the compiler has dropped what is unused and merged what is computed twice. A convolution counts the
    taps that meet the image, not its padding, and as if computed directly, however the backend does it. Pointwise
    arithmetic and reductions count one per element. Not counted: exponentials and their like; what is handed to a
    library, such as decompositions, and on accelerators whatever XLA does not model. The body of a loop counts once,
    however often it runs, and of a branch the dearest arm: unroll what has to be counted. The backward pass is the
    difference ``flops(jax.value_and_grad(loss), w) - flops(loss, w)``.

    Args:
      function: a function that can be compiled.
      *args: its arguments: trees of arrays or ``jax.ShapeDtypeStruct``; only their shapes and dtypes matter.

    Returns:
      How many operations; 0.0 for a program without arithmetic.

    Raises:
      ValueError: if the backend does not count.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> x, w = jax.ShapeDtypeStruct((5, 4), jnp.float32), jax.ShapeDtypeStruct((4, 3), jnp.float32)
      >>> jaxfa.diagnostics.flops(jnp.matmul, x, w)
      120.0

    Source: JAX's documentation, "Ahead-of-time lowering and compilation", https://docs.jax.dev/en/latest/aot.html
    """
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    if analysis is None:
        raise ValueError(f"The backend {jax.default_backend()!r} does not count operations. Count on a CPU.")
    return float(analysis.get("flops", 0.0))


def _singular_values(matrix: jax.Array) -> jax.Array:
    if matrix.ndim != 2:
        raise ValueError(f"A rank is of a matrix (rows, columns), got shape {matrix.shape}; reshape it first.")
    sigma = jnp.linalg.svd(_at_least_single(matrix), compute_uv=False)
    # No rank depends on the scale; at scale one no power of a singular value leaves the range of its dtype.
    return sigma / jnp.where(sigma[0] == 0, 1, sigma[0])


def _ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    return jnp.where(below == 0, 0, above / jnp.where(below == 0, 1, below))


def _at_least_single(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _norm(x: jax.Array) -> jax.Array:
    # The squares of a vanishing gradient vanish in float32 long before the gradient does.
    largest = jnp.max(jnp.abs(x), initial=0)
    scale = jnp.where(largest == 0, 1, largest)
    return scale * jnp.linalg.norm((x / scale).ravel())
