"""GrAPE piece by piece in a deep network: what of it, and what beyond it, helps.

Claim: the estimate is noisy in early layers (Caillon et al. 2026, and our formula), so that whatever lowers its
variance should help: a tile that repeats over the map, a running mean, one derivative per layer. Columns of norm 1
discard how unlike the outputs' Jacobians are in size.

Command: ``python -m experiments run grape_ablation``, half an hour; ``--preset paper`` for all of CIFAR-100.

Every arm but the first two has signs for perturbations and is otherwise one option, or the few that its name tells,
away from the literal rule. ``separate`` bounds what better scales of the perturbations could give: it has none of the
noise that layers make for each other.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax

import jaxfa
from experiments.common import records
from experiments.common.experiment import Arm, Experiment, Page
from experiments.grape.networks import (
    BEST,
    CPU_RATES,
    LITERAL,
    NETWORKS,
    PAPER,
    TILED,
    NetworkName,
    Rates,
    images,
    task,
)

_plain = partial(jaxfa.grape, scaling=0.0)
VARIANTS: dict[str, tuple[str, jaxfa.Rule]] = {
    "literal": ("As published", LITERAL),
    "per-unit": ("As published", _plain(perturbation=jax.random.normal, norm_axis=1)),
    "signs": ("Perturbations", _plain()),
    "separate": ("Perturbations", _plain(separate=True)),
    "scaled": ("Perturbations", _plain(scaling=0.3)),
    "tile-4": ("Repeated feedback", _plain(tile=4)),
    "tile-1": ("Repeated feedback", _plain(tile=1)),
    "mean-0.9": ("Running mean", _plain(averaging=0.9)),
    "mean-0.98": ("Running mean", _plain(averaging=0.98)),
    "kalman": ("Running mean", _plain(averaging=jaxfa.rules.kalman())),
    "magnitudes": ("Magnitudes kept", _plain(column_norm=False)),
    "fdfa": ("Magnitudes kept", jaxfa.fdfa()),
    "tile-4-fdfa": ("Magnitudes kept", jaxfa.fdfa(tile=4)),
    "tile-4-mean": ("Together", _plain(tile=4, averaging=0.9)),
    "tile-4-kalman": ("Together", _plain(tile=4, averaging=jaxfa.rules.kalman())),
    "tile-4-scaled": ("Together", jaxfa.grape(tile=4)),
    "scaled-kalman": ("Together", BEST),
    "tile-4-scaled-kalman": ("Together", TILED),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Rates):
    """The network and the variants."""

    network: NetworkName = "resnet20"
    """The network to train."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """The ways of learning feedback to train, beside backpropagation and DFA."""

    arms = ("variants",)

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_empty(self, "variants")
        unknown = set(self.variants) - set(VARIANTS)
        if unknown:
            raise ValueError(f"Unknown variants {sorted(unknown)}; choose from {', '.join(VARIANTS)}.")


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation, DFA and every variant."""
    dataset, name = images(config), config.network
    taps = NETWORKS[name].taps
    yield Arm("bp", "References", None, task(config, dataset, name), title="Backpropagation")
    fixed = task(config, dataset, name, config.dfa_rate)._replace(rule=jaxfa.dfa(), at=taps)
    yield Arm("dfa", "References", None, fixed, title="DFA")
    learned = task(config, dataset, name, config.grape_rate)
    for variant in config.variants:
        group, rule = VARIANTS[variant]
        yield Arm(variant, group, None, learned._replace(rule=rule, at=taps), title=variant)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(**CPU_RATES), "paper": Config(**PAPER)},
    Page(
        "What makes learned direct feedback work?",
        "A deep residual network under GrAPE without calibration, piece by piece: how the network is perturbed, what "
        "the feedback shares over the map, how long estimates are averaged, what of their size is kept.",
    ),
    arms,
)
