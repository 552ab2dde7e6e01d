"""Direct rules: a tap on a module's output, or on a layer's input, to which the output error is delivered."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfa.base import Layer, Rule, init_at
from jaxfa.nn.contraction import find_site, restore
from jaxfa.nn.factored import Factored
from jaxfa.nn.variables import Feedback, Recorder, abstractly, init_stack, intercept, modules_of, release
from jaxfa.ops import direct


class Wire(nnx.Variable):
    """One tap's error wire during a forward pass; gone when it ends."""


class Tap(nnx.Module):
    """What a tapped module carries: its feedback and, during a pass, its wire; at a rule's source, all the wires.

    In a model that streams it has the walk that runs its module (``stream.py``).
    """

    def __init__(self, path: str, *, at_input: bool) -> None:
        self.path = path
        self.at_input = at_input
        self.feedback = nnx.data(None)
        self.wire = nnx.data(None)
        self.ending = nnx.data(None)
        self.is_source = False
        self.shift = nnx.data(None)
        self.recorder: Recorder | None = None
        self.walk: Any = None

    @property
    def scope(self) -> str:
        """Its path as a name scope, in which a slash would start another."""
        return self.path.replace("/", ".")

    def __call__(self, h: jax.Array) -> jax.Array:
        """Passes ``h`` on unchanged; its error will come from the output."""
        if not isinstance(h, jax.Array):
            raise TypeError(f"A direct rule taps modules that return one array; {self.path!r} gave {type(h).__name__}.")
        if self.recorder is not None:
            self.recorder.record(self.path, jax.ShapeDtypeStruct(h.shape, h.dtype))
            return h
        if self.shift is not None:
            return h + self.shift[...].astype(h.dtype)
        if self.ending is not None:
            return _with_wires(h, self.ending)
        if self.feedback is None:
            return h
        if self.wire is None:
            raise RuntimeError(
                f"The tap at {self.path!r} has no error wire: call the Aligned model that jaxfa.nn.attach returned, "
                f"not its .model, or take jaxfa.nn.plain(aligned) for true gradients."
            )
        with jax.named_scope(f"tap[{self.scope}]"):
            h, wire = direct(h, self.wire[...], self.feedback.get_value())
        self.wire[...] = wire
        return h


def place_tap(module: Any, path: str, *, at_input: bool) -> None:
    """Taps a module's output, or its input."""
    module.feedback_tap = nnx.data(Tap(path, at_input=at_input))
    intercept(module, _tapped_input if at_input else _tapped_output)


def remove_tap(module: Any) -> None:
    """Undoes :func:`place_tap`, where it was done."""
    if hasattr(module, "feedback_tap"):
        del module.feedback_tap
        release(module)


def plain_of(model: nnx.Module) -> Any:
    """A model without the rule that was put on it, which shares its variables."""
    model = nnx.clone(model, variables=False)
    for _, module in list(modules_of(model)):
        restore(module)
        remove_tap(module)
    return model


def _tapped_input(self: Any, own_call: Any, h: jax.Array, *args: Any, **kwargs: Any) -> Any:
    return own_call(self, self.feedback_tap(h), *args, **kwargs)


def _tapped_output(self: Any, own_call: Any, *args: Any, **kwargs: Any) -> jax.Array:
    tap = self.feedback_tap
    if tap.walk is not None and tap.feedback is not None:
        return tap.walk.visit(tap, self, own_call, args, kwargs)
    return self.feedback_tap(own_call(self, *args, **kwargs))


def taps_of(model: nnx.Module) -> dict[str, tuple[Tap, tuple[int, ...]]]:
    """The taps of a model by path, each with the shape of the stack that it is in (``()`` for a single module)."""
    found = {}
    for _, module in modules_of(model):
        if hasattr(module, "feedback_tap"):
            found[module.feedback_tap.path] = (module.feedback_tap, _stack_of(module))
    return dict(sorted(found.items()))


def _stack_of(module: Any) -> tuple[int, ...]:
    for _, layer in modules_of(module):
        site = find_site(layer)
        if site is not None:
            return site.stack(layer.kernel.get_value())
    return ()


