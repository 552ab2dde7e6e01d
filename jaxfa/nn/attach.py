"""Puts a rule on an unmodified NNX model.

Layer-wise rules take the place of the backward of every ``nnx.Linear``, ``LinearGeneral``, ``Einsum``, ``Conv`` and
``ConvTranspose``, and so of attention's projections and recurrent cells, and, where the example shows them, of the
contractions with a parameter that a model makes by itself: ``x @ w``, einsums and convolutions of its own, tied heads,
LoRA's adapters, experts chosen by an index. Their feedback is the parameter's, whose path they go by; where the
parameter learns elsewhere, too, as a tied embedding does, Kolen-Pollack's law holds for this part of its steps.

The arrays of ``nnx.state(attached)`` are all that need be saved, by orbax or numpy: the same call of attach makes
the rest, ``nnx.update(attached, state)`` puts them back. The model itself, which has the rule's functions in it,
can be copied by ``copy.deepcopy`` but not pickled.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxfa.base import Rule, is_direct
from jaxfa.nn.attached import Attached
from jaxfa.nn.coverage import cover
from jaxfa.nn.learning import quiet
from jaxfa.nn.model.program import Example, at_once, method_of
from jaxfa.nn.model.variables import drawing, modules_of
from jaxfa.nn.passes.schedules import forward_by
from jaxfa.nn.taps.advice import Advice, refuse_at_end
from jaxfa.nn.taps.put import Call, Placed, put_direct
from jaxfa.nn.taps.tap import Tap
from jaxfa.nn.taps.wanted import refuse_unmatched
from jaxfa.nn.weights.contraction import Contraction, place, sites_of
from jaxfa.nn.weights.convolution import read_from_memory
from jaxfa.nn.weights.factored import Factored, factorise_chosen
from jaxfa.nn.weights.survey import Survey, look_at_layers, look_through, put_own, uses_in
from jaxfa.paths import matches, path_name
from jaxfa.stacks.schedules import Schedule, stored


def attach(
    model: nnx.Module,
    rule: Rule,
    *,
    rngs: nnx.Rngs,
    at: str | tuple[str, ...] | None = None,
    example: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    method: str = "__call__",
    logits: Callable[[Any], Any] | None = None,
    allow: str | tuple[str, ...] = (),
    schedule: Schedule = stored,
) -> Attached:
    """Puts a rule on a model that knows nothing of it.

    Layer-wise rules take the place of the backward of every layer with weights, and of the model's own contractions.
    Direct rules deliver the output error to the places named by ``at``; without it, to the input of every layer but the
    first or, where shortcuts pass these by, to the outputs of blocks.

    Args:
      model: any NNX model; it stays as it is.
      rule: a :class:`jaxfa.LayerRule` or :class:`jaxfa.DirectRule`, such as ``jaxfa.fa()``.
      rngs: the feedback is drawn from ``rngs.feedback()``.
      at: globs of modules (``"blocks/*"``), for direct rules also ``"input of blocks/0"`` or a parameter: where they
        tap; for other rules, and for ``jaxfa.ssa``, the modules whose layers get the rule.
      example: one batch of inputs, an array or a tuple of positional arguments, or their shapes. With it contractions
        are accounted for now, else whenever the model is traced. Direct rules need it.
      example_kwargs: keyword arguments, likewise.
      method: the model's method that these are for and that is called by the result.
      logits: for direct rules, a function that picks from several outputs those whose error is delivered, such as
        ``lambda out: out[0]``. By default all arrays of floats; several lie side by side.
      allow: globs of layers and parameters that may pass errors on by backpropagation.
      schedule: ``jaxfa.stacks.stored``; for direct rules also ``stream`` and, with ``at=``, ``dispatch(mesh)``: the
        same gradients. A streamed block runs once more if the loss reads what is beside its taps, such as a penalty.

    Returns:
      An :class:`Attached` with a copy of the model.

    Raises:
      ValueError: if a contraction would stay backpropagation, nothing would learn, or an argument does not fit.
      TypeError: if the model or rule is of another type.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((5, 4))
      >>> jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(1), example=x)(x).shape
      (5, 3)
    """
    _check(model, rule, rngs)
    if logits is not None and not is_direct(rule):
        raise ValueError("logits= tells a direct rule where its error is taken; leave it out for this layer-wise rule.")
    globs, allow = _globs(at), _globs(allow) or ()
    weights = [path_name(path) for path, _ in nnx.to_flat_state(nnx.state(model))]
    refuse_unmatched("allow", allow, weights, under=True)
    _check_method(model, method)
    call = Call(method, logits, _example(example, example_kwargs), allow)
    attached, found = _attach(model, rule, rngs, globs, call, schedule=schedule)
    advice = Advice(model, rule, call, lambda at: _refusal(model, rule, at, call, schedule))
    refuse_at_end(found.at_end, found.rest, advice)
    if call.example is not None:
        table = cover(quiet(attached, is_run=False), call.example, found.seen)
        table.refuse(advice.for_all() if table.violations and schedule is stored else "")
    return attached


def _attach(
    model: Any, rule: Rule, rngs: nnx.Rngs, at: Any, call: Call, *, schedule: Schedule
) -> tuple[Attached, Placed]:
    """Puts a rule on a copy of a model, unchecked."""
    model = _copy(model)
    if rule.weights is not None:
        refuse_unmatched("at", at, list(sites_of(model)), under=True)
        model = factorise_chosen(model, rule.weights, _chooser(at))
    put: Any = put_direct if is_direct(rule) else _put_layerwise
    found = put(model, rule, rngs, at, call)
    read_from_memory(model)
    options = call._asdict() | {"allow": (*call.allow, *found.backprop), "note": found.note, "error": found.error}
    return Attached(model, rule, own=found.own, forward=forward_by(schedule, model, rule), **options), found


def _refusal(model: Any, rule: Rule, at: tuple[str, ...], call: Call, schedule: Schedule) -> str:
    """What attach would say with other places in at=, in one line; nothing if it would take them."""
    try:
        attached, found = _attach(model, rule, nnx.Rngs(0), at, call, schedule=schedule)
        refuse_at_end(found.at_end)
        if call.example is not None:
            cover(quiet(attached, is_run=False), call.example, found.seen).refuse()
    except (TypeError, ValueError) as error:
        lines = str(error).splitlines()
        return next((line for line in lines if line.startswith("- ")), lines[0]).removeprefix("- ")
    return ""


def _example(example: Any, kwargs: dict[str, Any] | None) -> Example | None:
    if example is None and not kwargs:
        return None
    return Example.of(() if example is None else example if isinstance(example, tuple) else (example,), kwargs or {})


def _check_method(model: Any, method: str) -> None:
    if not callable(getattr(model, method, None)):
        own = [name for name in dir(type(model)) if not name.startswith("_") and name not in dir(nnx.Module)]
        raise TypeError(
            f"{type(model).__name__} has no method {method!r}; its own are {own}. Say with method= which one is called."
        )


def _check(model: Any, rule: Any, rngs: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(f"attach(model, rule) expects an nnx.Module, got {model!r}.")
    if not isinstance(rule, Rule):
        mend = (
            f" Did you mean {rule.__module__.partition('.')[0]}.{rule.__name__}()?" if inspect.isfunction(rule) else ""
        )
        raise TypeError(f"attach(model, rule) expects a jaxfa.Rule such as jaxfa.fa(), got {rule!r}.{mend}")
    if any(isinstance(part, Attached | Contraction | Tap) for _, part in modules_of(model)):
        raise ValueError("This model already has a rule; attach the next one to jaxfa.nn.plain(attached).")
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"attach needs rngs=nnx.Rngs(seed), from which the feedback is drawn; got {rngs!r}.")
    if "feedback" not in rngs and "default" not in rngs:
        raise ValueError(
            f"attach draws the feedback from rngs.feedback(), but these streams are {list(rngs)}: give it "
            f"nnx.Rngs(feedback=seed), or nnx.Rngs(seed) for all streams."
        )
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model))):
        raise ValueError(
            "This model has shapes in the place of arrays, as nnx.eval_shape makes it, and its feedback would have "
            "none. Make the model first, or attach inside: nnx.eval_shape(lambda: jaxfa.nn.attach(make(), rule, ...))."
        )


def _copy(model: nnx.Module) -> Any:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, may_alias=False))  # no array's copy is compiled


def _globs(patterns: str | tuple[str, ...] | None) -> Any:
    return (patterns,) if isinstance(patterns, str) else patterns


def _chooser(globs: Any) -> Callable[[str], bool]:
    return lambda path: globs is None or matches(path, globs, under=True)


def _put_layerwise(model: Any, rule: Rule, rngs: nnx.Rngs, at: Any, call: Call) -> Placed:
    """Puts a layer-wise rule on a model."""
    sites = sites_of(model)
    forward = look_at_layers(model, method_of(call.method), call.example) if call.example else None
    first = {path for path, use in uses_in(*forward).items() if use.first} if forward else set()
    chosen = {
        path: (module, site)
        for path, (module, site) in sites.items()
        if (rule.weights is None or isinstance(module, Factored)) and path not in first and _chooser(at)(path)
    }

    backprop, placed, draw = [], [], drawing(rule)
    for path, (module, site) in chosen.items():
        kernel = module.kernel.get_value()
        feedback = at_once(draw(path, site.layers(kernel)), rngs.feedback(), site.matrices(kernel))
        if feedback is None:
            backprop.append(path)
        else:
            place(module, Contraction(site, feedback, path))
            placed.append(path)
    looks = forward is not None and rule.weights is None
    found = look_through(*forward, layers=placed) if forward and looks else Survey({}, set(), set(), {})
    names = dict.fromkeys(site.name for site in found.sites)
    paths = [*sites, *names]
    refuse_unmatched("at", at, paths, under=True)
    refuse_unmatched("the rule's globs", rule.globs, paths, under=True)
    free = [name for name in names if _chooser(at)(name) and not matches(name, call.allow, under=True)]
    own, exact = put_own(rule, rngs, {site: one for site, one in found.sites.items() if site.name in free})
    left = found.sites.keys() - {one.site for one in own}
    others = tuple(site for site in found.sites if site in left)
    return Placed([*backprop, *exact], (own, others), seen=(lambda: found) if looks else None)
