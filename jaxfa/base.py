"""The glossary: the symbols, their shapes, and the contract that every rule meets.

Symbols, used everywhere. ``N`` examples, ``n`` units below, ``m`` units above, ``C`` outputs.

=========  ====================  =====================================================
symbol     shape                 meaning
=========  ====================  =====================================================
``x, h``   ``(N, ..., n)``       a layer's input; an activation after its nonlinearity
``w``      ``(n, m)`` or HWIO    a layer's weights; ``y = op(x, w)`` is linear in each
``b``      as ``w``, or (n, C)   feedback weights
``q, p``   ``(n, r), (m, r)``    the thin factors of a low-rank ``b = q p^T``
``e``      ``(N, ..., C)``       the output error, the loss's gradient in the logits
``delta``  ``(N, ..., m)``       the error that has arrived at a layer's output
=========  ====================  =====================================================

A rule is a value, a :class:`LayerRule` (errors go back layer by layer) or a :class:`DirectRule` (straight from the
output). Its feedback is a :func:`feedback_dataclass`, whose class says how an error goes back. ``None`` in place of a
feedback means the plain operation with ordinary autodiff.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax

from jaxfa.pytree import feedback_dataclass

Operation = Callable[[jax.Array, Any], jax.Array]
Initializer = Callable[..., jax.Array]
# The mesh axis along which jaxfa itself lays out layers: every device along it has the whole batch.
LAYER = "layer"


class LayerFeedback:
    """How an error goes back through one contraction ``y = op(x, w)``.

    Most rules only say which matrix takes the place of ``w``; one without such a matrix overrides ``transport``. A rule
    that learns its feedback from the batch overrides ``signal``.
    """

    # How it learns, in words, where ``signal`` and the rule do not tell.
    learns: ClassVar[str] = ""

    def matrix(self, w: Any) -> Any:
        """The array of ``w``'s shape through which the error returns."""
        raise NotImplementedError(f"{type(self).__name__} must define matrix(w), or transport(op, x, w, delta).")

    def transport(self, op: Operation, x: jax.Array, w: jax.Array, delta: jax.Array) -> jax.Array:
        """The error below the layer, of ``x``'s shape; only the shape and dtype of ``x`` may be used."""
        b = self.matrix(w).astype(w.dtype)
        if b.shape != w.shape:
            raise ValueError(
                f"{type(self).__name__} has a matrix of shape {b.shape} for weights of shape {w.shape}. Make it with "
                f"rule.init(key, w) from these weights."
            )
        return transpose(lambda x: op(x, b), x, delta)

    def signal(self, x: jax.Array, w: jax.Array, delta: jax.Array, dw: jax.Array) -> Self:
        """What the batch tells the feedback, in the place of its gradient; zeros for a fixed one.

        Only terms that depend on the batch: cotangents are summed over uses, so that a decay would count once per use.
        """
        return jax.tree.map(jnp.zeros_like, self)

    def learn(
        self, op: Operation, x: jax.Array, w: jax.Array, delta: jax.Array, dw: jax.Array
    ) -> tuple[jax.Array, Self]:
        """Both; overridden beside ``signal``, which tells the same, where the operation makes that cheaper."""
        return self.transport(op, x, w, delta), self.signal(x, w, delta, dw)


@feedback_dataclass
class FixedFeedback(LayerFeedback):
    """A matrix ``b`` of ``w``'s shape in the place of the weights, on which the batch has no effect."""

    b: jax.Array

    def matrix(self, w: jax.Array) -> jax.Array:
        return self.b


class DirectFeedback:
    """How the output error ``e`` reaches one activation ``h`` directly."""

    # True: one feedback, made for the largest activation, serves every layer.
    shared: ClassVar[bool] = False
    # True: it is given a parameter as it is, not once for each example.
    common: ClassVar[bool] = False
    # True: it brings the error of a loss of the activation's own, whatever comes after.
    local: ClassVar[bool] = False
    # ``(logits, e) -> `` what it is given in the place of the output error, such as targets; None is the error itself.
    reads: ClassVar[Any] = None
    learns: ClassVar[str] = ""

    @property
    def is_made_once(self) -> bool:
        """Whether layers share a product with the error that is smaller than ``e``: then none waits for another."""
        return False

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        """The error at ``h``, of its shape; but for local losses only the shape and dtype of ``h`` may be used."""
        raise NotImplementedError(f"{type(self).__name__} must define deliver(h, e).")

    def signal(self, h: jax.Array, e: jax.Array) -> Self:
        """What the batch tells the feedback, in the place of its gradient; zeros for a fixed one."""
        return jax.tree.map(jnp.zeros_like, self)

    def learn(self, h: jax.Array, e: jax.Array) -> tuple[jax.Array, Self]:
        """Both, for rules that compute them together."""
        return self.deliver(h, e), self.signal(h, e)


class Layer(NamedTuple):
    """One contraction ``y = op(x, w)`` as the forward pass runs it: what a layer-wise ``refine`` may look at."""

    op: Operation
    x: jax.ShapeDtypeStruct
    w: Any


def keep(forward: Any, feedback: Any, key: jax.Array) -> Any:
    """The ``refine`` of a rule that has none: the feedback as it is."""
    return feedback


class Alike(NamedTuple):
    """Weights and feedback learn alike: the parameters' own optimizer steps on both, and both decay with its steps.

    Attributes:
      name: the attribute of the feedback that learns so.
      weight_decay: how much of both decays in a step.
      shape: the shape of the weights that a feedback stands for, by ``(feedback)``; None where it stands for none.
      learning_rate: the rate of what else the feedback learns, by plain steps.
    """

    name: str
    weight_decay: float
    shape: Callable[[Any], tuple[int, ...]] | None = None
    learning_rate: float = 0.0


