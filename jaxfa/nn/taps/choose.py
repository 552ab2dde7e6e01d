"""Where a direct rule taps if nobody says: the finest places that no error passes by.

The choice is read off one traced forward pass (:mod:`jaxfa.jaxprs.cuts`). Where every activation can be tapped at the
input of the layers that read it, that is done. Else, as where shortcuts pass layers by, modules are tapped at their
outputs: those that the model itself calls, or, of a chain of modules, its members. Modules with shortcuts inside stay
whole blocks. Parameters that enter between modules are reached by the input of the module that reads them, or tapped
themselves.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from flax import nnx

from jaxfa.jaxprs.cuts import OUTPUT, Cuts, Use
from jaxfa.nn.model.variables import modules_of
from jaxfa.nn.taps.describe import layer_name
from jaxfa.nn.taps.places import Forward
from jaxfa.nn.taps.tap import Place
from jaxfa.nn.taps.why import Fault, why
from jaxfa.nn.weights.contraction import sites_of
from jaxfa.nn.weights.survey import names_of
from jaxfa.paths import matches


class Choice(NamedTuple):
    """Where to tap.

    Attributes:
      places: the taps.
      note: what was chosen and why, in words.
      faults: what of it is no direct feedback; no other choice is known then.
    """

    places: tuple[Place, ...]
    note: str
    faults: list[Fault]


def choose(model: nnx.Module, forward: Forward, allow: tuple[str, ...]) -> Choice:
    """Chooses taps for a model."""
    chooser = _Chooser(forward, allow)
    sites = sites_of(model)
    layers = [f"input of {path}" for path in forward.modules if path in sites]
    faults = chooser.faults(chooser.cuts(layers))
    if not faults:
        inputs = chooser.in_use(layers)
        return Choice(_placed(inputs), f"tapped: the input of every layer{_but(layers, inputs)}", [])
    taps = chooser.blocks()
    left = chooser.faults(chooser.cuts(taps))
    places = _placed(taps)
    at = ", ".join(name_all(places, [path for path, _ in modules_of(model)]))
    reason = why(chooser.cuts(layers), faults)
    return Choice(places, f"tapped: {at}; not the input of every layer, since {reason}", left)


def name_all(places: Iterable[Place], paths: list[str]) -> list[str]:
    """The places as ``at=`` names them, with a glob for those that are all of their kind."""
    names = [str(place) for place in places]
    kinds = {"input of ": [f"input of {path}" for path in paths], "": paths}
    found: dict[str, None] = {}
    for name in names:
        kind = "input of " if name.startswith("input of ") else ""
        globs = [name] if not re.search(r"/\d+$", name) else [re.sub(r"\d+$", "*", name), name]
        found[next(g for g in globs if g == name or {p for p in kinds[kind] if matches(p, (g,))} <= set(names))] = None
    return list(found)


class _Chooser:
    """Tries taps on a forward pass."""

    def __init__(self, forward: Forward, allow: tuple[str, ...]) -> None:
        self.forward, self.allow = forward, allow
        self.known: dict[Any, Cuts] = {}
        self.names = names_of(forward.program)

    def cuts(self, taps: Iterable[str], watched: Iterable[str] = ()) -> Cuts:
        """What becomes of the uses of parameters with these taps."""
        taps = [tap for tap in taps if tap in self.forward.learns or self.forward.holds_examples(tap)]
        key = frozenset(taps), frozenset(watched)
        if key not in self.known:
            cuts = Cuts(taps, self.forward.learns, watched)
            self.known[key] = cuts.run(self.forward.to_logits, self.names)
        return self.known[key]

    def faults(self, cuts: Cuts) -> list[Fault]:
        """What would not learn by direct feedback."""
        blocks = [tap.removeprefix("output of ") for tap in cuts.taps if tap.startswith("output of ")]
        owners = {_owner(name) for name in cuts.contracted}
        found: list[Fault] = []
        several: dict[Any, tuple[frozenset[str], set[str]]] = {}
        for use, starts in cuts.starts.items():
            names = frozenset(name for name in use.names if not matches(name, self.allow, under=True))
            # A layer that is used again learns from one tap, in a loop as in a scan; a table from one for each use.
            for one in [use] if use.at in cuts.lookups else names:
                several.setdefault(one, (names, set()))[1].update(starts)
            for name in names:
                if set(starts) == {OUTPUT} and _owner(name) not in owners:
                    continue  # above all taps and of no contraction, as a norm's
                passed = {
                    weight for start in starts.values() for weight in start if not self.is_free(name, weight, blocks)
                }
                if passed:
                    found.append(Fault(frozenset([name]), frozenset(passed)))
        return found + [Fault(names, frozenset()) for names, starts in several.values() if names and len(starts) > 1]

    def is_free(self, name: str, weight: str, blocks: list[str]) -> bool:
        """Whether a parameter's error may go backward through these weights."""
        inside = any(name.startswith(f"{block}/") and weight.startswith(f"{block}/") for block in blocks)
        return inside or layer_name(name) == layer_name(weight) or matches(weight, self.allow, under=True)

    def in_use(self, taps: list[str]) -> list[str]:
        """The taps that deliver an error to something that learns; with those at the same activation."""
        cuts = self.cuts(taps)
        used = {place for use, starts in cuts.starts.items() if use.names for place in starts}
        leads = {tap: cuts.leaders.get((cuts.origins.get(tap), tap.startswith("input")), tap) for tap in taps}
        return [tap for tap in taps if leads[tap] in used]

    def blocks(self) -> list[str]:
        """Modules by their outputs, with what is needed besides."""
        units, last = self.units()
        taps = [f"output of {unit}" for unit in units if unit not in last]
        taps = self.opened(taps, [unit for unit in units if unit not in last])
        taps = self.mended(taps, units)
        return self.pruned(self.in_use(taps))

    def units(self) -> tuple[list[str], list[str]]:
        """The modules that the model calls, and which of them make the output; those with blocks inside are opened."""
        units = self.forward.children("")
        while True:
            cuts = self.cuts([f"output of {unit}" for unit in units])
            last = [unit for unit in units if set(cuts.starts.get(Use((f"output of {unit}",)), {"": 0})) == {OUTPUT}]
            last = [unit for unit in last if not cuts.starts[Use((f"output of {unit}",))][OUTPUT]]
            faults = self.faults(self.cuts([f"output of {unit}" for unit in units if unit not in last]))
            inner = [name for fault in faults for name in fault.names]
            opened = [one for one in last if self.forward.children(one) and any(_inside(name, one) for name in inner)]
            if not opened:
                return units, last
            units = [one for unit in units for one in (self.forward.children(unit) if unit in opened else [unit])]

    def opened(self, taps: list[str], units: list[str]) -> list[str]:
        """The taps, with those between the members of modules that are chains, without a shortcut."""
        contracted = self.cuts(taps).contracted
        while True:
            members = {
                unit: [one for one in self.forward.children(unit) if any(_inside(name, one) for name in contracted)]
                for unit in units
            }
            tried = {unit: self.between(several) for unit, several in members.items() if len(several) > 1}
            cuts = self.cuts([*taps, *itertools.chain(*tried.values())], [f"input of {unit}" for unit in tried])
            faulty = [name for fault in self.faults(cuts) for name in fault.names]
            chains = [
                unit
                for unit, inner in tried.items()
                if _is_chain(cuts, [f"input of {unit}", *inner, f"output of {unit}"])
                and not any(_inside(name, unit) for name in faulty)
            ]
            if not chains:
                return taps
            more = {f"output of {unit}": [*tried[unit], self.end(cuts, unit, members[unit][-1])] for unit in chains}
            taps = [one for tap in taps for one in more.get(tap, [tap])]
            units = [one for unit in chains for one in members[unit]]

    def between(self, members: list[str]) -> list[str]:
        """What leads from each module to the next: the input of the next, or, of a block, its output."""
        return [
            f"output of {one}" if self.forward.children(one) else f"input of {other}"
            for one, other in itertools.pairwise(members)
        ]

    def end(self, cuts: Cuts, unit: str, last: str) -> str:
        """The output of a chain, which may be that of the block at its end."""
        own, inner = f"output of {unit}", f"output of {last}"
        return inner if self.forward.children(last) and cuts.origins[inner] == cuts.origins[own] else own

    def mended(self, taps: list[str], units: list[str]) -> list[str]:
        """The taps, with one at the input of modules by whose weights errors would be passed on, or at parameters."""
        faults = self.faults(self.cuts(taps))
        readers = [unit for unit in units if any(_inside(name, unit) for fault in faults for name in fault.passed)]
        inputs = [f"input of {unit}" for unit in readers if self.forward.holds_examples(f"input of {unit}")]
        cuts = self.cuts([*inputs, *taps])
        names = {name for fault in self.faults(cuts) for name in fault.names} - cuts.contracted - cuts.chosen
        for more in ([], inputs, sorted(names), [*sorted(names), *inputs]):
            if not self.faults(self.cuts([*more, *taps])):
                return [*more, *taps]
        return [*inputs, *taps]

    def pruned(self, taps: list[str]) -> list[str]:
        """The taps without those whose error another one brings as well, past no contraction, or to a norm alone."""
        faults = len(self.faults(self.cuts(taps)))
        for kind in dict.fromkeys(map(_kind, reversed(taps))):
            fewer = [tap for tap in taps if _kind(tap) != kind]
            cuts = self.cuts(fewer)
            if len(self.faults(cuts)) <= faults and _past(cuts) <= _past(self.cuts(taps)):
                taps = fewer
        return self.in_use(taps)


