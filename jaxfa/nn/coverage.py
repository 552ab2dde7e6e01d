"""Lists every weight contraction of a model with how its error travels, read off the traced gradient."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import DictKey

from jaxfa.audit import OUTPUT, Audit, Use, audit
from jaxfa.base import is_direct
from jaxfa.follow import with_local_products
from jaxfa.nn.describe import LOST, feedback_of, layer_name, shape_of
from jaxfa.nn.program import Example, method_of
from jaxfa.nn.survey import Survey, survey
from jaxfa.nn.table import Coverage, Row
from jaxfa.nn.tap import Tap, plain_of
from jaxfa.nn.variables import Feedback, modules_of, split_arrays, structs, value_of
from jaxfa.paths import matches


def uses_of(model: nnx.Module, args: tuple[Any, ...]) -> dict[str, Use]:
    """The weight contractions of a model's forward pass, by the path of the layer that owns the weights."""
    return {layer_name(name): use for use in trace(model, args, {}).uses for name in sorted(use.weights)}


def trace(
    model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, skip: int = 0, local: bool = False
) -> Audit:
    """Audits a model's gradient.

    Args:
      model: the model.
      args: its positional arguments, or their shapes.
      kwargs: its keyword arguments, likewise.
      skip: how many segments of every path are left out of its names.
      local: whether to take products of parameters alone, such as a spectral norm, for a part of the weights.
    """
    graphdef, params, feedback, rest = nnx.split(model, nnx.Param, Feedback, ...)
    params, states = structs(params), structs((feedback, rest))
    arrays, rebuild = split_arrays((args, kwargs))

    def forward(params: Any, states: Any, arrays: Any) -> Any:
        args, kwargs = rebuild(arrays)
        return nnx.merge(graphdef, params, *states, copy=True)(*args, **kwargs)

    def own(path: Any, leaf: Any) -> str:
        return "/".join(_segments(path)[skip:]) if jnp.issubdtype(leaf.dtype, jnp.inexact) else ""

    def replaced(path: Any, _: Any) -> str:
        if _segments(path)[0] == "own" and skip:
            return model.own[int(_segments(path)[1])].path
        *owner, holder, _ = _segments(path)[skip:]
        return "" if holder == "feedback_tap" else "/".join([*owner, "kernel"])

    # State is named, too: weights that are frozen in a variable of another type carry errors all the same.
    names_of = jax.tree_util.tree_map_with_path
    names = (names_of(own, params), (names_of(replaced, states[0]), names_of(own, states[1])))
    forward = with_local_products(forward) if local else forward
    return audit(forward, params, states, structs(arrays), names=names)


def weights_above(model: nnx.Module, tapped: Any, source: str, args: tuple[Any, ...]) -> list[str]:
    """The weights through which the error comes to a rule's source: where a shift of its activation would be felt."""
    graphdef, state = nnx.split(model)
    arrays, rebuild = split_arrays(args)

    def forward(shift: jax.Array, state: Any, arrays: Any) -> Any:
        copy = nnx.merge(graphdef, state, copy=True)
        dict(modules_of(copy))[source].feedback_tap.shift = nnx.Variable(shift)
        return copy(*rebuild(arrays))

    def own(path: Any, leaf: Any) -> str:
        return "/".join(_segments(path)) if jnp.issubdtype(leaf.dtype, jnp.inexact) else ""

    states = structs(state)
    names = (source, jax.tree_util.tree_map_with_path(own, states))
    found = audit(forward, tapped, states, structs(arrays), names=names)
    return [step.name for step in found.arrivals[source] if step.kind == "weights"]


