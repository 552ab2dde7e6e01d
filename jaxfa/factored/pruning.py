"""How the rank of factored weights falls in training: a penalty that makes small singular values smaller, and pruning.

Both from Yang, Tang, Wen, Yan, Hu, Li, Li, Chen, "Learning Low-rank Deep Neural Networks via Singular Vector
Orthogonality Regularization and Singular Value Sparsification", 2020, https://arxiv.org/abs/2004.09031
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfa.base import is_feedback
from jaxfa.factored.svd import Factors, is_factors, matched, take, wide
from jaxfa.optim.local import named


def hoyer(s: jax.Array) -> jax.Array:
    """Hoyer's measure of how few singular values carry the weight: ``|s|_1 / |s|_2``, from 1 to ``sqrt(r)``.

    Args:
      s: ``(..., r)``.

    Returns:
      ``(...)``; no scale of ``s`` changes it, so that its gradient never shrinks the norm.
    """
    return jnp.abs(s).sum(-1) / jnp.linalg.norm(s, axis=-1)


def _hoyer_gradient(s: jax.Array) -> jax.Array:
    """``sign(s) / |s|_2 - |s|_1 s / |s|_2^3``; zero where ``s`` is."""
    norm = jnp.linalg.norm(s, axis=-1, keepdims=True)
    safe = jnp.where(norm > 0, norm, 1)
    return jnp.sign(s) / safe - jnp.abs(s).sum(-1, keepdims=True) * s / safe**3


class PenaltyState(NamedTuple):
    """The state of :func:`hoyer_penalty`.

    Attributes:
      step: updates so far.
    """

    step: jax.Array


def hoyer_penalty(strength: float | Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Adds the gradient of ``lambda sum_l H(s_l)``, ``H(s) = |s|_1 / |s|_2``, to that of factored layers' ``s``.

    It goes before the optimizer, ``optax.chain(hoyer_penalty(schedule), optax.adam(...))``, and makes the small
    singular values smaller, for :func:`prune` to drop. The paper adds it "every 10 epochs for the first 30 % of
    the epochs", for which a schedule is made by the experiments.

    Args:
      strength: ``lambda``, or a schedule ``step -> lambda``.

    Returns:
      A transformation of any parameters; those that are not factored pass.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> w, tx = jaxfa.factored.factorise(jnp.diag(jnp.array([4.0, 3.0]))), jaxfa.factored.hoyer_penalty(1.0)
      >>> updates, _ = tx.update(w.astype(jnp.float32), tx.init(w), w)
      >>> [round(float(g), 3) for g in updates.s - w.s]
      [-0.024, 0.032]

    Source: Hoyer, "Non-negative Matrix Factorization with Sparseness Constraints", 2004,
    https://www.jmlr.org/papers/v5/hoyer04a.html; for singular values Yang et al. (2020), as ``factorise``.
    """

    def update(updates: Any, state: PenaltyState, params: Any = None) -> tuple[Any, PenaltyState]:
        if params is None:
            raise ValueError("hoyer_penalty needs the parameters: call update(updates, state, params).")
        rate = strength(state.step) if callable(strength) else strength

        def add(g: Any, w: Any) -> Any:
            # A feedback's factors are no weights; and where optax masks an array, there is nothing to add to.
            if not is_factors(w) or not jax.tree.leaves(w):
                return g
            return replace(g, s=g.s + (rate * _hoyer_gradient(w.s)).astype(g.s.dtype))

        found = jax.tree.map(add, updates, params, is_leaf=lambda node: is_factors(node) or is_feedback(node))
        return found, PenaltyState(state.step + 1)

    return optax.GradientTransformation(lambda params: PenaltyState(jnp.zeros((), int)), update)


def prune(
    params: Any, *others: Any, energy: float = 0.95, multiple: int = 8, tolerance: float = 1e-3
) -> tuple[Any, ...]:
    """Drops singular values: keeps the fewest with ``sum s_kept^2 >= energy sum s^2``.

    The arrays really shrink, so it runs outside ``jit``, at the end of an epoch; what is jitted compiles anew for the
    new shapes. Feedback, optimizer state and averages follow their columns exactly; of layers that lose none, nothing
    changes at all. Where ``u`` and ``v`` have drifted from orthonormality ``s`` are no singular values: a layer that
    loses columns is decomposed anew first, each column in the place of the old one that it is nearest to, and what is
    kept beside the weights loses the columns at the same places. Adam's moments and averages are then as wrong as the
    drift was large, but of the right size, and forget it as they forget anything; zeros would not be of the right size.

    Args:
      params: a tree with :class:`Factors` among its nodes; leading axes, such as seeds', keep one rank.
      others: trees that hold factors of the same names and shapes: feedback, optimizer states, averages.
      energy: in (0, 1]; 1 changes nothing.
      multiple: ranks are rounded up to whole multiples of it, so that few different programs are compiled.
      tolerance: the :func:`drift` from which a layer is decomposed anew, or eight roundings of its dtype if that is
        more.

    Returns:
      ``(params, *others)`` with fewer columns.

    Raises:
      ValueError: if ``energy`` or ``multiple`` is out of range, or ``params`` has no factors, or two of one name, or
        ``others`` has factors of other shapes than the weights', such as Adafactor's state.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> w = jaxfa.factored.factorise(jnp.diag(jnp.array([9.0, 5.0, 1.0])))
      >>> (pruned,) = jaxfa.factored.prune(w, energy=0.95, multiple=1)
      >>> pruned.s.tolist()
      [9.0, 5.0]

    Source: Roy, Apolinario, Das Biswas, Roy, "Feedback Alignment Meets Low-Rank Manifolds: A Structured Recipe for
    Local Learning", 2025, https://arxiv.org/abs/2510.25594
    """
    if not 0.0 < energy <= 1.0 or multiple < 1:
        raise ValueError(f"prune needs energy in (0, 1] and multiple >= 1, got {energy} and {multiple}.")
    layers = by_name(params)
    if not layers:
        raise ValueError("prune found no factored weights in the parameters: attach jaxfa.ssa(...) or factorise first.")
    if energy == 1.0:
        return params, *others
    shrunk = {name: found for name, w in layers.items() if (found := _shrunk(w, energy, multiple, tolerance))}

    def lead(w: Factors) -> Factors:
        return take(*shrunk[w.name]) if w.name in shrunk else w

    def follow(w: Factors) -> Factors:
        if w.name not in shrunk:
            return w
        _check_shapes(w, layers[w.name])
        return take(w, shrunk[w.name][1])

    return map_factors(lead, params), *(map_factors(follow, tree) for tree in others)


