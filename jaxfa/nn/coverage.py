"""Lists every weight contraction of a model with how its error travels, read off the traced gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfa.audit import OUTPUT, Audit
from jaxfa.nn.contraction import Contraction
from jaxfa.nn.program import Example
from jaxfa.nn.tap import Tap, plain_of, taps_of
from jaxfa.nn.taps import record_taps
from jaxfa.nn.trace import layer_of_name, trace, traced
from jaxfa.nn.variables import Feedback, modules_of, value_of
from jaxfa.paths import matches
from jaxfa.svd import is_factors

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


class Row(NamedTuple):
    """One contraction with weights.

    Attributes:
      layer: the path of the layer.
      shape: the weights' shape.
      arrives: how the error gets to its output.
      leaves: how the error goes on to what is below.
      feedback: the feedback's class and size, where it has one.
    """

    layer: str
    shape: tuple[int, ...]
    arrives: str
    leaves: str
    feedback: str


class Coverage(NamedTuple):
    """A printable table.

    Attributes:
      rows: a :class:`Row` for each weight contraction, in the order of the forward pass.
      violations: a sentence for each contraction that would stay backpropagation although nobody allowed it.
    """

    rows: tuple[Row, ...]
    violations: tuple[str, ...]

    def refuse(self) -> None:
        """Raises a ``ValueError`` if there are violations."""
        if self.violations:
            head = "This model would not learn by the rule alone."
            raise ValueError("\n".join([head, *self.violations, "", str(self)]))

    def __str__(self) -> str:
        """The table as text."""
        head = ("layer", "weights", "error arrives", "error leaves", "feedback")
        lines = [head, *((row.layer, str(row.shape), row.arrives, row.leaves, row.feedback) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = (map(str.ljust, line, widths) for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in padded)


def cover(aligned: Any, example: Example) -> Coverage:
    """The table of an attached model for these inputs."""
    return _Cover(aligned, traced(aligned, example), example).table()


class _Cover:
    """Turns an audit into rows."""

    def __init__(self, aligned: Any, result: Audit, example: Example) -> None:
        self.aligned, self.result, self.allow, self.example = aligned, result, aligned.allow, example
        taps = taps_of(aligned.model).values()
        self.blocks = [tap.path for tap in taps if not tap.at_input]
        self.inputs = [tap.path for tap in taps if tap.at_input]
        self.delivering = [tap.path for tap in taps if tap.feedback is not None]
        self.taps = {tap.scope(leaf): tap.path for tap in taps for leaf in tap.leaves}
        self.places = {tap.scope(leaf): _place(tap, leaf) for tap in taps for leaf in tap.leaves}
        self.feedback = _feedback_of(aligned.model)
        flat = nnx.to_flat_state(nnx.state(aligned.model, nnx.Not(Feedback)))
        self.shapes = {"/".join(map(str, path)): _shape(value_of(leaf)) for path, leaf in flat}
        self.params = {"/".join(map(str, path)) for path, leaf in flat if isinstance(leaf, nnx.Param)}
        self.first = {name for use in result.uses if use.first for name in use.weights}

    def table(self) -> Coverage:
        names = dict.fromkeys(name for use in self.result.uses for name in sorted(use.weights))
        carriers = names | dict.fromkeys(sorted(step.name for step in self.result.passages if step.kind == "weights"))
        impure = [self.impure(name) for name in self.result.arrivals]
        violations = [*map(self.backpropagates, carriers), *impure, *self.lost(names)]
        return Coverage(tuple(map(self.row, names)), tuple(filter(None, violations)))

    def row(self, name: str) -> Row:
        way = self.result.arrivals.get(name, frozenset())
        taps = [self.taps[step.name] for step in way if step.name in self.taps and step.kind == "direct"]
        # A direct feedback stands where it brings an error, a layer's own where it sends one on.
        holders = dict.fromkeys(taps) if self.taps else [layer_of_name(name)]
        feedback = " ".join(self.feedback.get(path, "") for path in holders)
        return Row(layer_of_name(name), self.shapes[name], self.arrives(name), self.leaves(name), feedback)

    def block(self, below: str, above: str) -> str | None:
        """The tapped block that holds both parameters, inside which the backward is meant to be exact."""
        return next((path for path in self.blocks if _inside(below, path) and _inside(above, path)), None)

    def starts(self, name: str) -> list[str]:
        """Where a parameter's error sets out: from the output, or from taps."""
        way = self.result.arrivals.get(name, frozenset())
        taps = (f"direct, {self.places.get(step.name, 'by the model itself')}" for step in way if step.kind == "direct")
        return (["the output"] if OUTPUT in way else []) + sorted(taps)

    def arrives(self, name: str) -> str:
        way, starts = self.result.arrivals.get(name, frozenset()), self.starts(name)
        own = [step.name for step in way if step.kind == "weights"]
        kinds = {step.kind for step in way} - {"weights"}
        if kinds <= {"output"}:
            return "none: does not learn" if not starts else "backpropagation" if own else "exact: last"
        text = "through feedback" if "rule" in kinds else " and ".join(starts)
        if not own:
            return text
        block = self.block(name, own[0])
        return f"{text}, then exact inside {block}" if block else f"{text}, then backpropagation"

    def leaves(self, name: str) -> str:
        if name in self.first:
            return "not needed: first"
        kinds = {step.kind for step in self.result.passages if step.name == name}
        if kinds == {"rule"}:
            return "through its feedback"
        if "weights" in kinds:
            block = self.block(name, name)
            return f"exact inside {block}" if block else f"backpropagation{', allowed' if self.allows(name) else ''}"
        return "not needed: input tapped" if layer_of_name(name) in self.inputs else "not needed"

    def allows(self, name: str) -> bool:
        return matches(name, self.allow, under=True)

    def backpropagates(self, name: str) -> str:
        ways = self.result.arrivals
        victims = [below for below in ways if ("weights", name) in ways[below] and not self.block(below, name)]
        victims = [
            below for below in victims if layer_of_name(below) != layer_of_name(name) and not self.is_atop(below)
        ]
        if not victims or self.allows(name):
            return ""
        others = " and others" if len(victims) > 3 else ""
        mend = "Name what is below it in at=, too" if self.taps else "Make it a layer that attach() takes, unmasked"
        return (
            f"- {layer!r} sends the error on to {', '.join(map(repr, victims[:3]))}{others} through its own "
            f"weights, which is backpropagation. {mend}, or allow={layer!r}."
        )

    def is_atop(self, name: str) -> bool:
        """Whether a parameter is above all taps and of no contraction, as a norm's: it learns exactly there."""
        contracting = {_owner(used) for use in self.result.uses for used in use.weights}
        return bool(self.taps) and self.starts(name) == ["the output"] and _owner(name) not in contracting

    def impure(self, name: str) -> str:
        starts = self.starts(name)
        if len(starts) < 2 or self.allows(name):
            return ""
        return (
            f"- the error reaches {name!r} on {len(starts)} ways at once (from {', '.join(starts[:3])}), as when a "
            f"shortcut passes a tap by or a layer is used twice. Name whole blocks with at=, shortcut included, or "
            f"allow={layer_of_name(name)!r}."
        )

    def lost(self, names: Any) -> list[str]:
        """Sentences for the taps and weights in use that no error reaches, though one would without the rule."""
        delivered = {self.taps[step.name] for step in self.result.passages if step.name in self.taps}
        silent = [path for path in self.delivering if path not in delivered]
        idle = [name for name in names if name in self.params and not self.result.arrivals[name]]
        idle = [name for name in idle if not self.allows(name)]
        if silent:
            seen = record_taps(self.aligned.model, self.aligned.method, self.example)
            silent = [path for path in silent if path in seen and not matches(path, self.allow, under=True)]
        if idle:
            true = trace(plain_of(self.aligned.model), self.aligned.method, self.example).arrivals
            idle = [name for name in idle if true.get(name)]
        return [_SILENT.format(path) for path in silent] + [_IDLE.format(layer_of_name(name)) for name in idle]


