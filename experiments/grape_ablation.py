"""GrAPE piece by piece in a deep network: what of it, and what beyond it, helps.

Claim: the estimate is noisy in early layers (Caillon et al. 2026, and our formula), so that whatever lowers its
variance should help: a tile that repeats over the map, a running mean, one derivative per layer. Columns of norm 1
discard how unlike the outputs' Jacobians are in size.

Command: ``python -m experiments run grape_ablation`` (``--preset paper`` for all of CIFAR-100).

Every arm is one option of :func:`jaxfa.grape` away from the literal rule, but for the last group.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

import jaxfa
from experiments import data, grape_deep, sweep


class Variant(NamedTuple):
    """One way to learn direct feedback.

    Attributes:
      group: what it changes.
      rule: the rule.
    """

    group: str
    rule: jaxfa.Rule


_NORMAL = jax.random.normal
VARIANTS = {
    "literal": Variant("As published", jaxfa.grape(perturbation=_NORMAL)),
    "per-unit": Variant("As published", jaxfa.grape(perturbation=_NORMAL, norm_axis=1)),
    "signs": Variant("Perturbations", jaxfa.grape()),
    "separate": Variant("Perturbations", jaxfa.grape(separate=True)),
    "tile-4": Variant("Repeated feedback", jaxfa.grape(tile=4)),
    "tile-1": Variant("Repeated feedback", jaxfa.grape(tile=1)),
    "mean-0.9": Variant("Running mean", jaxfa.grape(averaging=0.9)),
    "mean-0.98": Variant("Running mean", jaxfa.grape(averaging=0.98)),
    "magnitudes": Variant("Magnitudes kept", jaxfa.grape(column_norm=False)),
    "fdfa": Variant("Magnitudes kept", jaxfa.fdfa()),
    "tile-4-mean": Variant("Together", jaxfa.grape(tile=4, averaging=0.9)),
    "tile-4-fdfa": Variant("Together", jaxfa.fdfa(tile=4)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(grape_deep.Config):
    """As for grape_deep, with one network."""

    networks: tuple[grape_deep.NetworkName, ...] = ("resnet20",)
    """What to train: one network."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which ones."""
    out: Path = Path("runs/grape_ablation")
    """The folder of the results."""

    arms = ("variants",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.networks) != 1:
            raise ValueError(f"grape_ablation trains one network, got {self.networks}.")
        unknown = set(self.variants) - set(VARIANTS)
        if unknown:
            raise ValueError(f"Unknown variants {sorted(unknown)}; choose from {', '.join(VARIANTS)}.")


PRESETS = {
    name: Config(**(dataclasses.asdict(preset) | {"networks": ("resnet20",), "out": Path(f"runs/grape_ablation{end}")}))
    for (name, preset), end in zip(grape_deep.PRESETS.items(), ("", "-paper"), strict=True)
}
PAGE = sweep.Page(
    "What makes learned direct feedback work?",
    "A deep residual network under GrAPE without calibration, piece by piece: how the network is perturbed, what the "
    "feedback shares over the map, how long estimates are averaged, what of their size is kept.",
    "none: the paper has no such table",
    course=True,
)


def run(config: Config) -> Path:
    """Trains every arm and writes the report.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.
    """
    return sweep.run(config, PAGE, list(_arms(config, grape_deep.load(config))))


def _arms(config: Config, dataset: data.Dataset) -> Iterator[sweep.Arm]:
    (name,) = config.networks
    taps = grape_deep.NETWORKS[name].taps
    yield sweep.Arm("bp", "References", None, grape_deep.task(config, dataset, name))
    fixed = grape_deep.task(config, dataset, name, config.dfa_rate)._replace(rule=jaxfa.dfa(), at=taps)
    yield sweep.Arm("dfa", "References", None, fixed)
    for variant in config.variants:
        task = grape_deep.task(config, dataset, name, config.grape_rate)
        group, rule = VARIANTS[variant]
        yield sweep.Arm(variant, group, None, task._replace(rule=rule, at=taps))
