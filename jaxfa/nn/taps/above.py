"""The tapped modules of a model as functions, for rules that make networks of what is above a tap."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfa.base import Layer
from jaxfa.nn.model.cotangents import is_float
from jaxfa.nn.model.leaves import is_node, named_floats
from jaxfa.nn.model.program import Example, Program, method_of
from jaxfa.nn.model.variables import Recorder, intercept, modules_of, structs, value_of
from jaxfa.nn.taps.tap import Held, plain_of
from jaxfa.nn.taps.taps import stacks_of
from jaxfa.nn.weights.contraction import find_site


@dataclass(frozen=True)
class Block:
    """A module as a function ``(x, (params, state)) -> y`` of one array. Equal ones are one program.

    Attributes:
      module: the module, blank.
      args: what it is called with after ``x``.
      kwargs: likewise, by name.
      is_layer: whether it is a layer by itself, whose nonlinearity the model applies.
    """

    module: Example
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    is_layer: bool

    def __call__(self, x: jax.Array, w: Any) -> jax.Array:
        """Runs the module; its state stays as it is."""
        (module,), _ = self.module.arguments()
        values = w[0] | w[1]
        flat = nnx.to_flat_state(nnx.state(module))
        nnx.update(module, nnx.from_flat_state([(p, _put(leaf, values.get(_name(p)))) for p, leaf in flat]))
        # The first array of several outputs, such as a hidden state and a cache.
        y = next(iter(named_floats(module(x, *self.args, **dict(self.kwargs))).values()))
        return nnx.relu(y) if self.is_layer else y


def surroundings(
    model: nnx.Module, held: dict[str, Held], order: Iterable[str], method: str, example: Example
) -> dict[str, dict[str, Any]]:
    """For every tap the tapped modules above it, as :class:`jaxfa.Layer`, and how many taps are below.

    Args:
      model: with taps in it.
      held: the taps.
      order: their paths, as the forward pass comes to them.
      method: the model's method that is called.
      example: the arguments.
    """
    taps = [held[path].tap for path in order if path in held and held[path].tap.is_receiver]
    blocks = [tap for tap in taps if tap.place.kind != "parameter"]
    # The layer that the last tap enters makes the logits.
    last = {tap.place.path for tap in blocks[-1:] if tap.place.kind == "input"}
    later, below = {}, {}
    for i, tap in enumerate(taps):
        rest = taps[i if tap.place.kind == "input" else i + 1 :]
        paths = dict.fromkeys(one.place.path for one in rest if one in blocks)
        later[tap.path] = [path for path in paths if path not in last]
        below[tap.path] = sum(one in blocks for one in taps[:i])
    stacked = stacks_of(held)
    stacks = {tap.place.path for tap in blocks if stacked[tap.path]}
    layers = _as_layers(plain_of(model), {path for paths in later.values() for path in paths}, stacks, method, example)
    return {path: {"above": tuple(layers[one] for one in paths), "below": below[path]} for path, paths in later.items()}


def _as_layers(model: Any, paths: set[str], stacks: set[str], method: str, example: Example) -> dict[str, Layer]:
    recorder, probe = Recorder(), nnx.clone(model)
    for path, module in list(modules_of(probe)):
        if path in paths:
            module.called = nnx.static((path, recorder))
            intercept(module, _called)
    Program(probe, method_of(method), *example.arguments()).abstractly(lambda out: None)
    modules, found = dict(modules_of(model)), {}
    for path in sorted(paths):
        layer = None if path in stacks else _as_layer(modules[path], *recorder.seen[path])
        if layer is None:
            raise ValueError(
                f"This rule makes networks of the model's tapped modules, and {path!r} is a stack of layers, or is "
                f"called with more than one array, or with whole numbers: name others with at=, or take a rule whose "
                f"heads are its own, such as jaxfa.local_classifier()."
            )
        found[path] = layer
    return found


def _called(self: Any, own_call: Any, *args: Any, **kwargs: Any) -> Any:
    path, recorder = self.called
    recorder.record(path, (own_call, structs(args), structs(kwargs)))
    return own_call(self, *args, **kwargs)


def _as_layer(module: Any, own_call: Callable[..., Any], args: Any, kwargs: Any) -> Layer | None:
    """A module as a function of the array that it is called with; None if there are others, or it is none."""
    if not args:  # then the first is among the keywords
        name = next((name for name in inspect.signature(own_call).parameters if name in kwargs), None)
        args, kwargs = (kwargs.get(name),), {other: one for other, one in kwargs.items() if other != name}
    given, *args = args
    others = [
        leaf for leaf in jax.tree.leaves((args, kwargs), is_leaf=is_node) if is_node(leaf) or hasattr(leaf, "shape")
    ]
    if others or list(named_floats(given)) != [""]:
        return None
    module = nnx.clone(module)
    # Neither masks, which would be the same at every step, nor statistics of activations that are not these.
    module.set_attributes(nnx.Dropout, rate=0.0, raise_if_not_found=False)
    module.set_attributes(nnx.MultiHeadAttention, dropout_rate=0.0, raise_if_not_found=False)
    module.set_attributes(nnx.BatchNorm, use_running_average=False, raise_if_not_found=False)
    floats = [(path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(module)) if is_float(leaf)]
    params: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for path, leaf in floats:
        (params if isinstance(leaf, nnx.Param) else state)[_name(path)] = value_of(leaf)
    block = Block(Example.of((module,), {}), tuple(args), tuple(kwargs.items()), find_site(module) is not None)
    return Layer(block, given, (params, state))


def _name(path: Any) -> str:
    return ".".join(map(str, path))


def _put(leaf: Any, value: Any) -> Any:
    value = jax.tree.map(jnp.asarray, value_of(leaf)) if value is None else value
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value
