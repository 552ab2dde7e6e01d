"""What is seen at a model's taps, and of it the arrays to which an error can be delivered."""

import itertools
from typing import Any

import jax
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr

from jaxfa.delivery import for_each
from jaxfa.jaxprs.versions import opened
from jaxfa.nn.leaves import error_in
from jaxfa.nn.program import Example, Program, method_of
from jaxfa.nn.tap import tap_parameters, taps_of
from jaxfa.nn.variables import Recorder, structs


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

    def end(out: Any) -> Any:
        recorder.end = of(out)
        return recorder.end

    return recorder, Program(model, method_of(method), *example.arguments()).abstractly(end, prepare)


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
