"""How a feedback's class becomes a pytree of its own."""

import dataclasses
import typing
from typing import Any, TypeVar

import jax

T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def feedback_dataclass(cls: type[T]) -> type[T]:
    """Class decorator: makes a feedback a frozen dataclass and a pytree of its fields.

    Args:
      cls: a subclass of :class:`jaxfa.LayerFeedback` or :class:`jaxfa.DirectFeedback` with annotated fields. Fields
        with ``metadata={"static": True}`` are part of the tree's structure.

    Example:
      >>> import jax, jaxfa
      >>> @jaxfa.feedback_dataclass
      ... class Scaled(jaxfa.LayerFeedback):
      ...     b: jax.Array
      >>> jax.tree.leaves(Scaled(1.0))
      [1.0]

    Source: JAX's documentation, "Custom pytree nodes", https://docs.jax.dev/en/latest/custom_pytrees.html
    """
    # By jax.tree_util.register_dataclass (JAX 0.10) two classes have equal structures if their static fields are: a
    # jitted function would at times run one rule's program on another's feedback.
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
