"""Which modules of a model are tapped, what is seen there, and the feedback that leads to them."""

from functools import partial
from typing import Any

import jax
from flax import nnx

from jaxfa.base import Layer, Rule
from jaxfa.delivery import undifferentiated
from jaxfa.nn.model.leaves import at_leaves, named_floats
from jaxfa.nn.model.program import at_once, is_transformed
from jaxfa.nn.model.variables import Feedback, Recorder, init_at, init_stack, intercept, modules_of
from jaxfa.nn.taps.tap import Held, remove_taps
from jaxfa.nn.weights.contraction import find_site
from jaxfa.nn.weights.factored import Factored
from jaxfa.paths import matches


def stacks_of(held: dict[str, Held]) -> dict[str, tuple[int, ...]]:
    """For every tap the shape of the stack that it is in, ``()`` for a single module."""
    return {path: () if one.parameter is not None else _stack_of(one.module) for path, one in held.items()}


def _stack_of(module: Any) -> tuple[int, ...]:
    for _, layer in modules_of(module):
        site = find_site(layer)
        if site is not None:
            return site.stack(layer.kernel.get_value())
    return ()


def fill_taps(
    held: dict[str, Held], rule: Rule, rngs: nnx.Rngs, seen: dict[str, dict[str, Any]], error: Any, *, around: Any
) -> None:
    """Makes every tap's feedback.

    Args:
      held: the taps.
      rule: a direct rule.
      rngs: for the feedback.
      seen: the shapes of the activations at every tap, by path and leaf.
      error: the output error's shape.
      around: what else a rule is told of a tap, by path.
    """
    stacks = stacks_of(held)
    keys = {path: rngs.feedback() for path, one in held.items() if one.tap.is_receiver}
    order = sorted(keys, key=lambda path: -max(one.size for one in seen[path].values()))

    def draw(path: str, own: jax.Array) -> dict[str, Any]:
        module, _, tap = held[path]
        split = jax.random.split(own, len(seen[path])) if len(seen[path]) > 1 else [own]
        found = {}
        for (name, h), key in zip(seen[path].items(), split, strict=True):
            init = init_at(rule, path=tap.place.path, layer=_layer(module, h), **around.get(path, {}))
            found[name] = init_stack(lambda key, init=init, h=h: init(key, h, error), key, stacks[path])
        return found

    shared = None
    for path in order:
        tap = held[path].tap
        tap.leaves, sizes = tuple(seen[path]), tuple((name, h.shape[1:]) for name, h in seen[path].items())
        tap.sizes = nnx.static(sizes)
        if shared is None:
            value = at_once(partial(draw, path), keys[path])
            first = value[tap.leaves[0]]
            if first is None:
                tap.leaves = ()
                continue
            tap.feedback = nnx.data(Feedback(value if len(value) > 1 and not first.shared else first))
            shared = tap.feedback if first.shared else None  # made for the largest
        else:
            tap.feedback = nnx.data(shared)
        if shared is not None and stacks[path]:
            raise ValueError(f"A feedback shared by all layers can't be inside the stack {path!r}; use one per layer.")


def _layer(module: Any, h: Any) -> Layer | None:
    """The layer that a tapped input enters, for rules that ask; only factored ones are needed."""
    return Layer(module.operation, h, module.kernel.get_value()) if isinstance(module, Factored) else None


def check_calls(held: dict[str, Held], calls: dict[str, list[Any]]) -> None:
    """Refuses a tap that is called with several shapes, none of which has a feedback of its own."""
    for path, (_, _, tap) in held.items():
        for name, feedback in tap.feedbacks().items():
            shapes = list(dict.fromkeys(seen[name].shape[1:] for seen in calls[path] if name in seen))
            if len(shapes) > 1 and not feedback.shared:
                raise ValueError(
                    f"The tap {path!r} is called with several shapes (of one example: {', '.join(map(str, shapes))}), "
                    f"and a feedback is for one. Tap what reads its outputs, or give each call a module of its own."
                )


def follow(held: dict[str, Held], recorder: Recorder) -> None:
    """Lets one tap alone deliver the error where several are at one activation: at inputs of what reads it.

    Where it is a tapped output, that tap does it, and those at inputs go.
    """
    leaders: dict[Any, str] = {}
    inputs = [path for path, one in held.items() if one.tap.place.kind == "input"]
    outputs = {tuple(map(id, recorder.sources[path])) for path in held if path not in inputs}
    for path, given in list(recorder.sources.items()):
        if path in inputs:
            source = tuple(map(id, given))
            leader = leaders.setdefault(source, path)
            tap = held[path].tap
            tap.follows, tap.leaves = leader if leader != path else None, ("",)
            if source in outputs:
                del recorder.seen[path]
    remove_taps(held, held.keys() - recorder.seen.keys())


def drop_unused(held: dict[str, Held], seen: Any, globs: Any, allow: Any) -> None:
    """Takes the taps away that the forward pass does not come to; refuses a glob that names no other.

    The gradient of a call that comes there will be refused.
    """
    names = {path: str(one.tap.place) for path, one in held.items()}
    unused = [path for path in names if path not in seen]
    for glob in globs or ():
        if any(matches(names[path], (glob,)) for path in unused) and not any(
            matches(names[path], (glob,)) for path in seen
        ):
            raise ValueError(f"The forward pass never called the tapped modules {unused}; name modules that it calls.")
    unseen = {held[path].tap.place.path: held[path].module for path in unused}
    remove_taps(held, unused)
    refuse_unseen(unseen, allow)


def refuse_unseen(modules: dict[str, Any], allow: Any) -> None:
    """Lets modules that the example's call does not come to refuse the gradient of a call that does."""
    for path, module in modules.items():
        if not matches(path, allow, under=True):
            refuse_calls(module, path)


def check_source(held: dict[str, Held], source: str, order: list[str]) -> None:
    """Refuses a source that no tap comes before, or of which there are several."""
    if source in order[:1]:
        raise ValueError(f"No tapped module comes before the source {source!r}: {order} is the forward pass's order.")
    if stacks_of(held)[source]:
        raise ValueError(f"The source {source!r} is inside a stack of layers; name a module outside of it.")


def end_at(held: dict[str, Held], source: str, order: list[str]) -> None:
    """Lets the error be taken at the source; what comes after it needs no tap."""
    remove_taps(held, order[order.index(source) + 1 :])
    tap = held[source].tap
    tap.is_source, tap.follows, tap.leaves = True, None, ("",)


def only_leaf(leaves: dict[str, Any], path: str) -> Any:
    """The one array at a source."""
    if len(leaves) != 1:
        raise ValueError(f"A source is a module that returns one array of floats; {path!r} has {sorted(leaves)}.")
    return next(iter(leaves.values()))


def refuse_calls(module: Any, path: str) -> None:
    """Lets a module that the example's call does not come to refuse the gradient of a call that does."""
    module.unseen_path = path
    intercept(module, _unseen)


def _unseen(self: Any, own_call: Any, *args: Any, **kwargs: Any) -> Any:
    h = own_call(self, *args, **kwargs)
    reason = (
        f"This call comes to {self.unseen_path!r}, which the example of attach() does not, so that it would learn by "
        f"backpropagation: give attach() an example of this call, or allow={self.unseen_path!r}."
    )
    return at_leaves(h, dict.fromkeys(named_floats(h), partial(undifferentiated, reason))) if is_transformed() else h
