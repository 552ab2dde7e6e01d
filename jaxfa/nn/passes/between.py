"""How tapped activations move with the weights between taps, for a rule that perturbs these where they are fewer."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.interpreters.partial_eval import dce_jaxpr

from jaxfa.base import Initializer
from jaxfa.jaxprs.versions import opened
from jaxfa.nn.model.program import Program, method_of
from jaxfa.nn.model.variables import structs
from jaxfa.nn.passes.stream import Walk, walked
from jaxfa.nn.taps.tap import Tap, taps_of

# What a tap lets by, by its path and the leaf's name.
Seen = dict[str, dict[str, jax.Array]]


class Between(Walk):
    """A pass whose tapped activations go on as constants, so that each moves with the weights since the taps before it.

    Attributes:
      seen: the tapped activations.
    """

    def __init__(self) -> None:
        super().__init__(())
        self.seen: Seen = {}

    def visit(self, tap: Tap, module: Any, own_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return tap(own_call(module, *args, **kwargs))

    def entering(self, tap: Tap) -> dict[str, Callable[[jax.Array], jax.Array]]:
        return {name: partial(self.enter, tap, name) for name in tap.feedbacks()}

    def enter(self, tap: Tap, leaf: str, h: jax.Array) -> jax.Array:
        """``h`` as a constant; what it was is kept."""
        known = self.seen.setdefault(tap.path, {})
        try:
            self.check(tap)
        except ValueError:
            known[leaf] = h
        if leaf in known:
            raise ValueError(
                f"The model calls {tap.path!r} several times, or inside a transformation (scan, vmap, remat, jit), "
                f"where its own weights' part in what moves is not told: call it once as it is, name with at= the "
                f"module around that, or perturb activations, by published_grape() without weights=True."
            )
        known[leaf] = h
        return lax.stop_gradient(h)


def moved_by_weights(
    attached: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: jax.Array, noise: Initializer
) -> dict[str, Any]:
    """How much each tapped activation moves if the weights since the taps before it do; None if these are not fewer.

    The tree is that of the taps' feedback. Weights are all parameters: kernels, biases, a norm's scale.
    """
    program = Program(attached.model, method_of(attached.method), args, kwargs, _is_weight)
    weights, rest = program.states

    def seen(weights: Any) -> Seen:
        walk = Between()
        program.run(weights, rest, prepare=walked(walk))
        return walk.seen

    def moved(weights: Any, changes: Any) -> Seen:
        return jax.jvp(seen, (weights,), (changes,))[1]

    leaves, structure = jax.tree.flatten(weights)
    keys = jax.random.split(key, max(1, len(leaves)))
    fewer, perturbed = _fewer(moved, jax.eval_shape(seen, structs(weights)), structs(weights))
    changes = [
        noise(one, leaf.shape, leaf.dtype) if moves else jnp.zeros_like(leaf)
        for one, leaf, moves in zip(keys, leaves, perturbed, strict=False)
    ]
    found = moved(weights, jax.tree.unflatten(structure, changes))
    chosen = {path: {name: h if fewer[path][name] else None for name, h in one.items()} for path, one in found.items()}
    shared = {path: tap.feedback.get_value() for path, tap in taps_of(attached.model).items() if path in chosen}
    return {path: one if isinstance(shared[path], dict) else one.popitem()[1] for path, one in chosen.items()}


def _is_weight(path: Any, value: Any) -> bool:
    return path[0] == 0 and isinstance(value, nnx.Param) and jnp.issubdtype(value.dtype, jnp.inexact)


def _fewer(moved: Callable[..., Seen], seen: Any, weights: Any) -> tuple[dict[str, dict[str, bool]], list[bool]]:
    """Where fewer weights move an activation than it has entries, by its tap and leaf; and those weights."""
    jaxpr = opened(jax.make_jaxpr(moved)(weights, weights))
    leaves, activations, structure = jax.tree.leaves(weights), *jax.tree.flatten(seen)
    found, perturbed = [], [False] * len(leaves)
    for at, h in enumerate(activations):
        _, used = dce_jaxpr(jaxpr, [at == other for other in range(len(activations))])
        moving = used[len(leaves) :]
        size = sum(leaf.size for leaf, moves in zip(leaves, moving, strict=True) if moves)
        found.append(0 < size < math.prod(h.shape[1:]))
        perturbed = [a or (found[-1] and b) for a, b in zip(perturbed, moving, strict=True)]
    return jax.tree.unflatten(structure, found), perturbed
