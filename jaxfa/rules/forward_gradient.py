"""Forward gradients: a random direction, times how the loss changes along it, is the gradient without bias.

Baydin, Pearlmutter, Syme, Wood, Torr, "Gradients without Backpropagation", 2022, https://arxiv.org/abs/2202.08587,
which perturbs weights; activations, which have fewer dimensions, are perturbed in Ren, Kornblith, Liao, Hinton,
"Scaling Forward Gradient With Local Losses", 2023, https://arxiv.org/abs/2210.03310

With ``a_l`` the true error of one example at layer ``l``, of ``n_l`` units, and perturbations of independent entries of
variance 1 and kurtosis ``k`` (1 for random signs, 3 for normal draws), the error that an example gets has the mean
``a_l`` and, summed over its entries, the variance ``(n_l + k - 2) |a_l|^2 + n_l sum_m |a_m|^2`` over the other layers
``m``; with a derivative for each layer that sum is not there. The same holds for parameters, of ``n_l`` entries, and
their gradients ``a_l`` of the batch.

:func:`jaxfa.grape` is its linear regression on the output error: the matrix ``B`` that predicts ``p_l (y' . e)`` from
``e`` best, for errors that are independent of the perturbations, is ``<p_l y'^T>``, GrAPE's estimate of the Jacobian.
"""

from collections.abc import Callable
from dataclasses import field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxfa.base import DirectFeedback, DirectRule, Initializer, feedback_dataclass, is_feedback
from jaxfa.rules.shared.noise import random_signs
from jaxfa.rules.shared.projection import shared_axes
from jaxfa.rules.shared.redrawn import Redrawn, first_bytes, redraw
from jaxfa.varying import refuse_shards


@feedback_dataclass
class ForwardGradientFeedback(Redrawn, DirectFeedback):
    """A perturbation, drawn from a counter and never stored, and the output's derivative along all of them.

    Attributes:
      seed_bytes: the bytes of this layer's seed, ``(4,)``.
      step_bytes: the bytes of the number of updates so far, ``(4,)``.
      own: the layer's own axes, such as ``(H, W, n)``.
      outputs: how many axes the outputs of one example have.
      perturbation: draws it.
      separate: whether each layer has a derivative of its own.
      moved: the derivative ``y'``, as the logits; None in a feedback that is bound to no batch.
    """

    learns: ClassVar[str] = "drawn at every update"
    seed_bytes: jax.Array
    step_bytes: jax.Array
    own: tuple[int, ...] = field(metadata={"static": True})
    outputs: int = field(metadata={"static": True})
    perturbation: Initializer = field(metadata={"static": True})
    separate: bool = field(metadata={"static": True})
    moved: jax.Array | None = None

    def draw(self, logits: Any) -> jax.Array:
        """The perturbation for a batch of logits, the examples' axis first."""
        return self._drawn(logits, logits.shape[: logits.ndim - self.outputs])

    def _drawn(self, logits: Any, batch: tuple[int, ...]) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(self.seed), self.step)
        return self.perturbation(key, (*batch, *self.own), jnp.promote_types(logits.dtype, jnp.float32))

    def slope(self, e: jax.Array) -> jax.Array:
        """How the loss changes along all perturbations, by each example."""
        if self.moved is None or self.moved.shape != e.shape:
            raise ValueError(
                f"A forward gradient is of one batch and expects the derivative of its logits, of shape {e.shape}, got "
                f"{None if self.moved is None else self.moved.shape}. In each gradient take "
                f"feedback = rule.bind(forward, feedback) first, with forward(taps) -> logits of this batch."
            )
        return jnp.sum(self.moved * e, tuple(range(e.ndim - self.outputs, e.ndim)))

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        slope = self.slope(e)
        return self.draw(e) * slope.reshape(*slope.shape, *[1] * len(self.own))


@feedback_dataclass
class WeightPerturbation(ForwardGradientFeedback):
    """The same for a parameter, which is perturbed by one draw for all examples."""

    common: ClassVar[bool] = True

    def draw(self, logits: Any) -> jax.Array:
        """The perturbation, behind an axis of size 1 in the place of the examples'."""
        return self._drawn(logits, (1,))

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        return (self.draw(e) * self.slope(e).sum()).reshape(h.shape)


