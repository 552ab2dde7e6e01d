"""How tapped activations move with the weights between taps, for a rule that perturbs these where they are fewer."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.interpreters.partial_eval import dce_jaxpr

from jaxfa.base import Initializer
from jaxfa.jaxprs.versions import opened
from jaxfa.nn.model.leaves import error_in
from jaxfa.nn.model.program import Program, method_of
from jaxfa.nn.model.variables import structs
from jaxfa.nn.passes.modulate import First
from jaxfa.nn.passes.stream import Walk, walked
from jaxfa.nn.taps.tap import Tap, taps_of
from jaxfa.rules.shared.projection import shared_axes

# The tapped activations, by their taps' scopes.
Seen = dict[str, list[jax.Array]]


class Between(First):
    """A pass whose tapped activations go on as constants, so that each moves with the weights since the taps before."""

    def check(self, tap: Tap) -> None:
        try:
            Walk.check(self, tap)
        except ValueError:
            raise ValueError(_UNTOLD.format(tap.path)) from None

    def enter(self, tap: Tap, leaf: str, feedback: Any, h: jax.Array) -> jax.Array:
        """``h`` as a constant; what it was is kept."""
        if tap.scope(leaf) in self.seen:
            raise ValueError(_UNTOLD.format(tap.path))
        return lax.stop_gradient(super().enter(tap, leaf, feedback, h))


_UNTOLD = (
    "The model calls {!r} several times, or inside a transformation (scan, vmap, remat, jit), where its own weights' "
    "part in what moves is not told: call it once as it is, name with at= the module around that, or perturb "
    "activations alone, by published_grape(weights=False)."
)


def moved_by_weights(
    attached: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: jax.Array, noise: Initializer
) -> dict[str, Any]:
    """How much each tapped activation moves if the weights since the taps before it do; None if these are not fewer.

    The tree is that of the taps' feedback. Weights are all parameters: kernels, biases, a norm's scale. Axes that the
    logits share with an activation count as examples, whose entries are not added up.
    """
    program = Program(attached.model, method_of(attached.method), args, kwargs, _is_weight)
    weights, rest = program.states

    def run(weights: Any) -> tuple[Seen, jax.Array]:
        walk = Between()
        outputs, _ = program.run(weights, rest, prepare=walked(walk))
        return walk.seen, error_in(program.returned(outputs), attached.logits)

    def moved(weights: Any, changes: Any) -> Seen:
        return jax.jvp(lambda weights: run(weights)[0], (weights,), (changes,))[1]

    leaves, structure = jax.tree.flatten(weights)
    seen, logits = jax.eval_shape(run, structs(weights))
    sizes = jax.tree.map(lambda h: math.prod(h.shape[shared_axes(h, logits) :]), seen)
    fewer, perturbed = _fewer(moved, sizes, structs(weights))
    # One draw for all: each of so small ones would take longer to compile than a layer.
    counts = [leaf.size if moves else 0 for leaf, moves in zip(leaves, perturbed, strict=True)]
    parts = jnp.split(noise(key, (sum(counts),), jnp.result_type(*leaves)), np.cumsum(counts)[:-1])
    changes = [
        part.reshape(leaf.shape).astype(leaf.dtype) if moves else jnp.zeros_like(leaf)
        for part, leaf, moves in zip(parts, leaves, perturbed, strict=True)
    ]
    all_moved = moved(weights, jax.tree.unflatten(structure, changes))
    found = jax.tree.map(lambda h, chosen: h if chosen else None, all_moved, fewer)
    return {path: _as_feedback(tap, found) for path, tap in taps_of(attached.model).items() if tap.feedback is not None}


def _as_feedback(tap: Tap, found: Any) -> Any:
    """What was found at a tap's leaves, one for each feedback there."""
    by_leaf = {name: found[tap.scope(name)][0] for name in tap.feedbacks()}
    return by_leaf if isinstance(tap.feedback.get_value(), dict) else by_leaf.popitem()[1]


def _is_weight(path: Any, value: Any) -> bool:
    return path[0] == 0 and isinstance(value, nnx.Param) and jnp.issubdtype(value.dtype, jnp.inexact)


def _fewer(moved: Callable[..., Seen], sizes: Any, weights: Any) -> tuple[Any, list[bool]]:
    """Where fewer weights move an activation than its size, as a tree of these; and which weights those are."""
    jaxpr = opened(jax.make_jaxpr(moved)(weights, weights))
    leaves, activations = jax.tree.leaves(weights), jax.tree.leaves(sizes)
    found, perturbed = [], [False] * len(leaves)
    for at, most in enumerate(activations):
        _, used = dce_jaxpr(jaxpr, [at == other for other in range(len(activations))])
        moving = used[len(leaves) :]
        size = sum(leaf.size for leaf, moves in zip(leaves, moving, strict=True) if moves)
        found.append(0 < size < most)
        perturbed = [a or (found[-1] and b) for a, b in zip(perturbed, moving, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(sizes), found), perturbed
