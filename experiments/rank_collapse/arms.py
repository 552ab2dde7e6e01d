"""The trainings of ``rank_collapse``: rules, normalisation, optimizers, and what changes spectra."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import optax

from experiments.common.optimizers import beside_adam, muon
from experiments.rank_collapse import spectra

ArmName = Literal[
    "bp",
    "bp-norm",
    "fa",
    "fa-fast",
    "fa-muon",
    "fa-norm",
    "fa-norm-muon",
    "bp-norm-rank-1",
    "bp-norm-rank-2",
    "bp-norm-rank-5",
    "fa-norm-flat",
    "fa-norm-sized",
]


class Arm(NamedTuple):
    """One training.

    Attributes:
      rule: ``fa`` or ``bp``.
      normalised: whether the network has batch normalisation.
      optimizer: ``(hidden, rate, weight_decay) -> optax transformation``.
      rate_of: the arm whose learning rate it has; None for one of its own.
      adam: whether the optimizer has Adam beside it, and so another argument, ``adam_rate``.
    """

    rule: Literal["fa", "bp"]
    normalised: bool
    optimizer: Callable[..., optax.GradientTransformation]
    rate_of: ArmName | None = None
    adam: bool = False


def by_sgd(hidden: spectra.Hidden, rate: Any, weight_decay: float, change: Any = None) -> optax.GradientTransformation:
    """SGD with momentum and an L2 penalty; ``change(hidden=...)`` is what changes the update's spectrum."""
    momentum = optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(0.9))
    changes = [change(hidden=hidden)] if change else []
    return optax.chain(momentum, *changes, optax.scale_by_learning_rate(rate))


def by_muon(hidden: spectra.Hidden, rate: Any, weight_decay: float, adam_rate: Any) -> optax.GradientTransformation:
    """Muon with Adam beside it."""
    return muon(rate, hidden, adam_rate=adam_rate, weight_decay=weight_decay)


def by_size(hidden: spectra.Hidden, rate: Any, weight_decay: float, adam_rate: Any) -> optax.GradientTransformation:
    """Muon but for its orthogonalisation, with Adam beside it."""
    decay = optax.add_decayed_weights(weight_decay)
    sized = optax.chain(spectra.sized_as_muon(hidden), decay, optax.scale_by_learning_rate(rate))
    return beside_adam(sized, hidden, adam_rate=adam_rate, weight_decay=weight_decay)


ARMS: dict[ArmName, Arm] = {
    "bp": Arm("bp", False, by_sgd),
    "bp-norm": Arm("bp", True, by_sgd),
    "fa": Arm("fa", False, by_sgd),
    "fa-fast": Arm("fa", False, by_sgd, "bp"),
    "fa-muon": Arm("fa", False, by_muon, adam=True),
    "fa-norm": Arm("fa", True, by_sgd),
    "fa-norm-muon": Arm("fa", True, by_muon, adam=True),
    "bp-norm-rank-1": Arm("bp", True, partial(by_sgd, change=partial(spectra.truncated, 1)), "bp-norm"),
    "bp-norm-rank-2": Arm("bp", True, partial(by_sgd, change=partial(spectra.truncated, 2)), "bp-norm"),
    "bp-norm-rank-5": Arm("bp", True, partial(by_sgd, change=partial(spectra.truncated, 5)), "bp-norm"),
    "fa-norm-flat": Arm("fa", True, partial(by_sgd, change=spectra.flattened), "fa-norm"),
    "fa-norm-sized": Arm("fa", True, by_size, "fa-norm-muon", adam=True),
}
