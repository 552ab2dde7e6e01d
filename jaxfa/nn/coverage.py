"""Lists every weight contraction of a model with how its error travels, read off the traced gradient."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxfa.base import is_direct
from jaxfa.jaxprs.audit import Audit
from jaxfa.jaxprs.flows import OUTPUT, Passage
from jaxfa.nn.learning import how_it_learns
from jaxfa.nn.model.program import Example, method_of
from jaxfa.nn.model.variables import Feedback, value_of
from jaxfa.nn.table import Coverage, Row
from jaxfa.nn.taps.describe import EMPTY, IDLE, LOST, NOTHING, SILENT, describe, held_feedback, layer_name, shape_of
from jaxfa.nn.taps.places import places_of
from jaxfa.nn.taps.tap import plain_of, taps_of
from jaxfa.nn.taps.trace import terms_beside, trace, traced
from jaxfa.nn.weights.survey import Survey, own_of, survey
from jaxfa.paths import matches, path_name


def cover(attached: Any, example: Example, seen: Callable[[], Survey] | None = None) -> Coverage:
    """The table of an attached model for these inputs; ``seen`` looks through their forward pass, if it was traced."""
    result = traced(attached, example)
    table = _Cover(attached, result, example)
    if table.violations():  # then it is worth a closer look
        table = _Cover(attached, traced(attached, example, local=True), example)
    if not table.hides():
        return table.table(None)
    if seen:
        return table.table(seen())
    model = plain_of(attached.model) if is_direct(attached.rule) else attached.model
    return table.table(survey(model, method_of(attached.method), example))


class _Cover:
    """Turns an audit into rows."""

    def __init__(self, attached: Any, result: Audit, example: Example) -> None:
        self.attached, self.result, self.allow, self.example = attached, result, attached.allow, example
        self.own, self.left = own_of(attached), {site.name: site.thin for site in attached.left}
        taps = taps_of(attached.model).values()
        self.blocks = [tap.path for tap in taps if not tap.at_input]
        self.inputs = [tap.path for tap in taps if tap.at_input]
        modulated = attached.rule.modulate if is_direct(attached.rule) else None  # no error is delivered there
        self.delivering = [tap.path for tap in taps if tap.feedback is not None and tap.path != modulated]
        self.taps = {tap.scope(leaf): tap.path for tap in taps for leaf in tap.leaves}
        self.places = {tap.scope(leaf): tap.place.describe(leaf) for tap in taps for leaf in tap.leaves}
        self.ends = {tap.path: tap.place.describe("") for tap in taps}
        held = held_feedback(attached)
        self.feedback = {path: ", ".join(map(describe, parts)) for path, parts in held.items()}
        self.learns = {path: how_it_learns(attached.rule, parts[0]) for path, parts in held.items()}
        flat = nnx.to_flat_state(nnx.state(attached.model, nnx.Not(Feedback)))
        self.shapes = {path_name(path): shape_of(value_of(leaf)) for path, leaf in flat}
        self.params = {path_name(path) for path, leaf in flat if isinstance(leaf, nnx.Param)}
        # The gradient of numbers that a model writes or returns beside its logits ends where a tap is.
        terms = terms_beside(attached, example) if self.delivering and result.beside else set()
        self.stopped = {name for name in terms if not result.beside[name]}
        self.contracting = {_owner(name) for use in result.uses for name in use.weights}
        self.first = {name for use in result.uses if use.first for name in use.weights}
        # Where weights are made of a parameter and other state, such as a mask, the parameter has the row.
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
        return list(
            filter(None, [*map(self.backpropagates, dict.fromkeys([*self.names, *passed])), *impure, *self.idle()])
        )

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
            Row(layer_name(name), self.shapes[name], self.arrives(name), rest[name], "", "") for name in sorted(others)
        ]
        if not violations and all(row.arrives == NOTHING for row in rows) and not self.taps_parameters():
            violations = [EMPTY]
        return Coverage(tuple(rows), tuple(violations), self.attached.note)

    def taps_parameters(self) -> bool:
        """Whether every parameter is tapped, of which there may be some beside matrices."""
        return is_direct(self.attached.rule) and self.attached.rule.parameters and bool(self.feedback)

    def lost(self, seen: Survey | None, rest: Any) -> list[str]:
        """The weights that an error passes on its way down without anybody's seeing it in the gradient."""
        if seen is None or (is_direct(self.attached.rule) and self.attached.rule.parameters):
            return []  # where every parameter is tapped nothing learns from an error that has passed weights
        own = {one.site for one in self.own}
        chosen = {site.name for site in seen.sites if site not in own and (site.name in rest or not site.thin)}
        shown = {step.name for step in self.result.passages if step.kind == "weights"}
        return sorted((seen.lost | chosen) - shown)

    def row(self, name: str) -> Row:
        way = self.result.arrivals.get(name, frozenset())
        taps = [self.taps[step.name] for step in sorted(way) if step.name in self.taps and step.kind == "direct"]
        # A direct feedback stands where it brings an error, a layer's own where it sends one on.
        holders = dict.fromkeys(taps) if self.taps else [layer_name(name)]
        feedback = " ".join(self.feedback.get(path, "") for path in holders)
        learns = ", ".join({self.learns[path]: None for path in holders if path in self.learns})
        return Row(layer_name(name), self.shapes[name], self.arrives(name), self.leaves(name), feedback, learns)

    def block(self, below: str, above: str) -> str | None:
        """The tapped block that holds both parameters, inside which the backward is meant to be exact."""
        return next((path for path in self.blocks if _inside(below, path) and _inside(above, path)), None)

    def starts(self, name: str) -> list[str]:
        """Where a parameter's error sets out: from the output, or from taps."""
        return self.starts_of(self.result.arrivals.get(name, frozenset()))

    def starts_of(self, way: frozenset[Passage]) -> list[str]:
        taps = (f"direct, {self.places.get(step.name, 'by the model itself')}" for step in way if step.kind == "direct")
        return (["the output"] if OUTPUT in way else []) + sorted(taps)

    def arrives(self, name: str) -> str:
        way, starts = self.result.arrivals.get(name, frozenset()), self.starts(name)
        own = [step.name for step in way if step.kind == "weights"]
        kinds = {step.kind for step in way} - {"weights"}
        if kinds <= {"output"}:
            return self.beside(name) if not starts else "backpropagation" if own else "exact: last"
        text = "through feedback" if "rule" in kinds else " and ".join(starts)
        text += ", without other terms of the loss" * (name in self.stopped)
        if not own:
            return text
        block = self.block(name, own[0])
        return f"{text}, then exact inside {block}" if block else f"{text}, then backpropagation"

    def beside(self, name: str) -> str:
        """How a parameter learns that the output's error does not reach."""
        way = self.result.beside.get(name, frozenset())
        own = [step.name for step in way if step.kind == "weights"]
        if not way:
            return NOTHING
        block = self.block(name, own[0]) if own else None
        how = f"exact inside {block}" if block else "backpropagation" if own else "exact"
        how = "through feedback" if any(step.kind == "rule" for step in way) else how
        return f"other terms of the loss alone: {how}"

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
        ways = [*self.result.arrivals.items(), *self.result.beside.items()]
        victims = [below for below, way in ways if ("weights", name) in way and not self.block(below, name)]
        victims = [below for below in dict.fromkeys(victims) if layer_name(below) != layer_name(name)]
        return [below for below in victims if not self.is_atop(below)]

    def backpropagates(self, name: str) -> str:
        victims = self.victims(name)
        beside = [use.weights & self.params for use in self.result.uses if name in use.weights - self.params]
        if not victims or self.allows(name) or any(set(victims) <= set(self.victims(w)) for ws in beside for w in ws):
            return ""
        others = " and others" if len(victims) > 3 else ""
        mend = "Name what is below it in at=, too" if self.taps else "Make it a layer that attach() takes"
        if name in self.left:
            mend = "It is left out: name it in at=, too"
        if not self.left.get(name, True):
            mend = (
                "Weights that are masked or chosen by data need a rule whose feedback is a whole matrix, such as fa(), "
            )
            mend += "and a place in at= where that is given"
        return (
            f"- {layer_name(name)!r} sends the error on to {', '.join(map(repr, victims[:3]))}{others} through its own "
            f"weights, which is backpropagation. {mend}, or allow={layer_name(name)!r}."
        )

    def is_atop(self, name: str) -> bool:
        """Whether a parameter is above all taps and of no contraction, as a norm's: it learns exactly there."""
        return bool(self.taps) and self.starts(name) == ["the output"] and _owner(name) not in self.contracting

    def impure(self, name: str) -> str:
        starts = max(map(self.starts_of, self.result.ways[name]), key=len, default=[])
        if len(starts) < 2 or self.allows(name):
            return ""
        mend = "Name whole blocks with at=, shortcut included, or "
        if self.attached.rule.weights is not None:  # then at= names the layers that are factored
            mend = "This rule taps the inputs of its layers, and no blocks: "
        return (
            f"- the error reaches {name!r} on {len(starts)} ways at once (from {', '.join(starts[:3])}), as when a "
            f"shortcut passes a tap by or a layer is used twice. {mend}allow={layer_name(name)!r}."
        )

    def idle(self) -> list[str]:
        """Sentences for the taps and weights in use that no error reaches, though one would without the rule."""
        delivered = {self.taps[step.name] for step in self.result.passages if step.name in self.taps}
        silent = [path for path in self.delivering if path not in delivered]
        idle = [name for name in self.names if name in self.params and not self.result.arrivals[name]]
        idle = [name for name in idle if not self.allows(name) and not self.result.beside.get(name)]
        if silent:
            seen = places_of(plain_of(self.attached.model), self.attached.method, self.example).seen
            silent = [path for path in silent if self.ends[path] in seen or self.ends[path].startswith("parameter ")]
            silent = [path for path in silent if not matches(path, self.allow, under=True)]
        if idle:
            true = trace(plain_of(self.attached.model), self.attached.method, self.example).arrivals
            idle = [name for name in idle if true.get(name)]
        return [SILENT.format(path) for path in silent] + [IDLE.format(layer_name(name)) for name in idle]


def _owner(name: str) -> str:
    return name.rpartition("/")[0]


def _inside(name: str, block: str) -> bool:
    return name.startswith(f"{block}/")
