"""Receptive fields of a model retina: oriented with full feedback, centre and surround with feedback of low rank.

Claim (Hanut and Kadmon 2025, after Lindsey et al. 2019): the fewer dimensions the error has that reaches the retina,
the less its receptive fields prefer an orientation, until they are centre and surround.

Command: ``python -m experiments run ldfa_retina``

The network sees grey CIFAR-10: convolutions that are the retina, convolutions that are the visual cortex, and two fully
connected layers. One layer alone has low-rank feedback with learned ``P`` and ``Q``: the first of the cortex, which
sends the error to the retina; all others learn by backpropagation. The preset ``cpu`` halves images and widths, its
kernels are 5x5.

A receptive field is the mean gradient over test images, in the image, of the middle unit of a retinal output channel
before its ReLU. Two numbers describe it, see ``receptive_fields``: its orientation selectivity, 0 if it
prefers none and 1 for a grating, and its radial symmetry, 1 for centre and surround and less for an edge. Both are also
shown before training, since chance makes oriented fields, too.

Verdict: the first half holds. The fewer dimensions the error has, the less the fields prefer an orientation: at full
rank by hardly more than the error, at low ranks by far more. The second half does not: no rank's fields are more
symmetric than backpropagation's, at rank 1 they are less, by more than the error. In both numbers they are nearer to
those before training, most likely since an error of few directions teaches the retina less in so few epochs.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.common import data
from experiments.common.bounds import FROM_ZERO
from experiments.common.checkpoint import last_state
from experiments.common.experiment import Arm, Experiment, Histories, Page, Study, Table, finished
from experiments.common.metrics import shown
from experiments.common.trainer import State, Trainer
from experiments.ldfa import receptive_fields
from experiments.ldfa.arms import low_rank
from experiments.ldfa.cnn import Network
from experiments.ldfa.receptive_fields import Result

PROBES = 256
CAPTION = (
    "Receptive fields of the retina's first output channels, first seed, each to its own scale: blue excites, red "
    "inhibits. The numbers are means and deviations over seeds, each the mean of a retina's units."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Network):
    """The network, the ranks, and for how long."""

    ranks: tuple[int, ...] = (32, 16, 8, 4, 2, 1)
    """Ranks of the error that reaches the retina."""
    feedback_rate: Annotated[float, FROM_ZERO] = 0.1
    """The learning rate of P, the projection of the error."""

    arms = ("ranks",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.ranks) > self.cortex[0]:
            raise ValueError(f"ranks must be from 1 to the cortex's {self.cortex[0]} channels, got {self.ranks}.")


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation and every rank, seed by seed: side by side, XLA:CPU's wide convolutions are far slower."""
    bp = config.task(config.grey())
    for rank in (None, *config.ranks):
        rule = low_rank(rank, config.feedback_rate) if rank else bp.rule
        task = bp._replace(rule=rule, at=("cortex/0",) if rank else None, allow=("*",) if rank else ())
        for seed in range(config.seed, config.seed + config.seeds):
            name = f"{_name(rank)}-seed-{seed}".replace(" ", "-")
            yield Arm(name, _name(rank), rank, task, title=f"seed {seed}", seeds=[seed])


def _name(rank: int | None) -> str:
    return "backpropagation" if rank is None else f"rank {rank}"


def study(config: Config, histories: Histories) -> Study:
    """The receptive fields before and after training."""
    results: dict[str, Result] = {}
    made = finished(config, arms(config), histories)
    for rank in (None, *config.ranks):
        before, after, accuracies = [], [], []
        for arm in (arm for arm in made if arm.x == rank):
            start = Trainer(arm.task, arm.seeds or (), config.loop).init()
            before.append(fields(config, arm.task.data, start))
            after.append(fields(config, arm.task.data, last_state(config.out / arm.name, start)))
            accuracies += histories[arm.name][-1]["test_accuracy"]
        if len(after) == config.seeds:  # without a seed that diverged, a mean would flatter
            results = results or {"untrained": receptive_fields.describe(before)}
            results[_name(rank)] = receptive_fields.describe(after, accuracies)
    if not results:
        raise FloatingPointError(f"Nothing in {config.out} is left to draw: at every rank a seed diverged.")
    table = Table("Receptive fields", _rows(results))
    return Study(receptive_fields.figure(results), CAPTION, [table], list(_findings(results)))


def fields(config: Config, dataset: data.Dataset, state: State) -> np.ndarray:
    """The receptive fields of one seed's retina, ``(channels, side, side)``."""
    graph, variables = nnx.split(config.network(dataset, nnx.Rngs(0)))
    nnx.replace_by_pure_dict(variables, jax.tree.map(lambda leaf: leaf[0], state.params["model"]))
    (mean,), (deviation,) = data.channel_moments(np.asarray(dataset.train_images))
    images = (jnp.asarray(dataset.test_images[:PROBES], jnp.float32) - mean) / deviation
    side = 1 + len(config.retina) * (config.window - 1)
    return np.asarray(receptive_fields.receptive_fields(nnx.merge(graph, variables).ganglion, images, side))


def _findings(results: dict[str, Result]) -> Iterator[tuple[str, str]]:
    """How selective the fields are at the least rank, and how symmetric, beside backpropagation's."""
    whole, least = _name(None), [*results][-1]
    if whole not in results or whole == least:
        return
    for what in ("selectivity", "symmetry"):
        pair = (getattr(results[name], what) for name in (least, whole))
        ours, theirs = (shown(receptive_fields.by_seed(values), 3) for values in pair)
        yield ours, f"is the {what} of fields at {least}, beside {theirs} by {whole}."


def _rows(results: dict[str, Result]) -> list[list[str]]:
    rows = [["error to the retina", "orientation selectivity", "radial symmetry", "units", "test accuracy, %"]]
    for name, one in results.items():
        seen = ~np.isnan(one.selectivity)
        accuracy = shown(100 * one.accuracy, 1) if len(one.accuracy) else ""
        described = [shown(receptive_fields.by_seed(values), 3) for values in (one.selectivity, one.symmetry)]
        rows.append([name, *described, f"{seen.sum()} of {seen.size}", accuracy])
    return rows


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(
            ranks=(16, 4, 1),
            retina=(16, 16),
            cortex=(16,),
            hidden=256,
            window=5,
            shrink=2,
            test_images=2_000,
            epochs=6,
            seeds=3,
        ),
        "paper": Config(epochs=100, learning_rate=5e-4, seeds=5),
    },
    Page(
        "What does a retina see when its error has few dimensions?", "Hanut and Kadmon 2025, after Lindsey et al. 2019"
    ),
    arms,
    study,
)