_SILENT = (
    "- the tap {0!r} gets no error: nothing differentiable is between it and the output (stop_gradient, sign, round, "
    "an integer). Tap what comes after that, give it a surrogate derivative, or allow={0!r} if it shall not learn."
)
_IDLE = (
    "- no error reaches {0!r}, which would learn by backpropagation. Name another module with at=, or allow={0!r} if "
    "it is meant not to learn."
)


def _place(tap: Tap, leaf: str) -> str:
    return f"{'input' if tap.at_input else 'output'} {leaf + ' ' if leaf else ''}of {tap.path}"


def _feedback_of(model: nnx.Module) -> dict[str, str]:
    """The feedback of each layer or tap, in words."""
    parts = {module.path: module for _, module in modules_of(model) if isinstance(module, Contraction | Tap)}
    return {path: _describe(part.feedback.get_value()) for path, part in parts.items() if part.feedback is not None}


def _describe(feedback: Any) -> str:
    leaves = jax.tree.leaves(feedback)
    shapes = "".join(f" {leaf.shape}" for leaf in leaves if leaf.shape)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    unit, scale = next(unit for unit in _UNITS if size >= unit[1] or unit[1] == 1)
    return f"{type(feedback).__name__}{shapes} {size / scale:.3g} {unit}"


def _shape(value: Any) -> tuple[int, ...]:
    return value.shape if is_factors(value) else jnp.shape(value)


def _owner(name: str) -> str:
    return name.rpartition("/")[0]


def _inside(name: str, block: str) -> bool:
    return name.startswith(f"{block}/")