def forward_gradient(
    *, weights: bool = False, separate: bool = False, perturbation: Initializer = random_signs
) -> DirectRule:
    """Forward gradients: ``dh_l = p_l (y' . e)`` with ``y'`` the logits' derivative along random ``p_l``.

    Every example's activations are perturbed by draws of their own, all layers at once, and one forward-mode derivative
    of the plain network, on the very batch of the gradient, gives ``y'``. The mean over the draws is backpropagation's
    error; the variance grows with the number of units. What examples do to each other, as by batch normalisation in
    training mode, is left out.

    An attached model does all this in each gradient. Without Flax, ``rule.bind(forward, feedback)`` does, inside the
    loss. The draws are new after each update of :func:`jaxfa.optimizer`. Under a ``vmap`` over examples these share one
    draw.

    Args:
      weights: whether parameters are perturbed (Baydin 2022), by one draw for the whole batch, not activations
        (Ren 2023). For :func:`jaxfa.nn.attach`, by which every parameter then learns so, the last layer's, too.
      separate: one derivative for each layer, not one for all: ``L`` times the cost, less variance.
      perturbation: ``(key, shape, dtype) -> p``, of mean 0 and variance 1; the papers' is ``jax.random.normal``.

    Returns:
      A :class:`jaxfa.DirectRule`.

    Raises:
      ValueError: by the backward pass, if the feedback is bound to no batch, or to one of another shape; under
        ``shard_map`` over the batch, whose devices would share their draws; if the network has no forward mode.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> rule, h, w = jaxfa.forward_gradient(), jnp.ones((9999, 1)), jnp.full((1, 1), 3.0)
      >>> feedback = rule.bind(lambda taps: (h + taps[0]) @ w, [rule.init(jax.random.key(0), h, h)])
      >>> float(feedback[0].deliver(h, jnp.ones((9999, 1))).mean())
      3.0

    Source: Baydin et al., "Gradients without Backpropagation", 2022, https://arxiv.org/abs/2202.08587; Ren et al.,
    "Scaling Forward Gradient With Local Losses", 2023, https://arxiv.org/abs/2210.03310
    """

    def init(key: jax.Array, h: Any, logits: Any) -> ForwardGradientFeedback:
        if not weights:
            shared_axes(h, logits)  # refuses what has not the examples first
        kind = WeightPerturbation if weights else ForwardGradientFeedback
        return kind(*first_bytes(key), tuple(h.shape[1:]), len(logits.shape) - 1, perturbation, separate)

    return DirectRule(init, transform=redraw, bind=bind, parameters=weights)


def bind(forward: Callable[..., jax.Array], feedback: Any) -> Any:
    """The feedback of one batch: with the derivative of its logits along the perturbations.

    Args:
      forward: ``taps -> logits`` of the plain network, ``taps[l]`` added to what layer ``l``'s feedback is for.
      feedback: a tree of feedbacks that are bound to no batch, or to another.
    """
    refuse_shards(
        "forward_gradient draws for each example of an array, so that the devices would share their draws. Shard the "
        "arrays under jit instead."
    )
    nodes, structure = jax.tree.flatten(feedback, is_leaf=is_feedback)

    def run(taps: list[jax.Array]) -> jax.Array:
        return forward(jax.tree.unflatten(structure, taps))

    # One number for each layer of a stack: whatever the activations' shapes are, it can be added to them.
    stacks = [node.seed_bytes.shape[:-1] for node in nodes]
    logits = jax.eval_shape(run, [jnp.zeros(stack) for stack in stacks])
    tangents = [_draw(node, len(stack), logits) for node, stack in zip(nodes, stacks, strict=True)]
    zeros = [jnp.zeros_like(tangent) for tangent in tangents]

    if nodes[0].separate:
        found = [_slope(run, zeros, [*zeros[:i], tangent, *zeros[i + 1 :]]) for i, tangent in enumerate(tangents)]
    else:
        found = [_slope(run, zeros, tangents)] * len(nodes)
    nodes = [
        replace(node, moved=jnp.broadcast_to(y, (*stack, *y.shape)))
        for node, stack, y in zip(nodes, stacks, found, strict=True)
    ]
    return jax.tree.unflatten(structure, nodes)


def _draw(node: ForwardGradientFeedback, stack: int, logits: Any) -> jax.Array:
    return jax.vmap(lambda one: _draw(one, stack - 1, logits))(node) if stack else node.draw(logits)


def _slope(run: Callable[..., jax.Array], zeros: list[jax.Array], along: list[jax.Array]) -> jax.Array:
    """The derivative of the logits along perturbations."""
    try:
        return lax.stop_gradient(jax.jvp(run, (zeros,), (along,))[1])
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise ValueError(
            "forward_gradient takes a forward-mode derivative of the network, which a jax.custom_vjp function in it "
            "refuses: write that as a jax.custom_jvp, or take a rule that needs none, such as jaxfa.dfa()."
        ) from error
