"""Where errors would come from if a forward pass was tapped: found without a gradient, for any choice of taps.

A traced forward pass has marked places. Every use of a parameter is followed from there along the values that depend on
it: until a tapped place, where its error will be delivered, or until the output. What is passed on that way are the
weights that the error would go backward through.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jaxfa.jaxprs.flows import CHOICES, CONTRACTIONS, NONE, is_pointwise
from jaxfa.jaxprs.versions import bodies, equations, opened, scan_parts, while_parts

OUTPUT = "the output"
_PLACE = "place: "
_WITHOUT_DERIVATIVE = ("stop_gradient", "sign", "floor", "ceil", "round")


class Use(NamedTuple):
    """Parameters at an equation that makes an activation with them; or a place, whose value goes on from there.

    Attributes:
      at: the equations around it and itself, or the place.
      names: the parameters.
    """

    at: tuple[Any, ...]
    names: frozenset[str] = NONE


class Value(NamedTuple):
    """What is known of a value.

    Attributes:
      names: what it is made of, if it is of parameters and state alone.
      data: whether it depends on data.
      uses: the uses that it depends on, each with the weights that were passed since.
      origin: which value it is; what a place hands on is what it got.
    """

    names: frozenset[str] = NONE
    data: bool = False
    uses: Mapping[Use, frozenset[str]] = {}  # never written to
    origin: Any = None

    @property
    def is_weight(self) -> bool:
        return bool(self.names) and not self.data


def mark(h: jax.Array, place: str) -> jax.Array:
    """``h``, at a place that may be tapped."""
    return checkpoint_name(h, _PLACE + place)


def marked(jaxpr: Jaxpr) -> set[str]:
    """The marked places in a program."""
    names = {str(eqn.params["name"]) for eqn in equations(jaxpr) if eqn.primitive.name == "name"}
    return {name.removeprefix(_PLACE) for name in names if name.startswith(_PLACE)}


class Cuts:
    """Follows the uses of parameters to the taps.

    Args:
      taps: the tapped places; the name of a parameter taps that.
      learns: the parameters that learn.
      watched: places whose value is followed, too, as if it was a parameter.

    Attributes:
      starts: for every use the places its error comes from, or the output, with the weights that it passes from there.
      contracted: the names of what is contracted with an activation.
      products: the equations that contract.
      lookups: the equations that look something up.
      chosen: the names of what data looks up, or scales.
      origins: by place, the values seen there.
    """

    def __init__(self, taps: Iterable[str], learns: frozenset[str], watched: Iterable[str] = ()) -> None:
        self.taps, self.learns, self.watched = frozenset(taps), learns, frozenset(watched)
        self.starts: dict[Use, dict[str, frozenset[str]]] = {}
        self.contracted: set[str] = set()
        self.products: set[Any] = set()
        self.lookups: set[Any] = set()
        self.chosen: set[str] = set()
        self.origins: dict[str, Any] = {}
        self.leaders: dict[Any, str] = {}

    def run(self, jaxpr: Any, names: Sequence[str | None]) -> "Cuts":
        """Follows a program whose arguments are parameters and state, by name, and data, which is None."""
        values = [self.argument(i, name) for i, name in enumerate(names)]
        for value in self.walk(opened(jaxpr), values, ()):
            self.close(self.mixed([value, Value(data=True)], (OUTPUT,)), OUTPUT)
        return self

    def argument(self, i: int, name: str | None) -> Value:
        if name is None:
            return Value(data=True, origin=i)
        if name not in self.taps:
            return Value(frozenset([name]) if name else NONE, origin=i)
        self.close(Value(uses={Use((name,), frozenset([name])): NONE}), name)
        return Value(data=True, uses={Use((name,)): NONE}, origin=i)

    def close(self, value: Value, place: str) -> None:
        """Notes where the error of the uses behind a value comes from."""
        for use, passed in value.uses.items():
            starts = self.starts.setdefault(use, {})
            starts[place] = starts.get(place, NONE) | passed

    def walk(self, jaxpr: Jaxpr, values: Sequence[Value], scope: tuple[Any, ...]) -> list[Value]:
        known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> Value:
            return Value() if isinstance(atom, Literal) else known.get(atom, Value())

        for eqn in jaxpr.eqns:
            at = (*scope, id(eqn))
            outs = self.equation(eqn, [read(var) for var in eqn.invars], at)
            for i, (var, out) in enumerate(zip(eqn.outvars, outs, strict=True)):
                value = out if _is_float(var) else Value(data=out.data)
                known[var] = value if value.origin is not None else value._replace(origin=(*at, i))
        return [read(var) for var in jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, values: list[Value], at: tuple[Any, ...]) -> list[Value]:
        match eqn.primitive.name:
            case "name" if eqn.params["name"].startswith(_PLACE):
                return [self.place(eqn.params["name"].removeprefix(_PLACE), values[0], at)]
            case "scan":
                body, consts, carried = scan_parts(eqn)
                return self.loop(body, values, slice(consts, consts + carried), at)
            case "while":
                body, skip, consts = while_parts(eqn)
                return self.loop(body, values[skip:], slice(consts, None), at)
            case "cond":
                branches = [self.walk(body, values[1:], (*at, i)) for i, body in enumerate(bodies(eqn))]
                return [self.mixed(outs, at) for outs in zip(*branches, strict=True)]
        for body in bodies(eqn):
            if len(body.invars) == len(values):
                outs = self.walk(body, values, at)
                if "custom" in eqn.primitive.name:  # its derivative may be another than its body's
                    outs = [self.mixed([out, *values], at) for out in outs]
                return outs
        return [self.primitive(eqn, values, at)] * len(eqn.outvars)

    def place(self, place: str, value: Value, at: tuple[Any, ...]) -> Value:
        self.origins.setdefault(place, value.origin)
        if place in self.taps:
            # One activation is one tap, whoever reads it.
            place = self.leaders.setdefault((value.origin, place.startswith("input")), place)
            self.close(self.mixed([value, Value(data=True)], at), place)
            return Value(data=True, uses={Use((place,)): NONE}, origin=value.origin)
        if place in self.watched:
            mixed = self.mixed([value, Value(data=True)], at)
            return mixed._replace(uses={**mixed.uses, Use((place,)): NONE}, origin=value.origin)
        return value

    def mixed(self, values: Sequence[Value], at: tuple[Any, ...]) -> Value:
        """What depends on several values."""
        if not any(value.data for value in values):
            return Value(NONE.union(*(value.names for value in values)))
        uses = _union([value.uses for value in values])
        names = NONE.union(*(value.names for value in values if value.is_weight)) & self.learns
        return Value(data=True, uses={**uses, Use(at, names): NONE} if names else uses)

    def primitive(self, eqn: JaxprEqn, values: list[Value], at: tuple[Any, ...]) -> Value:
        name = eqn.primitive.name
        if name in _WITHOUT_DERIVATIVE:
            return Value(data=any(value.data for value in values))
        values = values[CHOICES.get(name, slice(None))]
        weights = [value for value in values if value.is_weight]
        if name in ("gather", "mul", "div"):
            self.chosen |= NONE.union(*(value.names for value in weights))
        if name == "gather":
            self.lookups.add(at)
        if name not in CONTRACTIONS or not weights or len(weights) == len(values):
            return self.mixed(values, at)
        if is_pointwise(eqn, values):
            return self.mixed(values, at)
        passed = NONE.union(*(value.names for value in weights))
        self.contracted |= passed
        self.products.add(at)
        others = [
            value._replace(uses={use: since | passed for use, since in value.uses.items()})
            for value in values
            if value.data
        ]
        return self.mixed([*others, *weights], at)

    def loop(self, body: Jaxpr, values: list[Value], carried: slice, at: tuple[Any, ...]) -> list[Value]:
        before, carry, after = values[: carried.start], values[carried], values[carried.start :][len(values[carried]) :]
        while True:
            outs = self.walk(body, [*before, *carry, *after], at)
            grown = [self.mixed(pair, at) for pair in zip(carry, outs[: len(carry)], strict=True)]
            if [value[:3] for value in grown] == [value[:3] for value in carry]:
                return [value._replace(origin=None) for value in [*grown, *outs[len(carry) :]]]
            carry = grown


def _union(several: list[Mapping[Use, frozenset[str]]]) -> Mapping[Use, frozenset[str]]:
    several = [uses for uses in several if uses]
    if len(several) < 2:
        return several[0] if several else {}
    found = dict(several[0])
    for uses in several[1:]:
        for use, passed in uses.items():
            found[use] = found[use] | passed if use in found else passed
    return found


def _is_float(var: Any) -> bool:
    return jnp.issubdtype(getattr(var.aval, "dtype", jnp.float32), jnp.inexact)
