"""Puts a direct rule's taps on a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from jaxfa.base import DirectRule, Rule, matches
from jaxfa.jaxprs.cuts import OUTPUT, Cuts
from jaxfa.jaxprs.cuts import Use as Read
from jaxfa.jaxprs.flows import Use
from jaxfa.nn.choose import choose, name_all
from jaxfa.nn.contraction import sites_of
from jaxfa.nn.describe import layer_name
from jaxfa.nn.factored import Factored
from jaxfa.nn.measured import measure_taps, tappable, that_are_read, true_size
from jaxfa.nn.places import Forward, look
from jaxfa.nn.program import Example
from jaxfa.nn.tap import Place, place_tap
from jaxfa.nn.taps import (
    check_calls,
    check_source,
    drop_unused,
    end_at,
    fill_taps,
    follow,
    only_leaf,
    refuse_unseen,
)
from jaxfa.nn.trace import uses_of, weights_above
from jaxfa.nn.variables import modules_of


class Call(NamedTuple):
    """How a model is called: its method, which of its outputs are logits, what with; and what may backpropagate."""

    method: str
    logits: Callable[[Any], Any] | None
    example: Example | None
    allow: tuple[str, ...]


class Placed(NamedTuple):
    """What came of putting a rule on a model.

    Attributes:
      backprop: the layers that the rule itself leaves to backpropagation.
      own: the feedback of the model's own contractions, and those that have none.
      note: where a direct rule taps that was not told, and why.
      seen: looks through the forward pass, if that was traced.
      error: the output error's shape, if it is known.
    """

    backprop: list[str]
    own: Any = ((), ())
    note: str = ""
    seen: Callable[[], Any] | None = None
    error: Any = None


def put_direct(model: Any, rule: DirectRule, rngs: nnx.Rngs, at: Any, call: Call) -> Placed:
    """Taps a model for a direct rule."""
    if call.example is None:
        raise ValueError(
            "A direct rule needs example=, one batch of inputs: its feedback leads from outputs to layers."
        )
    method, example = call.method, call.example
    places, note, forward = _places(model, rule, at, call)
    refuse_unmatched("the rule's globs", rule.globs, [place.path for place in places], under=True)
    modules = dict(modules_of(model))
    if forward is not None:
        refuse_unseen({path: modules[path] for path in sites_of(model) if path not in forward.modules}, call.allow)
    for place in sorted(places, key=lambda place: place.kind == "input"):
        place_tap(modules, place)
    recorder, error, mark = measure_taps(model, method, example, call.logits, forward and forward.sizes())
    seen, above = recorder.seen, []
    drop_unused(model, seen, None if rule.weights is not None else at, call.allow)
    follow(model, recorder)
    if rule.source in seen:
        check_source(model, rule.source, list(seen))
        error = only_leaf(seen[rule.source], rule.source)
        above = weights_above(model, method, true_size(error, mark), rule.source, example)
        end_at(model, rule.source, list(seen))
    if rule.modulate is not None:
        _check_modulated(rule.modulate, seen)
    found, error = tappable(model, seen, error, mark)
    fill_taps(model, rule, rngs, that_are_read(model, call, found), error)
    check_calls(model, recorder.calls)
    return Placed(above, note=note, error=error)


def _places(model: Any, rule: DirectRule, at: Any, call: Call) -> tuple[tuple[Place, ...], str, Forward | None]:
    """Where a model is tapped, what a table says of that, and the forward pass if it was traced."""
    note, forward, example = "", None, call.example
    assert example is not None
    if rule.modulate is not None:
        forward = look(model, call.method, example, call.logits)
        places = _modulated(rule.modulate, _named(model, at) if at else _hidden(model, forward), call.method)
        note = "" if at else "tapped: the output of every layer but the last"
    elif rule.parameters:
        places = _parameters(model, at, call.allow)
    elif rule.weights is not None or (at is None and rule.source is not None):
        places = _layers(model, rule, at, uses_of(model, call.method, example))
    elif at is None:
        forward = look(model, call.method, example, call.logits)
        choice = choose(model, forward, call.allow)
        places, note = choice.places, choice.note
    else:
        places = _named(model, at)
    return places + _source(model, rule, at, places), note, forward


def advise(model: Any, rule: Rule, call: Call) -> str:
    """Where a direct rule could tap a model instead, or why it could nowhere."""
    if not isinstance(rule, DirectRule) or rule.weights is not None or rule.source is not None or call.example is None:
        return ""
    if rule.parameters:
        return ""
    if rule.modulate is not None:
        return "A norm learns where at= names it, beside layers, in the place of the layer below it."
    forward = look(model, call.method, call.example, call.logits)
    choice = choose(model, forward, call.allow)
    if not choice.faults:
        at = name_all(choice.places, [path for path, _ in modules_of(model)])
        return f"at={tuple(at)} would do."
    fault = choice.faults[0]
    name, weights = layer_name(min(fault.names)), ", ".join(sorted({repr(layer_name(one)) for one in fault.passed}))
    passes = f"passes {weights}" if weights else "comes on several ways"
    reason = "no module between returns floats" if not weights else forward.why_not(sorted(fault.passed))
    return f"No at= would do: the error of {name!r} {passes}, and {reason}."


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
    """The outputs of the layers that a forward pass calls, but for those that lead to the logits through no other."""
    sites = sites_of(model)
    places = [Place("output", path) for path in forward.modules if path in sites]
    names = {place: f"output of {place.path}" for place in places}
    cuts = Cuts([name for name in names.values() if forward.holds_examples(name)], forward.learns, [])
    starts = cuts.run(forward.jaxpr, forward.names).starts
    return tuple(place for place in places if set(starts.get(Read((names[place],)), {})) != {OUTPUT})


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


def _check_modulated(path: str, seen: dict[str, dict[str, Any]]) -> None:
    """Refuses an input that no error can be added to, and layers that come before it."""
    if not seen.get(path):
        raise ValueError(
            "The error's projection is added to the input, which must be of floats. Of tokens, modulate what embeds "
            "them: modulate='embed' with the path of that module, and allow='embed', since it does not learn then."
        )
    before = list(seen)[: list(seen).index(path)]
    if before:
        raise ValueError(f"{before} come before the modulated {path!r}, where both passes are alike: none would learn.")


def _source(model: Any, rule: DirectRule, at: Any, places: tuple[Place, ...]) -> tuple[Place, ...]:
    """A rule's source, where it is tapped for no other reason."""
    if rule.source is None or any(place.path == rule.source for place in places):
        return ()
    modules = dict(modules_of(model))
    if at is None or rule.source not in modules:
        paths = sorted(filter(None, modules if at else [place.path for place in places]))
        raise ValueError(f"A source is the path of one module; {rule.source!r} is none of those here, {paths}.")
    return (Place("output", rule.source),)


def refuse_unmatched(name: str, globs: Any, paths: list[str], *, under: bool, known: list[str] | None = None) -> None:
    """Refuses globs that match none of the paths; names those that are known."""
    unmatched = [glob for glob in globs or () if not any(matches(path, (glob,), under=under) for path in paths)]
    if unmatched:
        here = sorted(filter(None, known or paths))
        raise ValueError(f"{name}={unmatched} matches nothing; the paths here are {here}.")