def ranks(tree: Any) -> dict[str, int]:
    """The rank of each factored layer.

    Args:
      tree: parameters; leading axes of the factors, such as seeds', share a rank.

    Returns:
      Ranks by the layers' names; nothing where no layer is factored.

    Raises:
      ValueError: if two layers have one name.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> jaxfa.factored.ranks({"head": jaxfa.factored.factorise(jnp.eye(3, 2), name="head"), "bias": jnp.zeros(2)})
      {'head': 2}

    Source: as :func:`prune`, after which it is smaller.
    """
    return {name: w.s.shape[-1] for name, w in by_name(tree).items()}


def by_name(tree: Any) -> dict[str, Factors]:
    """The factors in a tree by name; an error if two have one name."""
    return named(tree, is_factors)


def drift(w: Factors) -> jax.Array:
    """How far ``u`` and ``v`` are from orthonormal columns: the largest of ``|u^T u - 1|`` and ``|v^T v - 1|``."""

    def off(a: jax.Array) -> jax.Array:
        gram = a.mT @ a
        return jnp.abs(gram - jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)).max((-2, -1))

    whole = wide(w)
    return jnp.maximum(off(whole.u), off(whole.v))


def standardise(w: Factors) -> Factors:
    """The decomposition anew, of factors that have drifted from orthonormal ones; the product stays.

    Each column takes the place and the signs of the old one that it is nearest to, so that what is kept beside the
    weights, column by column, still belongs to them; ``s`` are in no order then, and as negative as they were.
    """
    old = wide(w)
    (q_u, r_u), (q_v, r_v) = jnp.linalg.qr(old.u), jnp.linalg.qr(old.v)
    a, s, bt = jnp.linalg.svd((r_u * jnp.expand_dims(w.s, -2)) @ r_v.mT, full_matrices=False)
    return matched(replace(old, u=q_u @ a, s=s, v=q_v @ bt.mT), old).astype(w.dtype)


def _shrunk(w: Factors, energy: float, multiple: int, tolerance: float) -> Any:
    """A layer's factors, decomposed anew if they have drifted, and the columns to keep; None to keep all."""
    if float(drift(w).max()) > max(tolerance, 8 * float(jnp.finfo(w.dtype).eps)):
        w = standardise(w)
    kept = _kept(np.asarray(w.s, np.float64), energy, multiple)
    return (w, kept) if kept.shape[-1] < w.s.shape[-1] else None


def _check_shapes(found: Factors, w: Factors) -> None:
    """Refuses what has no column for each of the weights'; optax's MaskedNode has no leaves, and passes."""
    for name in ("u", "s", "v"):
        for leaf in jax.tree.leaves(getattr(found, name)):
            if leaf.shape != getattr(w, name).shape:
                raise ValueError(
                    f"prune can't drop columns of what is kept beside the weights of layer {w.name!r}: for {name} of "
                    f"shape {getattr(w, name).shape} it has shape {leaf.shape}. An optimizer whose state is not shaped "
                    f"like the parameters (Adafactor, L-BFGS) needs a new one: tx.init(pruned)."
                )


def _kept(s: np.ndarray, energy: float, multiple: int) -> np.ndarray:
    """The columns to keep, in their order, ``(..., k)``."""
    order = np.argsort(-np.abs(s), axis=-1, kind="stable")
    sums = np.cumsum(np.take_along_axis(s, order, -1) ** 2, axis=-1)
    needed = int((sums < energy * sums[..., -1:]).sum(-1).max()) + 1
    count = min(-(-needed // multiple) * multiple, s.shape[-1])
    return np.sort(order[..., :count], axis=-1)


def map_factors(change: Any, tree: Any) -> Any:
    """Changes the factors in a tree and nothing else."""
    return jax.tree.map(lambda node: change(node) if is_factors(node) else node, tree, is_leaf=is_factors)
