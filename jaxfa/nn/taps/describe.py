"""What a table says in words."""

from typing import Any

import jax

from jaxfa.nn.model.variables import modules_of
from jaxfa.nn.taps.tap import Tap
from jaxfa.nn.weights.contraction import Contraction
from jaxfa.nn.weights.survey import own_of

LOST = (
    "- {0!r} is contracted with an activation in a way that cannot be followed, as weights that data scales or chooses "
    "and sums written out are, so that an error may go on through it by backpropagation. Write it as one contraction, "
    "such as jnp.einsum, of the parameter with the activation, or allow={0!r}."
)
SILENT = (
    "- the tap {0!r} gets no error: nothing differentiable is between it and the output (stop_gradient, sign, round, "
    "an integer). Tap what comes after that, give it a surrogate derivative, or allow={0!r} if it shall not learn."
)
IDLE = (
    "- no error reaches {0!r}, which would learn by backpropagation. Name another module with at=, or allow={0!r} if "
    "it is meant not to learn."
)
NOTHING = "none: does not learn"
EMPTY = (
    "- nothing here would learn by this rule: no product with weights leads to an output of floats. Return the logits "
    "rather than classes chosen from them, and attach to a model that has layers."
)
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def held_feedback(attached: Any) -> dict[str, list[Any]]:
    """The feedback of each layer or tap; several where a parameter is contracted in several ways."""
    parts = [module for _, module in modules_of(attached.model) if isinstance(module, Contraction | Tap)]
    found: dict[str, list[Any]] = {}
    for part in (*parts, *own_of(attached)):
        if part.feedback is not None:
            value = part.feedback.get_value()  # where a tap is at several arrays, a dictionary of one for each
            found.setdefault(layer_name(part.path), []).extend(value.values() if isinstance(value, dict) else [value])
    return found


def describe(feedback: Any) -> str:
    """A feedback's class, shapes and size."""
    leaves = jax.tree.leaves(feedback)
    shapes = [f" {leaf.shape}" for leaf in leaves if leaf.shape]
    shapes = shapes if len(shapes) <= 6 else [f" of {len(shapes)} arrays,"]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    unit, scale = next(unit for unit in _UNITS if size >= unit[1] or unit[1] == 1)
    return f"{type(feedback).__name__}{''.join(shapes)} {size / scale:.3g} {unit}"


def layer_name(name: str) -> str:
    """The layer that a parameter stands for: what holds a kernel, else the parameter itself."""
    return name.removesuffix("/kernel")


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a parameter, or of the weights that factors stand for."""
    return getattr(value, "shape", ())
