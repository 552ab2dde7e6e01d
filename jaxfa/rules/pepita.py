"""PEPITA: a second forward pass, on an input that the error changes; layers learn from what it changes in them.

Dellaferrera, Kreiman, "Error-driven Input Modulation: Solving the Credit Assignment Problem without a Backward Pass",
2022, https://arxiv.org/abs/2201.11665; the mirrored projection is after Srinivasan, Mignacco, Sorbaro, Refinetti,
Cooper, Kreiman, Dellaferrera, "Forward Learning with Top-Down Feedback: Empirical and Analytical Characterization",
2023, https://arxiv.org/abs/2302.05440

With ``h_l`` the activities of the first pass and ``h_l'`` those of the second, on ``x' = x + F e`` and with the same
dropout, ``dW_l = (h_l - h_l') h_{l-1}'^T``, ``dW_1 = (h_1 - h_1') x'^T``, and for the last layer ``e h_{L-1}'^T`` with
the first pass's error, as the paper has it (its code for dense networks takes the second's). No derivative of the
activation function is in it: what reaches a layer's output, before that function, is the difference after it.
"""

import math
from collections.abc import Callable
from dataclasses import field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers

from jaxfa.base import DirectFeedback, DirectRule, Initializer, feedback_dataclass, keep
from jaxfa.ops import DIFFERENCE, MODULATED, backward_alone
from jaxfa.rules.shared.projection import direct_matrix, project, shared_axes
from jaxfa.varying import refuse_shards, vary_alike

Activation = Callable[[jax.Array], jax.Array]
Run = Callable[[Any, jax.Array, Activation], jax.Array]
TOKENS = (
    "pepita adds the error's projection to the input, which must be of floats, got {0}. For tokens, modulate what "
    "embeds them: pepita(modulate='embed') with the path of that module; without Flax, let x be the embedded tokens."
)


@feedback_dataclass
class InputModulation(DirectFeedback):
    """The projection ``F`` of the error to the input.

    Attributes:
      b: the input's own axes, then the outputs', such as ``(n, C)`` or ``(H, W, n, C)``.
      examples: how many the loss averages over; None is as many as the error has.
      activation: as for :func:`pepita`.
      outputs: how many axes the outputs of one example have.
    """

    b: jax.Array
    examples: float | None = field(metadata={"static": True})
    activation: Activation = field(metadata={"static": True})
    outputs: int = field(metadata={"static": True})

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        return project(self.b, h, e * _examples(self.examples, h, e))

    def modulate(self, x: jax.Array, e: jax.Array) -> jax.Array:
        """The second pass's input."""
        with jax.named_scope(MODULATED):
            return lax.stop_gradient(x + self.deliver(x, e).astype(x.dtype))


@feedback_dataclass
class ActivityDifference(DirectFeedback):
    """What a layer learns from: how the second pass differs from the first; it has no arrays."""

    examples: float | None = field(metadata={"static": True})
    activation: Activation = field(metadata={"static": True})

    def difference(self, first: jax.Array, second: jax.Array, e: jax.Array) -> jax.Array:
        """The error at a layer's output, from that output in both passes."""
        with jax.named_scope(DIFFERENCE):
            apart = self.activation(first) - self.activation(second)
            return lax.stop_gradient(apart / _examples(self.examples, first, e))


def _examples(examples: float | None, h: jax.Array, e: jax.Array) -> float:
    if examples is None:
        refuse_shards(
            "pepita needs to know by what the loss is divided. Say pepita(examples=...), how many the loss averages "
            "over: those of all devices if it is summed or averaged over them, those of one if the gradients are; or "
            "shard the arrays under jit instead."
        )
        return math.prod(e.shape[: shared_axes(h, e)])
    return examples


def pepita(
    *,
    activation: Activation = jax.nn.relu,
    modulate: str = "",
    mirror: float | None = None,
    examples: float | None = None,
    distribution: Initializer | None = None,
    scale: float = 0.05,
) -> DirectRule:
    """PEPITA: ``dW_l = (h_l - h_l') h_{l-1}'^T / N``, with ``h'`` of a second pass on ``x' = x + F e``.

    Where the loss is the mean over ``N`` examples, ``e`` is what one example's own loss would give. The second pass
    runs in the backward pass, on any batch. A sum that is taken for a mean can't be told: it makes ``F`` larger. With
    :func:`jaxfa.nn.attach` each layer but the last is tapped before its activation function, at its output or the norm
    behind that; :func:`jaxfa.rules.modulated` is for networks without Flax.

    Args:
      activation: the model's activation function, or the identity for ``at=`` that names modules which end in it.
      modulate: the path of the module whose output is modulated; by default the model's first input is.
      mirror: how far ``F`` turns, in each ``refine``, to minus the Jacobian's mean over the batch, as noise at the
        input shows it in the outputs; its norm stays. (Srinivasan 2023 mirror layer by layer.) None leaves it fixed.
      examples: ``N``, by which the loss divides its sum over the examples, or tokens: 1 for a sum; None is the number
        in the array. Must be given under ``shard_map``.
      distribution: an initializer ``(key, shape, dtype) -> F``; by default uniform on +-sqrt(6 / n) (He's).
      scale: factor on the drawn matrix, the paper's.

    Returns:
      A :class:`jaxfa.DirectRule`; with ``mirror`` its ``refine`` must run to learn.

    Raises:
      ValueError: if ``examples`` is not positive or ``mirror`` not in (0, 1]; by ``attach``, if the input is not of
        floats, such as tokens, or a tap is in a transformation, such as a scanned stack, or at the logits.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> x, e = jnp.ones((1, 4)), jnp.array([[0.1, -0.3]])
      >>> feedback = jaxfa.pepita().init(jax.random.key(0), x, e)
      >>> bool(jnp.allclose(feedback.modulate(x, e), x + e @ feedback.b.T))
      True

    Source: Dellaferrera, Kreiman, "Error-driven Input Modulation", 2022, https://arxiv.org/abs/2201.11665; Srinivasan
    et al., "Forward Learning with Top-Down Feedback", 2023, https://arxiv.org/abs/2302.05440
    """
    if examples is not None and not examples > 0:
        raise ValueError(f"pepita needs examples > 0, how many the loss averages over, or None; got {examples}.")
    if mirror is not None and not 0 < mirror <= 1:
        raise ValueError(f"pepita needs mirror in (0, 1], or None for a fixed projection; got {mirror}.")
    draw = distribution or initializers.he_uniform()

    def init(key: jax.Array, h: Any, logits: Any, path: str = modulate) -> DirectFeedback:
        if path != modulate:
            return ActivityDifference(examples, activation)
        outputs = len(logits.shape) - shared_axes(h, logits)
        return InputModulation(scale * direct_matrix(key, draw, h, logits), examples, activation, outputs)

    def refine(forward: Any, feedback: Any, key: jax.Array) -> Any:
        nodes, structure = jax.tree.flatten(feedback, is_leaf=lambda node: isinstance(node, DirectFeedback))
        (place,) = (i for i, node in enumerate(nodes) if isinstance(node, InputModulation))

        def run(noise: jax.Array) -> jax.Array:
            zero = jnp.zeros((), noise.dtype)
            return forward(jax.tree.unflatten(structure, [noise if i == place else zero for i in range(len(nodes))]))

        nodes[place] = _mirrored(nodes[place], run, mirror, key)
        return jax.tree.unflatten(structure, nodes)

    return DirectRule(init, keep if mirror is None else refine, modulate=modulate)


