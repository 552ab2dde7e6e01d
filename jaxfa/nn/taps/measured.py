"""What is seen at a model's taps, and of it the arrays to which an error can be delivered."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr

from jaxfa.jaxprs.versions import opened
from jaxfa.nn.model.leaves import error_in
from jaxfa.nn.model.program import Program, method_of
from jaxfa.nn.model.variables import structs
from jaxfa.nn.taps.places import true_size
from jaxfa.nn.taps.tap import Held, Tap, set_taps
from jaxfa.ops import for_each


def tappable(
    held: dict[str, Held], seen: dict[str, Any], error: Any, factor: int
) -> tuple[dict[str, dict[str, Any]], Any]:
    """The arrays seen at taps to which an error can be delivered, and the error; in their true sizes.

    Raises:
      ValueError: if a tapped module has none.
    """
    found = {}
    for path, (_, _, tap) in held.items():
        if tap.place.kind == "parameter":
            shape = for_each(seen[path][""].shape, true_size(error, factor).shape[0])
            found[path] = {"": jax.ShapeDtypeStruct(shape, seen[path][""].dtype)}
            continue
        leaves = {name: h for name, h in seen[path].items() if h.shape[:1] == error.shape[:1]}
        if not leaves:
            given, wanted = [true_size(h, factor).shape for h in seen[path].values()], true_size(error, factor).shape
            where, way = f"at the tap {path!r}", "Tap a module before the batch axis is merged with others, or moved."
            if not path:  # the input, which is modulated
                where, way = "as the input", "Say modulate= with the path of a module that returns such a one."
            raise ValueError(
                f"Direct feedback needs an activation with the logits' batch axis first: expected h of shape "
                f"({wanted[0]}, ..., n) {where} for logits {wanted}, got {given}. {way}"
            )
        found[path] = {name: true_size(h, factor) for name, h in leaves.items()}
        ambiguous = [h.shape for h in leaves.values() if not factor and error.shape[0] in h.shape[1:]]
        if ambiguous:
            raise ValueError(
                f"The model runs with no other batch than the example's, and the tap {path!r} sees {ambiguous[0]}, "
                f"where several axes have the batch's size, {error.shape[0]}: which of them counts examples is not "
                f"known. Give attach() an example whose batch has a size of its own, or name other places with at=."
            )
    return found, true_size(error, factor)


def that_are_read(model: nnx.Module, call: Any, found: dict[str, dict[str, jax.ShapeDtypeStruct]]) -> dict[str, Any]:
    """The arrays on which the logits depend where a tap has several, such as a hidden state and not a cache."""
    several = {path: leaves for path, leaves in found.items() if len(leaves) > 1}
    if not several:
        return found
    program = Program(model, method_of(call.method), *call.example.arguments())

    def logits(shifts: Any, states: Any) -> jax.Array:
        def shift(tap: Tap) -> None:
            tap.shift = nnx.Variable(shifts[tap.path]) if tap.path in shifts else None

        outputs, _ = program.run(*states, prepare=partial(set_taps, act=shift))
        return error_in(program.returned(outputs), call.logits)

    jaxpr = opened(jax.make_jaxpr(logits)(several, structs(program.states)))
    _, used = dce_jaxpr(jaxpr, [True])
    flags = jax.tree.unflatten(jax.tree.structure(several), used[: len(jax.tree.leaves(several))])
    read = {path: {name: h for name, h in leaves.items() if flags[path][name]} for path, leaves in several.items()}
    return found | {path: leaves or found[path] for path, leaves in read.items()}