def fill_taps(model: nnx.Module, rule: Rule, rngs: nnx.Rngs, args: tuple[Any, ...]) -> None:
    """Makes every tap's feedback from one abstract forward pass; taps from the rule's source on are undone."""
    seen = record_taps(model, args, {})
    logits = logits_of(model, args, {})
    unused = [path for path in taps_of(model) if path not in seen]
    if unused:
        raise ValueError(f"The forward pass never called the tapped modules {unused}; name modules that it calls.")
    if rule.source is not None:
        logits = seen[rule.source]
        _end_at(model, rule.source, list(seen))
    taps = {path: found for path, found in taps_of(model).items() if not found[0].is_source}
    owners = {module.feedback_tap.path: module for _, module in modules_of(model) if hasattr(module, "feedback_tap")}
    keys = {path: rngs.feedback() for path in taps}
    shared = None
    for path in sorted(taps, key=lambda path: -seen[path].size):  # a shared feedback is made for the largest
        tap, stack = taps[path]
        if shared is None:
            init = init_at(rule, path=path, layer=_layer(owners[path], seen[path]))
            value = init_stack(lambda key, path=path, init=init: init(key, seen[path], logits), keys[path], stack)
            if value is None:
                continue
            tap.feedback = nnx.data(Feedback(value))
            shared = tap.feedback if value.shared else None
        else:
            tap.feedback = nnx.data(shared)
        if shared is not None and stack:
            raise ValueError(f"A feedback shared by all layers can't be inside the stack {path!r}; use one per layer.")


def _layer(module: Any, h: Any) -> Layer | None:
    """The layer that a tapped input enters, for rules that ask; only factored ones are needed."""
    return Layer(module.operation, h, module.kernel.get_value()) if isinstance(module, Factored) else None


def record_taps(model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The shape of the activation at every tap, in the order of the forward pass."""
    recorder, probe = Recorder(), nnx.clone(model, variables=False)
    for tap, _ in taps_of(probe).values():
        tap.recorder = recorder
    abstractly(lambda model, *args, **kwargs: model(*args, **kwargs), probe, args, kwargs)
    return recorder.seen


def check_source(model: nnx.Module, source: str, seen: dict[str, Any]) -> None:
    """Refuses a source that no tap comes before, or of which there are several."""
    order = list(seen)
    if source in order[:1]:
        raise ValueError(f"No tapped module comes before the source {source!r}: {order} is the forward pass's order.")
    if taps_of(model)[source][1]:
        raise ValueError(f"The source {source!r} is inside a stack of layers; name a module outside of it.")


def _end_at(model: nnx.Module, source: str, order: list[str]) -> None:
    """Lets the wires end at the source; what comes after it needs no tap."""
    above = order[order.index(source) + 1 :]
    for _, module in list(modules_of(model)):
        if hasattr(module, "feedback_tap") and module.feedback_tap.path in above:
            remove_tap(module)
    taps_of(model)[source][0].is_source = True


def logits_of(model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.ShapeDtypeStruct:
    """The shape of a model's logits for these inputs."""
    logits = abstractly(lambda model, *args, **kwargs: model(*args, **kwargs), model, args, kwargs)
    if not isinstance(logits, jax.ShapeDtypeStruct):
        raise TypeError(f"A direct rule needs a model that returns its logits, one array; got {logits}.")
    if logits.ndim < 2:
        raise ValueError(f"A direct rule needs logits (N, ..., C), got {logits.shape}; keep the last axis of size 1.")
    return logits


def call_with_wires(model: nnx.Module, plain: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.Array:
    """Runs a tapped model: gives every tap a wire and adds the wires to the logits, or to the rule's source."""
    # The wires are laid in a copy that shares the variables: the user's modules may be of an outer trace, which no
    # attribute can be set in, and a pass that fails midway leaves nothing behind.
    wired = nnx.clone(model, variables=False)
    taps = {path: found for path, found in taps_of(wired).items() if found[0].feedback is not None}
    source = next((tap for tap, _ in taps_of(wired).values() if tap.is_source), None)
    end = logits_of(plain, args, kwargs) if source is None else _source_of(model, source.path, args, kwargs)
    for tap, stack in taps.values():
        tap.wire = Wire(jnp.zeros((*stack, *end.shape), end.dtype))
    wires = [tap.wire for tap, _ in taps.values()]
    if source is not None:
        source.ending = nnx.List(wires)
    logits = wired(*args, **kwargs)
    logits = _with_wires(logits, wires) if source is None else logits
    sown = nnx.state(wired, nnx.Intermediate)
    if sown:
        nnx.update(model, sown)
    return logits


def _source_of(model: nnx.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.ShapeDtypeStruct:
    seen = record_taps(model, args, kwargs)
    if path not in seen:
        raise ValueError(f"This call never reaches the rule's source {path!r}, where its error is taken.")
    return seen[path]


def _with_wires(h: jax.Array, wires: Any) -> jax.Array:
    # They end side by side instead of one after the other: each one's gradient is e itself, and nothing has to be
    # handed from block to block through the user's own forward pass.
    for wire in wires:
        h = h + wire[...].sum(tuple(range(wire.ndim - h.ndim)))
    return h
