"""Lists every weight contraction of a model with how its error travels, read off the traced gradient."""

from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.tree_util import DictKey

from jaxfa.audit import Audit, Contraction, audit
from jaxfa.nn.contraction import Contraction as Contracted
from jaxfa.nn.contraction import find_site
from jaxfa.nn.tap import Tap
from jaxfa.nn.variables import Feedback, matches, modules_of, structs

# Their arrays of two axes are no contractions: a lookup table, or scales and offsets stacked by nnx.vmap.
_NO_CONTRACTION = (nnx.Embed, nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm)

_UNTRACED = "not traced: give example="
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


def contracted(model: nnx.Module, args: tuple[Any, ...]) -> dict[str, Contraction]:
    """The weight contractions of a model's forward pass, by the path of the layer that owns the weights."""
    found = trace(model, args).contractions
    return {_layer(name): contraction for contraction in found for name in sorted(contraction.weights)}


def trace(model: nnx.Module, args: tuple[Any, ...], *, skip: int = 0) -> Audit:
    """Audits a model's gradient. The first ``skip`` segments of every path are left out of its names."""
    graphdef, params, feedback, rest = nnx.split(model, nnx.Param, Feedback, ...)
    params, states = structs(params), structs((feedback, rest))

    def forward(params: Any, states: Any, args: Any) -> Any:
        return nnx.merge(graphdef, params, *states, copy=True)(*args)

    def own(path: Any, _: Any) -> str:
        return "/".join(_segments(path)[skip:])

    def replaced(path: Any, _: Any) -> str:
        *owner, holder, _ = _segments(path)[skip:]
        return "" if holder == "feedback_tap" else "/".join([*owner, "kernel"])

    names_of = jax.tree_util.tree_map_with_path
    names = (names_of(replaced, states[0]), jax.tree.map(lambda _: "", states[1]))
    return audit(forward, params, states, args, names=(names_of(own, params), names))


def cover(aligned: Any, args: tuple[Any, ...] | None, allow: tuple[str, ...]) -> Coverage:
    """The table of an attached model; without an example, of its layers as they stand, untraced."""
    if args is None:
        return _untraced(aligned.model, allow)
    return _Cover(aligned, trace(aligned, args, skip=1), allow).table()


class _Cover:
    """Turns an audit into rows."""

    def __init__(self, aligned: Any, result: Audit, allow: tuple[str, ...]) -> None:
        self.result, self.allow = result, allow
        taps = [tap for _, tap in modules_of(aligned.model) if isinstance(tap, Tap)]
        self.blocks = [tap.path for tap in taps if not tap.at_input]
        self.inputs = [tap.path for tap in taps if tap.at_input]
        self.places = {tap.scope: f"{'input' if tap.at_input else 'output'} of {tap.path}" for tap in taps}
        self.taps = {tap.scope: tap.path for tap in taps}
        self.feedback = _feedback_of(aligned.model)
        flat = nnx.to_flat_state(nnx.state(aligned.model, nnx.Param))
        self.shapes = {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in flat}
        self.first = {name for one in result.contractions if one.first for name in one.weights}

    def table(self) -> Coverage:
        names = dict.fromkeys(name for one in self.result.contractions for name in sorted(one.weights))
        impure = [self.impure(name) for name in self.result.arrivals]
        violations = [*map(self.backpropagates, names), *impure]
        return Coverage(tuple(map(self.row, names)), tuple(filter(None, violations)))

    def row(self, name: str) -> Row:
        way = self.result.arrivals[name]
        taps = [self.taps[step.name] for step in way if step.kind == "direct"]
        # A direct feedback stands where it brings an error, a layer's own where it sends one on.
        feedback = " ".join(self.feedback.get(path, "") for path in (taps if self.taps else [_layer(name)]))
        return Row(_layer(name), self.shapes[name], self.arrives(name), self.leaves(name), feedback)

    def block(self, below: str, above: str) -> str | None:
        """The tapped block that holds both parameters, inside which the backward is meant to be exact."""
        return next((path for path in self.blocks if _inside(below, path) and _inside(above, path)), None)

    def arrives(self, name: str) -> str:
        way = self.result.arrivals[name]
        taps = sorted(step.name for step in way if step.kind == "direct")
        own = [step.name for step in way if step.kind == "weights"]
        if not way:
            return "exact: last"
        text = f"direct, {' and '.join(self.places[tap] for tap in taps)}" if taps else "through feedback"
        if not taps and len(own) == len(way):
            return "backpropagation"
        if not own:
            return text
        block = self.block(name, own[0])
        return f"{text}, then exact inside {block}" if block else f"{text}, then backpropagation"

    def leaves(self, name: str) -> str:
        kinds = {step.kind for step in self.result.passages if step.name == name}
        if kinds == {"rule"}:
            return "through its feedback"
        if "weights" in kinds:
            block = self.block(name, name)
            return f"exact inside {block}" if block else "backpropagation"
        if name in self.first:
            return "not needed: first"
        return "not needed: input tapped" if _layer(name) in self.inputs else "not needed"

    def backpropagates(self, name: str) -> str:
        ways = self.result.arrivals
        victims = [below for below in ways if ("weights", name) in ways[below] and not self.block(below, name)]
        if victims and not matches(name, self.allow, under=True):
            others = " and others" if len(victims) > 3 else ""
            mend = "Name what is below it in at=, too" if self.taps else "Make it a Flax layer (without a mask)"
            return (
                f"- {_layer(name)!r} sends the error on to {', '.join(map(repr, victims[:3]))}{others} through its own "
                f"weights, which is backpropagation. {mend}, or allow={_layer(name)!r}."
            )
        return ""

    def impure(self, name: str) -> str:
        taps = sorted(self.places[step.name] for step in self.result.arrivals[name] if step.kind == "direct")
        if len(taps) > 1:
            return (
                f"- the error reaches {name!r} through {len(taps)} taps at once ({', '.join(taps[:3])}, ...), as when "
                f"a shortcut passes a tap by. Name whole blocks with at=, shortcut included."
            )
        return ""


