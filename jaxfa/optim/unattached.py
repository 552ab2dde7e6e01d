"""Masks and labels that are trees of a Flax model as it was before it was attached, which puts it one level down."""

from collections.abc import Mapping
from typing import Any

import jax
import optax


def for_unattached(tx: Any, both: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """``both``, shown pairs without their outermost level where ``tx`` takes the parameters only so.

    Args:
      tx: the optimizer of the parameters, any of whose masks and labels may be trees.
      both: what was made of it, a transformation of pairs ``(params, feedback)``.

    Returns:
      A transformation of such pairs, whose updates have the structure that ``both`` was shown.
    """

    def init(pair: Any) -> Any:
        return both.init(_below(pair) if _fits_below(tx, pair[0]) else pair)

    def update(updates: Any, state: Any, pair: Any, **extra: Any) -> Any:
        if not _fits_below(tx, updates[0]):
            return both.update(updates, state, pair, **extra)
        structure: Any = jax.tree.structure(updates[0])
        alike = {name: arg for name, arg in extra.items() if structure == jax.tree.structure(arg)}
        extra |= {name: _entry(arg) for name, arg in alike.items()}
        return both.update(_below(updates), state, _below(pair), **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _fits_below(tx: Any, params: Any) -> bool:
    if not isinstance(params, Mapping) or len(params) != 1:
        return False
    return not _fits(tx, params) and _fits(tx, _entry(params))


def _fits(tx: Any, params: Any) -> bool:
    try:
        jax.eval_shape(tx.init, params)
    except (TypeError, ValueError, KeyError):
        return False
    return True


def _below(pair: Any) -> Any:
    return tuple(map(_entry, pair))


def _entry(tree: Any) -> Any:
    return next(iter(tree.values())) if tree else tree
