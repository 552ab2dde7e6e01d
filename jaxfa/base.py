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
output). Its feedback is a small frozen dataclass, a pytree by :func:`register`, whose class says how an error goes
back: a subclass of :class:`LayerFeedback` or :class:`DirectFeedback`. ``None`` in place of a feedback means the plain
operation with ordinary autodiff.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import optax

T = TypeVar("T")
Operation = Callable[[jax.Array, Any], jax.Array]
Initializer = Callable[..., jax.Array]


@typing.runtime_checkable
class ThinWeights(typing.Protocol):
    """Weights that act as two thin ones of the layer's own kind, such as ``jaxfa.factored.Factors``."""

    shape: tuple[int, ...]
    ndim: int

    def kernels(self) -> tuple[jax.Array, jax.Array]:
        """The two, in the order in which an input meets them."""


class LayerFeedback:
    """How an error goes back through one contraction ``y = op(x, w)``.

    Most rules only say which matrix takes the place of ``w`` (:meth:`matrix`); one that has no such matrix, such as a
    low-rank rule, overrides :meth:`transport`. A rule that learns its feedback from the batch overrides :meth:`signal`.
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
        del x, w, delta, dw
        return jax.tree.map(jnp.zeros_like, self)


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def register(cls: type[T]) -> type[T]:
    """Class decorator: makes a feedback a frozen dataclass and a pytree of its fields.

    Fields with ``metadata={"static": True}`` are part of the tree's structure. This stands in the place of
    ``jax.tree_util.register_dataclass``, by which (in JAX 0.10) the structures of two classes are equal if their static
    fields are: a jitted function would then, at times, run the program of one rule on the feedback of another.

    Args:
      cls: a subclass of :class:`LayerFeedback` or :class:`DirectFeedback` with annotated fields.

    Returns:
      The class.

    Example:
      >>> import jax, jaxfa
      >>> @jaxfa.register
      ... class Scaled(jaxfa.LayerFeedback):
      ...     b: jax.Array
      ...     def matrix(self, w):
      ...         return self.b * abs(w).mean()
      >>> jax.tree.leaves(Scaled(1.0))
      [1.0]

    Source: JAX's documentation, "Custom pytree nodes", https://docs.jax.dev/en/latest/custom_pytrees.html
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    static = [field.name for field in dataclasses.fields(made) if field.metadata.get("static")]
    arrays = [field.name for field in dataclasses.fields(made) if field.name not in static]

    def flatten(node: T) -> tuple[Any, Any]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in arrays]
        return children, tuple(getattr(node, name) for name in static)

    def unflatten(meta: tuple[Any, ...], leaves: Any) -> T:
        return made(**dict(zip(static, meta, strict=True)), **dict(zip(arrays, leaves, strict=True)))

    jax.tree_util.register_pytree_with_keys(made, flatten, unflatten)
    return made


@register
class FixedFeedback(LayerFeedback):
    """A matrix in the place of the weights, on which the batch has no effect.

    Attributes:
      b: feedback weights, of ``w``'s shape.
    """

    b: jax.Array

    def matrix(self, w: jax.Array) -> jax.Array:
        del w
        return self.b


class DirectFeedback:
    """How the output error ``e`` reaches one activation ``h`` directly."""

    # True: one feedback, made for the largest activation, serves every layer.
    shared: ClassVar[bool] = False
    learns: ClassVar[str] = ""

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        """The error at ``h``, of its shape; only the shape and dtype of ``h`` may be used."""
        raise NotImplementedError(f"{type(self).__name__} must define deliver(h, e).")

    def signal(self, h: jax.Array, e: jax.Array) -> Self:
        """What the batch tells the feedback, in the place of its gradient; zeros for a fixed one."""
        del h, e
        return jax.tree.map(jnp.zeros_like, self)


class Layer(NamedTuple):
    """One contraction ``y = op(x, w)`` as the forward pass runs it: what a layer-wise ``refine`` may look at."""

    op: Operation
    x: jax.ShapeDtypeStruct
    w: Any


def keep(forward: Any, feedback: Any, key: jax.Array) -> Any:
    """The ``refine`` of a rule that has none: the feedback as it is."""
    del forward, key
    return feedback


