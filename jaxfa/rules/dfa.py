"""Direct feedback alignment: ``delta_l = (B_l e) * phi'(a_l)``, the output error straight to every layer.

Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", 2016, https://arxiv.org/abs/1609.01596;
the one shared matrix is from Launay, Poli, Boniface, Krzakala, "Direct Feedback Alignment Scales to Modern Deep
Learning Tasks and Architectures", 2020, https://arxiv.org/abs/2006.12878; hashing from Weinberger, Dasgupta, Langford,
Smola, Attenberg, "Feature Hashing for Large Scale Multitask Learning", 2009, https://arxiv.org/abs/0902.2206
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxfa.base import DirectFeedback, DirectRule, Initializer, feedback_dataclass
from jaxfa.rules.shared.projection import direct_matrix, project, shared_axes


@feedback_dataclass
class DirectMatrix(DirectFeedback):
    """A fixed matrix from the outputs to one layer.

    Attributes:
      b: feedback weights, the layer's own axes then the outputs', such as ``(n, C)`` or ``(H, W, n, C)``.
    """

    b: jax.Array

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        return project(self.b, h, e)


@feedback_dataclass
class SharedMatrix(DirectFeedback):
    """One matrix for all layers; a layer of ``n`` units takes its first ``n`` rows, divided by ``sqrt(n)``.

    Attributes:
      b: feedback weights, ``(largest n, C)``.
    """

    shared: ClassVar[bool] = True
    b: jax.Array

    @property
    def is_made_once(self) -> bool:
        return self.b.shape[-2] < self.b.shape[-1]

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        k = shared_axes(h, e)
        n = math.prod(h.shape[k:])
        if n > self.b.shape[0]:
            raise ValueError(
                f"The shared feedback has {self.b.shape[0]} rows, too few for a layer of {n} units of shape "
                f"{h.shape[k:]}. Make it with rule.init(key, h, logits) for the largest h."
            )
        rows = self.b[:n].reshape(*h.shape[k:], *e.shape[k:])
        return project(rows, h, e) / math.sqrt(n)  # the matrix itself would have to be copied


@feedback_dataclass
class HashedMatrix(DirectFeedback):
    """One matrix for all layers whose columns are equal up to signs: output ``c`` has column ``c mod r``.

    So the error is added up in ``r`` buckets, and the matrix of as many columns as there are outputs is never formed.

    Attributes:
      b: feedback weights, ``(largest n, r)``.
      signs: of the outputs, ``(C,)``.
    """

    shared: ClassVar[bool] = True
    b: jax.Array
    signs: jax.Array

    @property
    def is_made_once(self) -> bool:
        return self.b.shape[-2] < self.signs.shape[-1]

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        k, buckets = shared_axes(h, e), self.b.shape[1]
        signed = e.reshape(*e.shape[:k], -1) * self.signs.astype(e.dtype).reshape(*[1] * k, -1)
        rest = -self.signs.size % buckets
        padded = jnp.pad(signed, [*[(0, 0)] * k, (0, rest)])
        return SharedMatrix(self.b).deliver(h, padded.reshape(*e.shape[:k], -1, buckets).sum(k))


def dfa(
    *,
    shared: bool = False,
    buckets: int | None = None,
    distribution: Initializer | None = None,
    scale: float = 1.0,
) -> DirectRule:
    """Direct feedback alignment: ``dh_l = e B_l^T``; the local derivative follows by the layer's own backward.

    So ``dW_l = h_{l-1}^T ((e B_l^T) * phi')``. Sequences whose logits are per token get their own token's error; with
    one output per example the matrix covers all tokens, as it covers all pixels of a feature map.

    Args:
      shared: one matrix for all layers, sliced (Launay 2020), instead of one per layer (Nokland 2016).
      buckets: for many outputs, such as a vocabulary: the columns of the shared matrix, at most one for each output,
        into which the outputs are hashed, each with a random sign (Weinberger 2009); None is a column for each output.
      distribution: an initializer ``(key, shape, dtype) -> B`` for shape ``(n, C)``. The defaults are the papers':
        uniform on +-1/sqrt(n) per layer; uniform on +-1 for the shared matrix, whose slices are divided by sqrt(n).
      scale: factor on the drawn matrix.

    Returns:
      A :class:`jaxfa.DirectRule`. With ``shared=True`` make one feedback, for the largest ``h``, and pass it to all.

    Raises:
      ValueError: if ``buckets`` is below 1, or given for matrices that are not shared.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> h, logits = jnp.ones((5, 8, 8, 4)), jnp.ones((5, 10))
      >>> jaxfa.dfa().init(jax.random.key(0), h, logits).b.shape
      (8, 8, 4, 10)

    Source: Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", 2016,
    https://arxiv.org/abs/1609.01596
    """
    if buckets is not None and (buckets < 1 or not shared):
        raise ValueError(f"buckets is a number from 1, of the columns of a shared matrix; got {buckets}, {shared=}.")
    draw = distribution or (_signed_uniform if shared else initializers.variance_scaling(1 / 3, "fan_in", "uniform"))

    def init(key: jax.Array, h: Any, logits: Any) -> DirectMatrix:
        return DirectMatrix(scale * direct_matrix(key, draw, h, logits))

    def init_shared(key: jax.Array, h: Any, logits: Any) -> SharedMatrix | HashedMatrix:
        k = shared_axes(h, logits)
        outputs = math.prod(logits.shape[k:])
        if buckets is None:
            return SharedMatrix(scale * direct_matrix(key, draw, h, logits).reshape(-1, outputs))
        b_key, sign_key = jax.random.split(key)
        columns = min(buckets, outputs)  # more would stay empty
        few = jax.ShapeDtypeStruct((*logits.shape[:k], columns), logits.dtype)
        b = scale * direct_matrix(b_key, draw, h, few).reshape(-1, columns)
        return HashedMatrix(b, jax.random.rademacher(sign_key, (outputs,), b.dtype))

    return DirectRule(init_shared if shared else init)


def _signed_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0)