def cover(aligned: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coverage:
    """The table of an attached model for these inputs."""
    # Layer-wise rules are in the model itself; a direct one needs the wires that the root lays.
    model, skip = (aligned, 1) if is_direct(aligned.rule) or aligned.own else (aligned.model, 0)
    table = _Cover(aligned, trace(model, args, kwargs, skip=skip))
    if table.violations():  # then it is worth a closer look
        table = _Cover(aligned, trace(model, args, kwargs, skip=skip, local=True))
    if not table.hides():
        return table.table(None)
    model = plain_of(aligned.model) if is_direct(aligned.rule) else aligned.model
    return table.table(survey(model, method_of("__call__"), Example.of(args, kwargs)))


class _Cover:
    """Turns an audit into rows."""

    def __init__(self, aligned: Any, result: Audit) -> None:
        self.result, self.allow, self.own = result, aligned.allow, aligned.own
        self.left = {site.name for site in aligned.left}
        taps = [tap for _, tap in modules_of(aligned.model) if isinstance(tap, Tap)]
        self.blocks = [tap.path for tap in taps if not tap.at_input]
        self.inputs = [tap.path for tap in taps if tap.at_input]
        self.places = {tap.scope: f"{'input' if tap.at_input else 'output'} of {tap.path}" for tap in taps}
        self.taps = {tap.scope: tap.path for tap in taps}
        self.feedback = feedback_of(aligned)
        flat = nnx.to_flat_state(nnx.state(aligned.model, nnx.Not(Feedback)))
        self.shapes = {"/".join(map(str, path)): shape_of(value_of(leaf)) for path, leaf in flat}
        self.params = {"/".join(map(str, path)) for path, leaf in flat if isinstance(leaf, nnx.Param)}
        self.first = {name for use in result.uses if use.first for name in use.weights}
        # Of weights that are made of a parameter and other state, such as a mask, the parameter has the row.
        uses = [self.params & use.weights or use.weights for use in result.uses]
        self.names = list(dict.fromkeys(name for weights in uses for name in sorted(weights)))

    def matrices(self) -> list[str]:
        """The parameters that are matrices and in no contraction, nor the bias of a layer that is."""
        known = {name for use in self.result.uses for name in use.weights}
        layers = {layer_name(name) for name in known}
        rest = [name for name in self.params - known if name.rpartition("/")[0] not in layers]
        return [name for name in rest if self.axes(name) > 1]

    def axes(self, name: str, stack: int = 0) -> int:
        """How many axes a parameter has beside those of a stack."""
        return sum(size > 1 for size in self.shapes[name][stack:])

    def violations(self) -> list[str]:
        passed = sorted(step.name for step in self.result.passages if step.kind == "weights")
        impure = [self.impure(name) for name in self.result.arrivals]
        return list(filter(None, [*map(self.backpropagates, dict.fromkeys([*self.names, *passed])), *impure]))

    def hides(self) -> bool:
        """Whether there may be weights that data chooses: matrices in no contraction, or stacks in a first one."""
        stacks = [name for name in self.first & self.params if self.axes(name) > 2]
        return bool(self.matrices() or stacks)

    def table(self, seen: Survey | None) -> Coverage:
        """The table; with what the forward pass shows of weights that the gradient does not show."""
        rest: dict[str, str] = {}
        if seen is not None:
            matrices = [name for name in self.matrices() if self.axes(name, seen.stacks.get(name, 0)) > 1]
            rest = dict.fromkeys(matrices, "exact, entry by entry")
            rest |= dict.fromkeys(seen.tables & rest.keys(), "not needed: looked up")
        violations, lost = self.violations(), self.lost(seen, rest)
        for name in lost:
            block = self.block(name, name)
            rest[name] = f"exact inside {block}" if block else f"not followed{', allowed' if self.allows(name) else ''}"
            violations += [] if block or self.allows(name) else [LOST.format(layer_name(name))]
        rows = [self.row(name) for name in self.names]
        rows = [
            row._replace(leaves=rest[name]) if name in lost else row for name, row in zip(self.names, rows, strict=True)
        ]
        others = [name for name in rest if name not in self.names]
        rows += [
            Row(layer_name(name), self.shapes[name], self.arrives(name), rest[name], "") for name in sorted(others)
        ]
        return Coverage(tuple(rows), tuple(violations))

    def lost(self, seen: Survey | None, rest: Any) -> list[str]:
        """The weights that an error passes on its way down without anybody's seeing it in the gradient."""
        if seen is None:
            return []
        own = {one.site for one in self.own}
        chosen = {site.name for site in seen.sites if site not in own and (site.name in rest or not site.thin)}
        shown = {step.name for step in self.result.passages if step.kind == "weights"}
        return sorted((seen.lost | chosen) - shown)

    def row(self, name: str) -> Row:
        way = self.result.arrivals.get(name, frozenset())
        taps = [self.taps[step.name] for step in way if step.name in self.taps and step.kind == "direct"]
        # A direct feedback stands where it brings an error, a layer's own where it sends one on.
        feedback = " ".join(self.feedback.get(path, "") for path in (taps if self.taps else [layer_name(name)]))
        return Row(layer_name(name), self.shapes[name], self.arrives(name), self.leaves(name), feedback)

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
        return "not needed: input tapped" if layer_name(name) in self.inputs else "not needed"

    def allows(self, name: str) -> bool:
        return matches(name, self.allow, under=True)

    def victims(self, name: str) -> list[str]:
        """The parameters to which a parameter's weights send the error on."""
        ways = self.result.arrivals
        victims = [below for below in ways if ("weights", name) in ways[below] and not self.block(below, name)]
        return [below for below in victims if layer_name(below) != layer_name(name)]

    def backpropagates(self, name: str) -> str:
        victims = self.victims(name)
        beside = [use.weights & self.params for use in self.result.uses if name in use.weights - self.params]
        if not victims or self.allows(name) or any(set(victims) <= set(self.victims(w)) for ws in beside for w in ws):
            return ""
        others = " and others" if len(victims) > 3 else ""
        mend = "Name what is below it in at=, too" if self.taps else "Make it a layer that attach() takes"
        if name in self.left:
            mend = "at= leaves it out, or it is masked or chosen by data, where a rule needs a matrix, as fa() has"
        return (
            f"- {layer_name(name)!r} sends the error on to {', '.join(map(repr, victims[:3]))}{others} through its own "
            f"weights, which is backpropagation. {mend}, or allow={layer_name(name)!r}."
        )

    def impure(self, name: str) -> str:
        starts = self.starts(name)
        if len(starts) < 2 or self.allows(name):
            return ""
        return (
            f"- the error reaches {name!r} on {len(starts)} ways at once (from {', '.join(starts[:3])}), as when a "
            f"shortcut passes a tap by or a layer is used twice. Name whole blocks with at=, shortcut included, or "
            f"allow={layer_name(name)!r}."
        )


def _segments(path: Any) -> list[str]:
    return [str(key.key) for key in path if isinstance(key, DictKey)]


def _inside(name: str, block: str) -> bool:
    return name.startswith(f"{block}/")