def modulated(run: Run, params: Any, x: jax.Array, feedback: InputModulation | None) -> jax.Array:
    """The logits of a network without Flax, which learns by :func:`jaxfa.pepita`.

    Args:
      run: ``(params, x, tap) -> logits``; it hands what each hidden layer gives, before its activation function, to
        ``tap``, which returns it, calls that from no transformation, such as a scan, and closes over no traced value.
      params: what learns.
      x: the input, ``(N, ..., n)``.
      feedback: made by ``rule.init(key, x, logits)``; None is ordinary autodiff.

    Raises:
      ValueError: if the input is not of floats.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> x, params = jnp.ones((5, 4)), [jnp.ones((4, 3)), jnp.ones((3, 2))]
      >>> def run(params, x, tap):
      ...     return jax.nn.relu(tap(x @ params[0])) @ params[1]
      >>> feedback = jaxfa.pepita().init(jax.random.key(0), x, jnp.ones((5, 2)))
      >>> jax.grad(lambda params: jaxfa.rules.modulated(run, params, x, feedback).mean())(params)[0].shape
      (4, 3)

    Source: as :func:`jaxfa.pepita`.
    """
    if feedback is None:
        return run(params, x, lambda y: y)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(TOKENS.format(x.dtype))
    with backward_alone():
        return _modulated(run, *vary_alike((params, x, feedback)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _modulated(run: Run, params: Any, x: jax.Array, feedback: InputModulation) -> jax.Array:
    return run(params, x, lambda y: y)


def _first_pass(run: Run, params: Any, x: jax.Array, feedback: InputModulation) -> tuple[jax.Array, Any]:
    seen: list[jax.Array] = []

    def keep(y: jax.Array) -> jax.Array:
        seen.append(y)
        return y

    return run(params, x, keep), (params, x, feedback, seen)


def _second_pass(run: Run, residuals: Any, e: jax.Array) -> Any:
    params, x, feedback, seen = residuals
    layer, first = ActivityDifference(feedback.examples, feedback.activation), iter(seen)

    def learned(params: Any) -> jax.Array:
        products = []

        def tap(y: jax.Array) -> jax.Array:
            products.append(jnp.vdot(layer.difference(next(first), y, e), y))
            return lax.stop_gradient(y)

        logits = run(params, feedback.modulate(x, e), tap)
        return sum(products, jnp.vdot(e, logits))

    return jax.grad(learned)(params), *jax.tree.map(jnp.zeros_like, (x, feedback))


_modulated.defvjp(_first_pass, _second_pass)


def _mirrored(feedback: InputModulation, run: Any, rate: Any, key: jax.Array) -> InputModulation:
    refuse_shards("pepita's mirror is a mean over the whole batch. Call refine outside, on arrays sharded under jit.")
    b, logits = feedback.b, jax.eval_shape(run, jnp.zeros((), feedback.b.dtype))
    batch = logits.shape[: logits.ndim - feedback.outputs]
    noise = jax.random.normal(key, (*batch, *b.shape[: b.ndim - feedback.outputs]), b.dtype)
    moved = jax.jvp(run, (jnp.zeros_like(noise),), (noise,))[1].astype(b.dtype)
    over = tuple(range(len(batch)))
    seen = jnp.tensordot(noise, moved, (over, over)) / math.prod(batch)
    norm = jnp.linalg.norm(b.ravel())
    turned = (1 - rate) * b - rate * seen * _ratio(norm, seen)
    return replace(feedback, b=turned * _ratio(norm, turned))


def _ratio(norm: jax.Array, array: jax.Array) -> jax.Array:
    size = jnp.linalg.norm(array.ravel())
    return jnp.where(size > 0, norm / jnp.where(size > 0, size, 1), 0)
