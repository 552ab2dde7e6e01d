"""Every rule on one network and data set: accuracy, alignment with backpropagation, and the cost of a step.

Claim: a rule that carries the error back without the weights' transpose learns, the better the smaller its angle to
backpropagation.

Command: ``python -m experiments run compare [--preset paper] [--dataset mnist] [--model lenet] ...``
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import optax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import data, methods, models, records, report, timing
from experiments.methods import METHODS, MethodName
from experiments.train import train
from experiments.trainer import Loop, Task, Trainer


@dataclasses.dataclass(frozen=True)
class Config:
    """Which rules to compare, on what, for how long."""

    dataset: data.DatasetName = "digits"
    """What to learn; digits needs no file."""
    model: models.ModelName = "mlp"
    """The network."""
    methods: tuple[MethodName, ...] = tuple(METHODS)
    """The rules; bp, the reference, joins them where it is missing."""
    epochs: int = 40
    """Passes over the training set."""
    batch: int = 64
    """Examples per step."""
    learning_rate: float = 1e-3
    """Of Adam, for every rule."""
    seeds: int = 3
    """How many trainings of each rule, side by side."""
    seed: int = 0
    """The first seed; the others follow it."""
    split: Literal["test", "validation"] = "test"
    """What accuracy is of: the test set, or a tenth of the training set held out, for every choice that is tuned."""
    loop: Loop = "auto"
    """One compiled step per batch or a scan over many; auto chooses by the backend. The results are the same."""
    out: Path = Path("runs/compare")
    """The folder of the results; a killed run goes on from its last checkpoint there."""
    data: Path | None = None
    """The folder of the cached data sets; by default what JAXFA_DATA names, else ./data."""
    fresh: bool = False
    """Whether to delete the results that are there."""

    def __post_init__(self) -> None:
        for name in self.methods:
            methods.method(name)
        for field in ("epochs", "batch", "seeds"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")


PRESETS = {
    "cpu": Config(),
    "paper": Config(dataset="cifar10", model="resnet20", epochs=100, batch=128, seeds=5, out=Path("runs/compare-paper")),
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
      FloatingPointError: if a training diverges.
    """
    dataset = data.load(config.dataset, config.data)
    dataset = data.on_device(dataset if config.split == "test" else data.hold_out(dataset))
    shape = dataset.train_images.shape[1:]
    found = models.architecture(config.model, shape)
    identity = _identity(config)
    records.open_run(config.out, identity, fresh=config.fresh)
    seeds = range(config.seed, config.seed + config.seeds)
    trainers = {}
    with _progress() as progress:
        for name in dict.fromkeys(("bp", *config.methods)):
            trainers[name] = trainer = Trainer(_task(config, METHODS[name], dataset, found), seeds, config.loop)
            folder = config.out / name
            train(trainer, config.epochs, folder=folder, config=identity | {"method": name}, progress=progress)
    timing.measure(trainers, config.out / "timing.json", reference="bp")
    return report.write(config.out)


def _task(config: Config, method: methods.Method, dataset: data.Dataset, found: models.Architecture) -> Task:
    shape, classes = dataset.train_images.shape[1:], dataset.classes
    at = found.taps if method.direct else None
    return Task(lambda rngs: found.make(shape, classes, rngs=rngs), method.rule(), optax.adam(config.learning_rate), dataset, config.batch, at)


def _identity(config: Config) -> dict[str, Any]:
    """What the results depend on: the configuration without where it runs and which other rules run beside."""
    ignored = ("methods", "loop", "out", "data", "fresh")
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key not in ignored}
    return {"experiment": "compare"} | fields


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    return Progress(*columns, TimeElapsedColumn())