class Local(NamedTuple):
    """Weights learn from losses of their own layer, too, and feedback may learn by the parameters' own optimizer.

    Weights and the feedback's ``b`` belong together if they have the same ``name``.

    Attributes:
      is_weights: whether a node of a tree is such weights.
      gradient: what the optimizer is given for a parameter, by ``(g, w, b)``; ``b`` is None where it has none.
      step: what is made of the steps of all such weights, by ``(steps, weights)``, two lists.
      pull: the gradient of the feedback, by ``(b, w)``; None leaves it fixed.
      aligns: whether ``gradient`` is given ``b`` at all.
    """

    is_weights: Callable[[Any], bool]
    gradient: Callable[[Any, Any, Any], Any]
    step: Callable[[list[Any], list[Any]], list[Any]]
    pull: Callable[[Any, Any], Any] | None
    aligns: bool


@dataclasses.dataclass(frozen=True)
class Rule:
    """What all learning rules have. A rule is made as a :class:`LayerRule` or a :class:`DirectRule`.

    Attributes:
      init: makes one layer's feedback; if it returns None the layer is left to backpropagation. It is compiled, so that
        it may compute with values, but not branch on them. With a keyword ``path`` it is told the layer's path.
      refine: ``(forward, feedback, key) -> feedback`` on the whole tree of feedbacks, before the gradient step.
      transform: the optax transformation of the feedback's signals, run in the steps that move the parameters, or None;
        for a rule whose weights and feedback learn together, :class:`Alike`, :class:`Local`, or a function ``tx -> ``
        the transformation of the pair ``(params, feedback)``.
      globs: the globs of layer paths that the rule was given, of which none may match nothing.
      weights: ``(w, path) -> `` what a layer learns in the place of ``w``, such as its factors; None is ``w`` itself.
    """

    arguments: ClassVar[tuple[str, ...]] = ()
    init: Callable[..., Any]
    refine: Callable[..., Any] = keep
    transform: optax.GradientTransformation | Alike | Local | Callable[..., Any] | None = None
    globs: tuple[str, ...] = ()
    weights: Callable[[jax.Array, str], Any] | None = None

    def __post_init__(self) -> None:
        own = inspect.signature(self.init).parameters.values()
        given = [one.name for one in own if one.default is one.empty and one.kind < one.VAR_POSITIONAL]
        if len(given) != len(self.arguments):
            raise TypeError(
                f"{type(self).__name__}(init) expects init({', '.join(self.arguments)}), got one of "
                f"({', '.join(given)}). Make a LayerRule of init(key, w), a DirectRule of init(key, h, logits)."
            )


class LayerRule(Rule):
    """A rule that hands errors on layer by layer: ``init(key, w)`` makes a :class:`LayerFeedback`.

    The ``forward`` of its ``refine`` is a tree of :class:`Layer` shaped like the feedback.
    """

    arguments = ("key", "w")


class ForwardPass(NamedTuple):
    """A plain network's forward pass on one batch, as a direct rule's ``refine`` may look at it.

    Attributes:
      run: ``taps -> logits`` with ``taps[l]`` added to ``h_l``; the object is called as this is.
      moved: ``(key, noise) -> `` how each ``h_l`` moves, to first order, if the parameters since the taps before it
        move by their parts of one ``noise(key, shape, dtype)``, as a tree of the feedback's shape; None where they have
        no fewer entries than an example's ``h_l``; axes that the logits share count as examples.
    """

    run: Callable[[Any], jax.Array]
    moved: Callable[[jax.Array, Initializer], Any]

    def __call__(self, taps: Any) -> jax.Array:
        """The logits."""
        return self.run(taps)


@dataclasses.dataclass(frozen=True)
class DirectRule(Rule):
    """A rule that delivers the output error directly: ``init(key, h, logits)`` makes a :class:`DirectFeedback`.

    With a keyword ``layer``, ``init`` is told the :class:`Layer` that ``h`` enters; with ``above`` and ``below``, the
    tapped modules that come later, as :class:`Layer` of one array, and how many come before. Its ``refine`` is given
    ``forward``, the function ``taps -> logits`` of the plain network with ``taps[l]`` added to ``h_l``; of an attached
    model it is a :class:`ForwardPass`.

    Attributes:
      source: the path of the module where the error is taken, at its input without ``at=``, at its output with it;
        None is the logits.
      bind: ``(forward, feedback) -> feedback`` for one batch, in each pass that is differentiated; nothing of it is
        kept. ``forward`` is ``refine``'s. None for most.
      parameters: whether what is tapped is every parameter, not activations.
      modulate: where a second pass is modulated, from which layers learn: the path of a module, at its output; ``""``
        is the network's input. None for most.
    """

    arguments = ("key", "h", "logits")
    source: str | None = None
    bind: Callable[..., Any] | None = None
    parameters: bool = False
    modulate: str | None = None


def is_direct(rule: Rule) -> bool:
    """Whether the rule delivers the output error directly."""
    return isinstance(rule, DirectRule)


def is_layer(node: Any) -> bool:
    """Whether a node of a tree is a :class:`Layer`."""
    return isinstance(node, Layer)


def is_feedback(node: Any) -> bool:
    """Whether a node of a tree is a feedback."""
    return isinstance(node, LayerFeedback | DirectFeedback)


def transpose(linear: Callable[[jax.Array], jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """The transpose of a linear function of ``x``'s shape, applied to ``y``."""
    (out,) = jax.linear_transpose(linear, x)(y)
    return out
