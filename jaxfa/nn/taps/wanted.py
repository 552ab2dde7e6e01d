"""The places that a direct rule, or ``at=``, asks for."""

from typing import Any

from flax import nnx

from jaxfa.base import DirectRule
from jaxfa.jaxprs.cuts import OUTPUT, Cuts
from jaxfa.jaxprs.cuts import Use as Read
from jaxfa.jaxprs.flows import Use
from jaxfa.nn.model.variables import modules_of
from jaxfa.nn.taps.choose import choose, name_all
from jaxfa.nn.taps.places import Forward
from jaxfa.nn.taps.tap import Place
from jaxfa.nn.weights.contraction import sites_of
from jaxfa.nn.weights.factored import Factored
from jaxfa.nn.weights.survey import names_of, uses_in
from jaxfa.paths import matches


def places_for(model: Any, rule: DirectRule, at: Any, forward: Forward, call: Any) -> tuple[tuple[Place, ...], str]:
    """Where a rule taps a model, and, where it was not told, a sentence that says where and why."""
    note = ""
    if rule.modulate is not None:
        hidden = _named(model, at) if at else _hidden(model, forward)
        places = _modulated(rule.modulate, hidden, call.method)
        names = ", ".join(name_all(hidden, [path for path, _ in modules_of(model)]))
        note = "" if at else f"tapped: {names}; the outputs of layers that lead to others, or of norms behind these"
    elif rule.parameters:
        places = _parameters(model, at, call.allow)
    elif rule.weights is not None or (at is None and rule.source is not None):
        places = _layers(model, rule, at, uses_in(forward.program, forward.jaxpr))
    elif at is None:
        places, note, _ = choose(model, forward, call.allow)
    else:
        places = _named(model, at)
    return places + _source(model, rule, at, places), note


def _layers(model: Any, rule: DirectRule, at: Any, used: dict[str, Use]) -> tuple[Place, ...]:
    """The inputs of layers but the first, of factored ones where ``at`` has chosen these."""
    modules = dict(modules_of(model))
    sites = [path for path in sites_of(model) if path not in used or not used[path].first]
    learns = [path for path in sites if rule.weights is None or isinstance(modules[path], Factored)]
    chosen = [path for path in learns if at is None or matches(path, at, under=True)]
    return tuple(Place("input", path) for path in chosen)


def _named(model: Any, at: tuple[str, ...]) -> tuple[Place, ...]:
    """What ``at`` names: modules, the inputs of modules, or parameters."""
    modules = [path for path, _ in modules_of(model)]
    params = _params(model)
    places = [Place(kind, path) for kind in ("output", "input") for path in modules if path]
    found = dict.fromkeys(place for place in places if matches(str(place), at))
    unmatched = tuple(glob for glob in at if not any(matches(str(place), (glob,)) for place in found))
    found |= dict.fromkeys(Place("parameter", path) for path in params if matches(path, unmatched))
    refuse_unmatched("at", at, [*modules, *map(str, found)], under=False, known=modules)
    return tuple(found)


def _parameters(model: Any, at: Any, allow: tuple[str, ...]) -> tuple[Place, ...]:
    """Every parameter but those that may backpropagate."""
    if at is not None:
        raise ValueError(f"This rule taps every parameter: leave out at={at}, or name with allow= what it leaves out.")
    for path, (module, site) in sites_of(model).items():
        if site.stack(module.kernel.get_value()):
            raise ValueError(
                f"{path!r} is a stack of layers, whose parameters no tap reaches: call its layers in a loop."
            )
    return tuple(Place("parameter", path) for path in _params(model) if not matches(path, allow, under=True))


def _params(model: Any) -> list[str]:
    return ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def _hidden(model: Any, forward: Forward) -> tuple[Place, ...]:
    """The outputs of the layers that a forward pass calls, but for those that lead to the logits through no other.

    Where a layer's output goes to a norm alone, that norm's is taken in its place.
    """
    sites, modules = sites_of(model), dict(modules_of(model))
    layers = [f"output of {path}" for path in forward.modules if path in sites]
    norms = [f"output of {path}" for path in forward.modules if path not in sites and _has_own(modules[path])]
    ends = _ends([*layers, *norms], forward)
    behind = {layer: norm for layer in layers for norm in norms if ends[layer] == {norm}}
    taps = list(dict.fromkeys(behind.get(layer, layer) for layer in layers))
    ends = _ends(taps, forward)
    return tuple(Place("output", tap.removeprefix("output of ")) for tap in taps if ends[tap] != {OUTPUT})


def _has_own(module: Any) -> bool:
    return any(isinstance(value, nnx.Param) for value in vars(module).values())


def _ends(taps: list[str], forward: Forward) -> dict[str, set[str]]:
    """To which of the taps, or to the logits, each one's value goes first."""
    cuts = Cuts([tap for tap in taps if forward.holds_examples(tap)], forward.learns, [])
    starts = cuts.run(forward.to_logits, names_of(forward.program)).starts
    return {tap: set(starts.get(Read((tap,)), {})) for tap in taps}


def _modulated(path: str, places: tuple[Place, ...], method: str) -> tuple[Place, ...]:
    """The places of a rule that modulates an input, or the output of a module."""
    if path == "" and method != "__call__":
        raise ValueError(
            f"Only the input of __call__ is modulated, not {method!r}'s: say modulate= with a module's path."
        )
    inputs = [str(place) for place in places if place.kind != "output"]
    if inputs:
        raise ValueError(f"Layers learn from what a second pass changes in outputs: at= names modules, not {inputs}.")
    others = tuple(place for place in places if place.path != path)
    return (Place("output" if path else "input", path), *others)


def _source(model: Any, rule: DirectRule, at: Any, places: tuple[Place, ...]) -> tuple[Place, ...]:
    """A rule's source, where it is tapped for no other reason."""
    if rule.source is None or any(place.path == rule.source for place in places):
        return ()
    modules = dict(modules_of(model))
    if at is None or rule.source not in modules:
        paths = sorted(filter(None, modules if at else [place.path for place in places]))
        raise ValueError(f"A source is the path of one module; {rule.source!r} is none of those here, {paths}.")
    return (Place("output", rule.source),)


def check_modulated(path: str, seen: dict[str, dict[str, Any]]) -> None:
    """Refuses an input that no error can be added to, and layers that come before it."""
    if not seen.get(path):
        raise ValueError(
            "The error's projection is added to the input, which must be of floats. For tokens, modulate what embeds "
            "them: modulate='embed' with the path of that module, and allow='embed', since it does not learn then."
        )
    before = list(seen)[: list(seen).index(path)]
    if before:
        raise ValueError(f"{before} come before the modulated {path!r}, where both passes are alike: none would learn.")


def refuse_unmatched(name: str, globs: Any, paths: list[str], *, under: bool, known: list[str] | None = None) -> None:
    """Refuses globs that match none of the paths; names those that are known."""
    unmatched = [glob for glob in globs or () if not any(matches(path, (glob,), under=under) for path in paths)]
    if unmatched:
        here = sorted(filter(None, known or paths))
        raise ValueError(f"{name}={unmatched} matches nothing; the paths here are {here}.")