@dataclasses.dataclass(frozen=True)
class Rule:
    """What all learning rules have. A rule is made as a :class:`LayerRule` or a :class:`DirectRule`.

    Attributes:
      init: makes one layer's feedback, from the arguments that the rule's class names. ``None`` in place of a feedback
        leaves the layer to backpropagation. An ``init`` with a keyword ``path`` is told the layer's path.
      refine: ``(forward, feedback, key) -> feedback`` on the whole tree of feedbacks, before the gradient step.
      transform: the optax transformation of the feedback's signals, run in the steps that move the parameters; None
        leaves the feedback as it is. For a rule whose weights and feedback learn together it is a function ``tx -> ``
        the transformation of the pair ``(params, feedback)``.
      globs: the globs of layer paths that the rule was given, of which none may match nothing.
      weights: ``(w, path) -> `` what a layer learns in the place of ``w``, such as its factors, which it may be given
        itself; None is ``w`` itself.
    """

    arguments: ClassVar[tuple[str, ...]] = ()
    init: Callable[..., Any]
    refine: Callable[..., Any] = keep
    transform: optax.GradientTransformation | Callable[..., Any] | None = None
    globs: tuple[str, ...] = ()
    weights: Callable[[jax.Array, str], Any] | None = None

    def __post_init__(self) -> None:
        if not self.arguments:
            raise TypeError(
                "A rule is a jaxfa.LayerRule, init(key, w), or a jaxfa.DirectRule, init(key, h, logits); got a Rule."
            )
        given = positional(self.init)
        if given is not None and len(given) != len(self.arguments):
            raise TypeError(
                f"The init of a jaxfa.{type(self).__name__} takes ({', '.join(self.arguments)}), got a function of "
                f"({', '.join(given)}). Make a LayerRule of init(key, w), a DirectRule of init(key, h, logits)."
            )


class LayerRule(Rule):
    """A rule that hands errors on layer by layer; its feedback is a :class:`LayerFeedback`.

    Its ``init`` is ``(key, w) -> feedback``. The ``forward`` of its ``refine`` is a tree of :class:`Layer` shaped like
    the feedback.
    """

    arguments = ("key", "w")


@dataclasses.dataclass(frozen=True)
class DirectRule(Rule):
    """A rule that delivers the output error straight to every layer; its feedback is a :class:`DirectFeedback`.

    Its ``init`` is ``(key, h, logits) -> feedback``, from arrays or ``jax.ShapeDtypeStruct``s of one batch; with a
    keyword ``layer`` it is told the :class:`Layer` that ``h`` enters. The ``forward`` of its ``refine`` is the function
    ``taps -> logits`` of the plain network with ``taps[l]`` added to ``h_l``.

    Attributes:
      source: where the error is taken: the path of a module, at the same end of it as the taps, its input without
        ``at=``, its output with it; None is the logits.
    """

    arguments = ("key", "h", "logits")
    source: str | None = None


def positional(function: Callable[..., Any]) -> list[str] | None:
    """The names of the arguments that a function must be given by position; None where that cannot be known."""
    try:
        known = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    if any(one.kind is one.VAR_POSITIONAL for one in known):
        return None
    return [one.name for one in known if one.default is one.empty and one.kind < one.VAR_POSITIONAL]


def is_direct(rule: Rule) -> bool:
    """Whether the rule delivers the output error directly."""
    return isinstance(rule, DirectRule)


def init_at(rule: Rule, **known: Any) -> Callable[..., Any]:
    """The rule's ``init`` with what it asks for, by keyword, of what is known of the layer; most ask for nothing."""
    asked = inspect.signature(rule.init).parameters
    return functools.partial(rule.init, **{name: value for name, value in known.items() if name in asked})


def is_layer(node: Any) -> bool:
    """Whether a node of a tree is a :class:`Layer`: the leaf test for what a layer-wise ``refine`` looks at."""
    return isinstance(node, Layer)


def is_feedback(node: Any) -> bool:
    """Whether a node of a tree is a feedback: the leaf test for trees that hold some."""
    return isinstance(node, LayerFeedback | DirectFeedback)


def matrix_of(feedback: Any, w: jax.Array) -> jax.Array:
    """The matrix that a layer-wise feedback puts in the place of weights.

    Raises:
      ValueError: if it has none, such as a direct or a low-rank one.
    """
    if isinstance(feedback, LayerFeedback) and type(feedback).matrix is not LayerFeedback.matrix:
        return feedback.matrix(w)
    raise ValueError(f"{type(feedback).__name__} has no matrix in the place of the weights {w.shape}.")


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


def transpose(linear: Callable[[jax.Array], jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """The transpose of a linear function of ``x``'s shape, applied to ``y``."""
    (out,) = jax.linear_transpose(linear, x)(y)
    return out
