"""Which modules of a model are tapped, what is seen there, and the feedback that leads to them."""

import itertools
from typing import Any

import jax
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr

from jaxfa.base import Layer, Rule, init_at, matches
from jaxfa.delivery import for_each
from jaxfa.jaxprs.versions import opened
from jaxfa.nn.contraction import find_site
from jaxfa.nn.factored import Factored
from jaxfa.nn.leaves import error_in
from jaxfa.nn.program import Example, Program, method_of
from jaxfa.nn.tap import holders_of, refuse_calls, remove_taps, tap_parameters, taps_of
from jaxfa.nn.variables import Feedback, Recorder, init_stack, modules_of, structs


def stacks_of(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """For every tap the shape of the stack that it is in, ``()`` for a single module."""
    return {
        tap.path: () if tap.place.kind == "parameter" else _stack_of(module) for module, _, tap in holders_of(model)
    }


def _stack_of(module: Any) -> tuple[int, ...]:
    for _, layer in modules_of(module):
        site = find_site(layer)
        if site is not None:
            return site.stack(layer.kernel.get_value())
    return ()


def fill_taps(model: nnx.Module, rule: Rule, rngs: nnx.Rngs, seen: dict[str, dict[str, Any]], error: Any) -> None:
    """Makes every tap's feedback.

    Args:
      model: with taps in it.
      rule: a direct rule.
      rngs: for the feedback.
      seen: the shapes of the activations at every tap, by path and leaf.
      error: the output error's shape.
    """
    stacks = stacks_of(model)
    owners, taps = {tap.path: module for module, _, tap in holders_of(model)}, taps_of(model)
    keys = {path: rngs.feedback() for path, tap in taps.items() if tap.is_receiver}
    shared = None
    for path in sorted(keys, key=lambda path: -max(one.size for one in seen[path].values())):
        # A shared feedback is made for the largest.
        tap, stack = taps[path], stacks[path]
        tap.leaves = tuple(seen[path])
        if shared is None:
            split = jax.random.split(keys[path], len(tap.leaves)) if len(tap.leaves) > 1 else [keys[path]]
            value: Any = {}
            for (name, h), key in zip(seen[path].items(), split, strict=True):
                init = init_at(rule, path=tap.place.path, layer=_layer(owners[path], h))
                value[name] = init_stack(lambda key, init=init, h=h: init(key, h, error), key, stack)
            first = next(iter(value.values()))
            if first is None:
                tap.leaves = ()
                continue
            tap.feedback = nnx.data(Feedback(value if len(value) > 1 and not first.shared else first))
            shared = tap.feedback if first.shared else None
        else:
            tap.feedback = nnx.data(shared)
        if shared is not None and stack:
            raise ValueError(f"A feedback shared by all layers can't be inside the stack {path!r}; use one per layer.")


def _layer(module: Any, h: Any) -> Layer | None:
    """The layer that a tapped input enters, for rules that ask; only factored ones are needed."""
    return Layer(module.operation, h, module.kernel.get_value()) if isinstance(module, Factored) else None


def check_calls(model: nnx.Module, calls: dict[str, list[Any]]) -> None:
    """Refuses a tap that is called with several shapes, none of which has a feedback of its own."""
    for path, tap in taps_of(model).items():
        for name, feedback in tap.feedbacks().items():
            shapes = list(dict.fromkeys(seen[name].shape[1:] for seen in calls[path] if name in seen))
            if len(shapes) > 1 and not feedback.shared:
                raise ValueError(
                    f"The tap {path!r} is called with several shapes (of one example: {', '.join(map(str, shapes))}), "
                    f"and a feedback is for one. Tap what reads its outputs, or give each call a module of its own."
                )


def follow(model: nnx.Module, recorder: Recorder) -> None:
    """Lets one tap alone deliver the error where several are at one activation: at inputs of what reads it.

    Where it is a tapped output, that tap does it, and those at inputs go.
    """
    leaders: dict[Any, str] = {}
    taps = taps_of(model)
    inputs = [path for path, tap in taps.items() if tap.place.kind == "input"]
    outputs = {tuple(map(id, recorder.sources[path])) for path in taps if path not in inputs}
    for path, given in list(recorder.sources.items()):
        if path in inputs:
            source = tuple(map(id, given))
            leader = leaders.setdefault(source, path)
            taps[path].follows = leader if leader != path else None
            taps[path].leaves = ("",)
            if source in outputs:
                del recorder.seen[path]
    remove_taps(model, lambda tap: tap.path not in recorder.seen)


def drop_unused(model: nnx.Module, seen: Any, globs: Any, allow: Any) -> None:
    """Takes the taps away that the forward pass does not come to; refuses a glob that names no other.

    The gradient of a call that comes there will be refused.
    """
    names = {path: str(tap.place) for path, tap in taps_of(model).items()}
    unused = [path for path in names if path not in seen]
    for glob in globs or ():
        if any(matches(names[path], (glob,)) for path in unused) and not any(
            matches(names[path], (glob,)) for path in seen
        ):
            raise ValueError(f"The forward pass never called the tapped modules {unused}; name modules that it calls.")
    unseen = {tap.place.path: module for module, _, tap in holders_of(model) if tap.path in unused}
    remove_taps(model, lambda tap: tap.path in unused)
    refuse_unseen(unseen, allow)


def refuse_unseen(modules: dict[str, Any], allow: Any) -> None:
    """Lets modules that the example's call does not come to refuse the gradient of a call that does."""
    for path, module in modules.items():
        if not matches(path, allow, under=True):
            refuse_calls(module, path)


def record_taps(model: nnx.Module, method: str, example: Example) -> dict[str, dict[str, Any]]:
    """The shapes of the activations at every tap, in the order of the forward pass."""
    return _recorded(model, method, example, lambda out: None)[0].seen


def measure_taps(
    model: nnx.Module, method: str, example: Example, logits: Any, known: tuple[tuple[int, ...], set[int]] | None = None
) -> tuple[Recorder, Any, int]:
    """What :func:`record_taps` records, the error's shape, and how many times larger than true the batch is in them.

    The batch axis is known by making the batch larger by a factor that no size has; where the model runs with no other
    batch than it has, an axis of the batch's size is taken for it, and that factor is 0.

    Args:
      model: with taps in it.
      method: the model's method that is called.
      example: the arguments.
      logits: which of the outputs are the logits.
      known: the logits' shape and all sizes of axes, if they are known; they cost a pass.
    """

    def of(out: Any) -> Any:
        return error_in(out, logits)

    def measured() -> tuple[Recorder, Any]:
        return _recorded(model, method, example, of)

    plain = None
    if known is None:
        plain = measured()
        known = _sizes(*plain)
    shape, sizes = known
    # Small, since a model may loop over an axis.
    mark = next(factor for factor in itertools.count(2) if all(size % factor for size in sizes if size))
    for axis in (0, 1):
        larger = example.marked(axis, mark)
        try:
            found, marked = _recorded(model, method, larger, of) if larger else plain or measured()
        except Exception:
            continue
        if marked.shape[0] == shape[0] * mark:
            return found, marked, mark
    return *(plain or measured()), 0


def _sizes(recorder: Recorder, error: Any) -> tuple[tuple[int, ...], set[int]]:
    shapes = [error.shape, *(leaf.shape for leaves in recorder.seen.values() for leaf in leaves.values())]
    return error.shape, {size for shape in shapes for size in shape}


def _recorded(model: nnx.Module, method: str, example: Example, of: Any) -> tuple[Recorder, Any]:
    recorder = Recorder()

    def prepare(copy: Any) -> None:
        for tap in taps_of(copy).values():
            tap.recorder = recorder
        tap_parameters(copy)

    return recorder, Program(model, method_of(method), *example.arguments()).abstractly(of, prepare)


def check_source(model: nnx.Module, source: str, order: list[str]) -> None:
    """Refuses a source that no tap comes before, or of which there are several."""
    if source in order[:1]:
        raise ValueError(f"No tapped module comes before the source {source!r}: {order} is the forward pass's order.")
    if stacks_of(model)[source]:
        raise ValueError(f"The source {source!r} is inside a stack of layers; name a module outside of it.")


def end_at(model: nnx.Module, source: str, order: list[str]) -> None:
    """Lets the error be taken at the source; what comes after it needs no tap."""
    above = order[order.index(source) + 1 :]
    remove_taps(model, lambda tap: tap.path in above)
    tap = taps_of(model)[source]
    tap.is_source, tap.follows, tap.leaves = True, None, ("",)


def only_leaf(leaves: dict[str, Any], path: str) -> Any:
    """The one array at a source."""
    if len(leaves) != 1:
        raise ValueError(f"A source is a module that returns one array of floats; {path!r} has {sorted(leaves)}.")
    return next(iter(leaves.values()))


def tappable(model: nnx.Module, seen: dict[str, Any], error: Any, mark: int) -> tuple[dict[str, dict[str, Any]], Any]:
    """Of what :func:`measure_taps` found the arrays to which an error can be delivered, and the error; of true sizes.

    Raises:
      ValueError: if a tapped module has none.
    """
    taps = taps_of(model)
    found = {}
    for path, tap in taps.items():
        if tap.place.kind == "parameter":
            shape = for_each(seen[path][""].shape, true_size(error, mark).shape[0])
            found[path] = {"": jax.ShapeDtypeStruct(shape, seen[path][""].dtype)}
            continue
        leaves = {name: h for name, h in seen[path].items() if h.shape[:1] == error.shape[:1]}
        if not leaves:
            given, wanted = [true_size(h, mark).shape for h in seen[path].values()], true_size(error, mark).shape
            raise ValueError(
                f"Direct feedback needs an activation with the logits' batch axis first: expected h of shape "
                f"({wanted[0]}, ..., n) at the tap {path!r} for logits {wanted}, got {given}. "
                f"Tap a module before the batch axis is merged with others, or moved."
            )
        found[path] = {name: true_size(h, mark) for name, h in leaves.items()}
    return found, true_size(error, mark)


def true_size(marked: Any, mark: int) -> jax.ShapeDtypeStruct:
    """The shape of an array that was measured, in the example's own batch."""
    sizes = (size // mark if mark and size % mark == 0 else size for size in marked.shape)
    return jax.ShapeDtypeStruct(tuple(sizes), marked.dtype)


def that_are_read(model: nnx.Module, call: Any, found: dict[str, dict[str, jax.ShapeDtypeStruct]]) -> dict[str, Any]:
    """Of several arrays at a tap those that the logits depend on, such as a hidden state and not a cache."""
    several = {path: leaves for path, leaves in found.items() if len(leaves) > 1}
    if not several:
        return found
    program = Program(model, method_of(call.method), *call.example.arguments())

    def logits(shifts: Any, states: Any) -> jax.Array:
        def prepare(copy: Any) -> None:
            for path, tap in taps_of(copy).items():
                tap.shift = nnx.Variable(shifts[path]) if path in shifts else None
            tap_parameters(copy)

        return error_in(program.returned(program.run(*states, prepare=prepare)[0]), call.logits)

    jaxpr = opened(jax.make_jaxpr(logits)(several, structs(program.states)))
    _, used = dce_jaxpr(jaxpr, [True])
    flags = jax.tree.unflatten(jax.tree.structure(several), used[: len(jax.tree.leaves(several))])
    read = {path: {name: h for name, h in leaves.items() if flags[path][name]} for path, leaves in several.items()}
    return found | {path: leaves or found[path] for path, leaves in read.items()}
