"""Every rule on one network and data set: accuracy, alignment with backpropagation, and the cost of a step.

Claim: rules that carry the error back without the weights' transpose learn, and differ in how well they align.

Command: ``python -m experiments run compare`` (``--help`` lists the options; ``make demo`` runs just this).

Measured with the preset ``cpu`` (digits, MLP 64-256-256-256-10, 40 epochs, 3 seeds; last-epoch test accuracy, mean +-
std; angle to backpropagation, mean of the hidden layers), in 2 to 3 min on two cores of a shared machine:

=============  ============  ======  =============  ============  ======
bp             97.9 +- 0.2   0       weight_mirror  97.8 +- 0.5   26
fa             97.6 +- 0.6   66      ldfa, rank 16  98.3 +- 0.6   35
usf            97.9 +- 0.2   25      dfa            97.7 +- 0.3   65
brsf           97.9 +- 0.2   36      shared_dfa     97.2 +- 0.5   65
frsf           98.0 +- 0.4   31      dkp            97.5 +- 0.3   51
kolen_pollack  97.9 +- 0.2   25      dldfa, rank 8  98.1 +- 0.3   38
drtp           80.3 +- 3.2   91      grape          97.9 +- 0.6   22
=============  ============  ======  =============  ============  ======

360 test images hardly tell 97.2 from 98.0 % apart: the angles, not the accuracies, rank the rules here. DRTP was
made for saturating units; under ReLU its signal, which never fades, drives the activations up.

Measured with ``--dataset mnist --epochs 5 --batch 128`` (the same network, rates as for digits, not tuned; 3 seeds,
last epoch, 4 min on the same machine): bp 97.6 +- 0.1, weight_mirror 97.6 +- 0.0, usf 97.5 +- 0.1, brsf 97.4 +- 0.2,
frsf 97.2 +- 0.2, kolen_pollack 96.8 +- 0.2, dkp 96.1 +- 0.7, shared_dfa 95.3 +- 0.2, dfa 94.6 +- 0.5, fa 93.0 +- 2.3,
drtp 65.8 +- 1.4. The preset ``paper`` has not been run.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.common import data, methods, records, report, timing
from experiments.common.methods import METHODS, MethodName
from experiments.common.task import Task
from experiments.common.train import DivergenceError, train
from experiments.common.trainer import Loop, Trainer
from experiments.models import networks as models

# Adam's learning rates, chosen from 1e-4, 3e-4, 1e-3 and 3e-3 by accuracy on the validation split of digits (mlp, 144
# images, 3 seeds): 1e-3 is within two deviations of the best for every rule but this one, whose signal never fades.
RATE = 1e-3
RATES: dict[MethodName, float] = {"drtp": 1e-4}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which rules to compare, on what, for how long."""

    dataset: data.DatasetName = "digits"
    """The data set to learn; digits needs no file."""
    model: models.ModelName = "mlp"
    """The network to train."""
    methods: tuple[MethodName, ...] = tuple(METHODS)
    """The rules to train; bp, the reference, joins them where it is missing."""
    epochs: int = 40
    """Passes over the training images."""
    batch: int = 64
    """How many examples a step has."""
    learning_rate: float | None = None
    """The learning rate of Adam; None takes the one that was found for each rule."""
    seeds: int = 3
    """How many trainings each rule has, side by side."""
    seed: int = 0
    """The first seed; the others follow it."""
    split: Literal["test", "validation"] = "test"
    """The images to test on: the test set, or a tenth of the training set held out, to tune a choice by."""
    loop: Loop = "auto"
    """Each batch is one compiled step, or a scan runs many; auto chooses by the backend. Both draw the same numbers."""
    diagnostics: bool = False
    """Every epoch's record also holds each layer's effective ranks, and how far what is conserved has drifted."""
    save_every: int = 5
    """Epochs from one checkpoint to the next; the last is always saved."""
    out: Path = Path("runs/compare")
    """The folder of the results; a run that was killed goes on from its last checkpoint there."""
    data: Path | None = None
    """The folder of the cached data sets; None is the one that JAXFA_DATA names, else ./data."""
    fresh: bool = False
    """The results in the folder are deleted first."""

    def __post_init__(self) -> None:
        for name in self.methods:
            methods.method(name)
        records.refuse_below_one(self, "epochs", "batch", "seeds", "save_every")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")


PRESETS = {
    "cpu": Config(),
    "paper": Config(
        dataset="cifar10", model="resnet20", epochs=100, batch=128, seeds=5, out=Path("runs/compare-paper")
    ),
}


def run(config: Config) -> Path:
    """Trains every rule, times their steps, writes the report.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.

    Raises:
      ValueError: if the choices do not fit each other, or what the folder holds.
      FileNotFoundError: if the data set is not there.
    """
    dataset = data.load(config.dataset, config.data)
    dataset = data.on_device(dataset if config.split == "test" else data.hold_out(dataset))
    shape = dataset.train_images.shape[1:]
    found = models.architecture(config.model, shape)
    ignored = ("methods", "loop", "diagnostics", "save_every", "out", "data", "fresh")
    identity = records.identity("compare", config, ignored)
    records.open_run(config.out, identity, fresh=config.fresh)
    seeds = range(config.seed, config.seed + config.seeds)
    trainers: dict[str, Trainer] = {}
    with _progress() as progress:
        for name in _with_reference(config.methods):
            trainer = Trainer(_task(config, name, dataset, found), seeds, config.loop)
            try:
                train(
                    trainer,
                    config.epochs,
                    folder=config.out / name,
                    config=identity | {"method": name, "learning_rate": _rate(config, name)},
                    save_every=config.save_every,
                    progress=progress,
                )
            except DivergenceError as error:
                progress.console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            else:
                trainers[name] = trainer
    if "bp" in trainers:
        timing.measure(trainers, config.out / "timing.json", reference="bp")
    Console().print(_table(config.out))
    return report.write(config.out)


def _with_reference(names: tuple[MethodName, ...]) -> list[MethodName]:
    return list(dict.fromkeys(("bp", *names)))


def _task(config: Config, name: MethodName, dataset: data.Dataset, found: models.Architecture) -> Task:
    shape, classes, method = dataset.train_images.shape[1:], dataset.classes, METHODS[name]
    return Task(
        make=lambda rngs: found.make(shape, classes, rngs=rngs),
        rule=method.rule(),
        optimizer=optax.adam(_rate(config, name)),
        data=dataset,
        batch=config.batch,
        at=found.taps if method.direct else None,
        diagnostics=config.diagnostics,
    )


def _rate(config: Config, name: MethodName) -> float:
    return RATES.get(name, RATE) if config.learning_rate is None else config.learning_rate


def _table(folder: Path) -> Table:
    table = Table("rule", "accuracy", "angle to bp", "time of a step")
    for row in report.read_rows(folder):
        accuracy = f"{100 * row.accuracy.mean:.1f} ± {100 * row.accuracy.std:.1f} %"
        step = f"{row.step['ratio']:.2f} x bp" if row.step else ""
        table.add_row(row.name, accuracy, f"{row.angle.mean:.0f} ± {row.angle.std:.0f}°", step)
    for name in records.diverged(folder):
        table.add_row(name, "diverged")
    return table


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    return Progress(*columns, TimeElapsedColumn())
