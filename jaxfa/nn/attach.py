"""Puts a rule on an unmodified NNX model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxfa.base import Rule, init_at, is_direct
from jaxfa.nn.aligned import Aligned
from jaxfa.nn.contraction import Contraction, place, sites_of
from jaxfa.nn.dispatch import call_dispatched, check_dispatches
from jaxfa.nn.factored import Factored, factorise_chosen
from jaxfa.nn.program import Example, method_of
from jaxfa.nn.put import Call, advise, put_direct, refuse_unmatched
from jaxfa.nn.stream import call_streamed, check_streams
from jaxfa.nn.survey import Survey, put_own, survey
from jaxfa.nn.tap import Tap, plain_of
from jaxfa.nn.trace import uses_of
from jaxfa.nn.variables import init_stack, modules_of
from jaxfa.paths import matches


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
    schedule: str = "stored",
    mesh: Mesh | None = None,
) -> Aligned:
    """Puts a rule on a model that knows nothing of it.

    Layer-wise rules take the place of the backward of every ``nnx.Linear``, ``LinearGeneral``, ``Einsum``, ``Conv``
    and ``ConvTranspose``, and so of attention's projections and recurrent cells, and, where the example shows them, of
    the contractions with a parameter that a model makes by itself: ``x @ w``, einsums and convolutions of its own,
    tied heads, LoRA's adapters, experts chosen by an index. Their feedback is the parameter's, whose path they go by;
    where the parameter learns elsewhere, too, as a tied embedding does, Kolen-Pollack's law holds for this part of its
    steps. Direct rules deliver the output error to the places named by ``at``: outputs of modules, inside which the
    backward is exact, inputs, parameters. Without ``at``, to the input of every such layer but the first, or, where
    shortcuts pass these by, to the outputs of blocks; the table's last line says which.

    The arrays of ``nnx.state(aligned)`` are all that need be saved, by orbax, numpy or pickle: the same call of attach
    makes the rest, ``nnx.update(aligned, state)`` puts them back. The model itself, which has the rule's functions in
    it, can be copied by ``copy.deepcopy`` but not pickled.

    Args:
      model: any NNX model; it stays as it is.
      rule: a :class:`jaxfa.Rule`.
      rngs: the feedback is drawn from ``rngs.feedback()``.
      at: globs of module paths, matched segment by segment (``"blocks/*"``): where direct rules tap, also
        ``"input of blocks/0"`` or the path of a parameter; for layer-wise rules and for ``jaxfa.ssa``, the modules in
        which the layers get the rule.
      example: one batch of inputs, an array or a tuple of the model's positional arguments (or their shapes): arrays,
        trees of them, flags, modules such as a cache. With it the gradient is traced and every contraction accounted
        for now; without it, whenever the model is traced. Direct rules need it.
      example_kwargs: keyword arguments, likewise.
      method: the model's method that these are for and that is called by ``aligned(...)``.
      logits: for direct rules of models with several outputs, a function that picks from them those whose error is
        delivered, such as ``lambda out: out[0]``. By default all arrays of floats; several lie side by side.
      allow: globs of layers that may pass errors on by backpropagation; a model's own contractions with these
        parameters get no feedback.
      schedule: ``"stored"`` keeps every activation for the backward pass, as autodiff does; ``"stream"``, for direct
        rules with ``at=``, keeps none: the model runs once more when the error is known, and every tapped block learns
        as it runs, so that memory is set by the largest block (and by what lies between blocks). ``"dispatch"``,
        likewise, keeps the blocks' inputs, and each device along the mesh's axis ``layer`` forms the updates of its own
        share of them. (XLA is slow at dispatched convolutions on a CPU.) The gradients are the same, but for what
        blocks ``sow``, which has none in these two.
      mesh: for ``"dispatch"``, such as ``jaxfa.stacks.mesh(layer=2)``.

    Returns:
      An :class:`Aligned` with a copy of the model.

    Raises:
      ValueError: if a contraction with weights would stay backpropagation unnoticed, if a glob matches nothing, if
        a direct rule has no example, or if a model can't be streamed.
      TypeError: if the model or rule is of another type.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
      >>> aligned = jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(2), example=jnp.ones((5, 4)))
      >>> aligned(jnp.ones((5, 4))).shape
      (5, 3)

    Source: as each rule.
    """
    _check(model, rule, rngs)
    globs, allow = _globs(at), _globs(allow) or ()
    weights = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    refuse_unmatched("allow", allow, weights, under=True)
    _check_method(model, method)
    call = Call(method, logits, _example(example, example_kwargs), allow)
    model = _copy(model)
    if rule.weights is not None:
        refuse_unmatched("at", globs, list(sites_of(model)), under=True)
        model = factorise_chosen(model, rule.weights, _chooser(globs))
    if is_direct(rule):
        backprop, note = put_direct(model, rule, rngs, globs, call)
        own: Any = ((), ())
    else:
        (backprop, own), note = _put_layerwise(model, rule, rngs, globs, call), ""
    forward = _forward(model, rule, schedule, mesh)
    options = call._asdict() | {"allow": (*allow, *backprop), "forward": forward, "note": note}
    aligned = Aligned(model, rule, own=own, **options)
    if call.example is not None:
        table = aligned.coverage()
        table.refuse(advise(plain_of(model), rule, call) if table.violations and forward is None else "")
    return aligned


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
    if not isinstance(model, nnx.Module) or not isinstance(rule, Rule):
        raise TypeError(f"attach(model, rule) expects an nnx.Module and a jaxfa.Rule, got {model!r} and {rule!r}.")
    if any(isinstance(part, Aligned | Contraction | Tap) for _, part in modules_of(model)):
        raise ValueError("This model already has a rule; attach the next one to jaxfa.nn.plain(aligned).")
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"attach needs rngs=nnx.Rngs(seed), from which the feedback is drawn; got {rngs!r}.")


def _forward(model: nnx.Module, rule: Rule, schedule: str, mesh: Mesh | None) -> Any:
    if schedule not in ("stored", "stream", "dispatch"):
        raise ValueError(f"schedule must be 'stored', 'stream' or 'dispatch', got {schedule!r}.")
    if mesh is not None and schedule != "dispatch":
        raise ValueError(f"mesh= is for schedule='dispatch', got {schedule!r}: shard the batch for data parallelism.")
    if schedule == "dispatch":
        return partial(call_dispatched, check_dispatches(model, rule, mesh))
    if schedule == "stream":
        check_streams(model, rule, schedule)
        return call_streamed
    return None


def _copy(model: nnx.Module) -> Any:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a.copy(), state))


def _globs(patterns: str | tuple[str, ...] | None) -> Any:
    return (patterns,) if isinstance(patterns, str) else patterns


def _chooser(globs: Any) -> Callable[[str], bool]:
    return lambda path: globs is None or matches(path, globs, under=True)


def _put_layerwise(model: Any, rule: Rule, rngs: nnx.Rngs, at: Any, call: Call) -> tuple[list[str], Any]:
    """Puts a layer-wise rule on a model; returns the layers that the rule itself leaves to backpropagation."""
    sites = sites_of(model)
    used = {} if call.example is None else uses_of(model, call.method, call.example)
    first = {path for path, use in used.items() if use.first}
    backprop = []
    for path, (module, site) in sites.items():
        if rule.weights is not None and not isinstance(module, Factored):
            continue
        if path in first or (at is not None and not matches(path, at, under=True)):
            continue
        kernel = module.kernel.get_value()
        feedback = init_stack(init_at(rule, path=path), rngs.feedback(), site.layers(kernel), site.matrices(kernel))
        if feedback is None:
            backprop.append(path)
        else:
            place(module, Contraction(site, feedback, path))
    if call.example is None or rule.weights is not None:
        found = Survey({}, set(), set(), {})
    else:
        found = survey(model, method_of(call.method), call.example)
    names = dict.fromkeys(site.name for site in found.sites)
    paths = [*sites, *names]
    refuse_unmatched("at", at, paths, under=True)
    refuse_unmatched("the rule's globs", rule.globs, paths, under=True)
    free = [name for name in names if _chooser(at)(name) and not matches(name, call.allow, under=True)]
    own, exact = put_own(rule, rngs, {site: one for site, one in found.sites.items() if site.name in free})
    left = found.sites.keys() - {one.site for one in own}
    return [*backprop, *exact], (own, tuple(site for site in found.sites if site in left))