def _past(cuts: Cuts) -> set[Any]:
    """Which weights the errors of contractions pass."""
    return {
        (use, name)
        for use, starts in cuts.starts.items()
        if use.at in cuts.products and use.names
        for name in frozenset().union(*starts.values())
    }


def _is_chain(cuts: Cuts, places: list[str]) -> bool:
    """Whether each place's value goes on to the next place alone."""
    return all(set(cuts.starts.get(Use((one,)), {})) == {other} for one, other in itertools.pairwise(places))


def _but(layers: list[str], tapped: list[str]) -> str:
    """Which layers are not tapped, in words."""
    left = [layer for layer in layers if layer not in tapped]
    if left == layers[:1]:
        return " but the first"
    return f" but {', '.join(layer.removeprefix('input of ') for layer in left)}" if left else ""


def _placed(taps: list[str]) -> tuple[Place, ...]:
    found = []
    for tap in taps:
        kind, separator, path = tap.partition(" of ")
        found.append(Place(kind, path) if separator else Place("parameter", tap))
    return tuple(found)


def _kind(tap: str) -> str:
    return re.sub(r"\d+", "*", tap)


def _owner(name: str) -> str:
    return name.rpartition("/")[0]


def _inside(name: str, block: str) -> bool:
    return name.startswith(f"{block}/")