def refuse_untraced(model: nnx.Module, allow: tuple[str, ...]) -> None:
    """The check without an example: every array of weights must belong to a layer that has the rule."""
    _untraced(model, allow).refuse()


def _untraced(model: nnx.Module, allow: tuple[str, ...]) -> Coverage:
    feedback = _feedback_of(model)
    rows, violations = [], []
    for path, module in sorted(modules_of(model), key=lambda item: item[0]):
        if isinstance(module, (Contracted, Tap, *_NO_CONTRACTION)):
            continue
        if find_site(module) is not None:
            shape = module.kernel.get_value().shape
            leaves = "through its feedback" if path in feedback else "backpropagation"
            rows.append(Row(path, shape, _UNTRACED, leaves, feedback.get(path, "")))
            if path not in feedback and not matches(path, allow, under=True):
                violations.append(f"- {path!r} has no feedback. Include it in at=, or allow={path!r}.")
            continue
        for name, value in vars(module).items():
            if isinstance(value, nnx.Param) and value.get_value().ndim > 1:
                own = f"{path}/{name}".lstrip("/")
                rows.append(Row(own, value.get_value().shape, _UNTRACED, "unknown", ""))
                if not matches(own, allow, under=True):
                    violations.append(f"- {own!r} is in no layer that jaxfa knows. Give example=, or allow={own!r}.")
    return Coverage(tuple(rows), tuple(violations))


def _feedback_of(model: nnx.Module) -> dict[str, str]:
    """The feedback of each layer or tap, in words."""
    parts = {module.path: module for _, module in modules_of(model) if isinstance(module, Contracted | Tap)}
    return {path: _describe(part.feedback.get_value()) for path, part in parts.items() if part.feedback is not None}


def _describe(feedback: Any) -> str:
    leaves = jax.tree.leaves(feedback)
    shapes = "".join(f" {leaf.shape}" for leaf in leaves if leaf.shape)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    unit, scale = next(unit for unit in _UNITS if size >= unit[1] or unit[1] == 1)
    return f"{type(feedback).__name__}{shapes} {size / scale:.3g} {unit}"


def _segments(path: Any) -> list[str]:
    return [str(key.key) for key in path if isinstance(key, DictKey)]


def _layer(name: str) -> str:
    return name.rpartition("/")[0] or name


def _inside(name: str, block: str) -> bool:
    return name.startswith(f"{block}/")
