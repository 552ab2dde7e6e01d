"""Sweeps: trains named arms that differ in one quantity, such as a rank, times them, and shows ours beside published.

An experiment makes its arms and calls :func:`run`; a sweep that was killed goes on where it was. One that has figures
of its own takes only the trainings, from :func:`train_each`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from experiments.common import apart, data, records, sweep_report, timing
from experiments.common.metrics import METRICS, Metric, MetricName
from experiments.common.task import Task
from experiments.common.train import DivergenceError, train
from experiments.common.trainer import Loop, Trainer


class Arm(NamedTuple):
    """One training of a sweep.

    Attributes:
      name: of its folder; no other arm has it.
      group: the line of the figure that it lies on.
      x: where on that line; None for a reference, drawn as a level.
      task: what is trained.
      published: the published number, such as accuracy in percent; None if there is none.
      reference: the name of the arm that it is compared with; by default the first arm.
      axis: what ``x`` counts; arms of another axis get a figure of their own.
    """

    name: str
    group: str
    x: float | None
    task: Task
    published: float | None = None
    reference: str | None = None
    axis: str = "rank"


class Page(NamedTuple):
    """What the report says before any number.

    Attributes:
      title: a heading.
      claim: what the paper says that the sweep will show.
      published: whose the published numbers are, and how they were taken.
      metric: what the numbers are.
      course: whether to show every arm over training, too.
    """

    title: str
    claim: str
    published: str
    metric: MetricName = "accuracy"
    course: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every experiment that trains can be told; experiments add their own."""

    epochs: int = 10
    """Passes over the training images."""
    images: int | None = None
    """How many of the training images to take; None takes all."""
    test_images: int | None = None
    """How many of the test images to take; None takes all."""
    seeds: int = 3
    """How many trainings each arm has, side by side."""
    seed: int = 0
    """The first seed; the others follow it."""
    split: Literal["test", "validation"] = "test"
    """The images to test on: the test set, or a tenth of the training set held out, to tune a choice by."""
    loop: Loop = "auto"
    """Each batch is one compiled step, or a scan runs many; auto chooses by the backend. Both draw the same numbers."""
    diagnostics: bool = False
    """Every epoch's record also holds each layer's effective ranks, and how far what is conserved has drifted."""
    save_every: int = 10
    """Epochs from one checkpoint to the next; the last is always saved."""
    out: Path = Path("runs/sweep")
    """The folder of the results; a run that was killed goes on from its last checkpoint there."""
    data: Path | None = None
    """The folder of the cached data sets; None is the one that JAXFA_DATA names, else ./data."""
    fresh: bool = False
    """The results in the folder are deleted first."""

    arms: ClassVar[tuple[str, ...]] = ()
    """The fields that choose arms: more of them may join the results that are there."""

    def unread(self) -> tuple[str, ...]:
        """The fields that no arm of this run reads; the command line refuses to set them."""
        return ()

    def __post_init__(self) -> None:
        records.refuse_below_one(self, "epochs", "seeds", "save_every", "images", "test_images")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What most sweeps can be told, too."""

    apart: bool = False
    """Every arm trains in a process of its own, all at once; steps are not timed then."""
    minutes: float | None = None
    """The time after which arms that train apart are stopped; the same command goes on later. None never stops."""
    only: str | None = None
    """The one arm that is trained, without a report; None trains all."""

    batch: int = 64
    """How many examples a step has."""
    learning_rate: float = 1e-3
    """The learning rate of Adam, before it decays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_below_one(self, "batch")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")

    def unread(self) -> tuple[str, ...]:
        return () if self.apart else ("minutes",)


def prepare(config: Options, dataset: data.Dataset) -> data.Dataset:
    """The part of a data set that a configuration asks for, on the device."""
    if config.split == "validation":
        dataset = data.hold_out(dataset)
    return data.on_device(data.first(dataset, config.images, config.test_images))


def open_run(config: Options) -> dict[str, Any]:
    """Makes or finds the folder that all trainings of an experiment share.

    Args:
      config: the experiment's configuration.

    Returns:
      What their results depend on, and so what a folder that is there must be of.

    Raises:
      ValueError: if the folder holds another run.
    """
    identity = _identity(config)
    records.open_run(config.out, identity, fresh=config.fresh)
    return identity


def _name(config: Options) -> str:
    """The experiment's, as the command line has it: ``grape_deep`` for ``experiments.grape.deep``."""
    return "_".join(dict.fromkeys(type(config).__module__.split(".")[1:]))


def _identity(config: Options) -> dict[str, Any]:
    how = ("loop", "diagnostics", "save_every", "out", "data", "fresh", "apart", "minutes", "only")
    return records.identity(_name(config), config, (*how, *config.arms))


class Trained(NamedTuple):
    """A training that is done: its name, what trained it, and its records, from epoch 0."""

    name: str
    trainer: Trainer
    history: list[dict[str, Any]]


def train_each(
    config: Options,
    identity: dict[str, Any],
    tasks: Mapping[str, Task],
    make: Callable[[Task, Sequence[int], Loop], Trainer] = Trainer,
) -> Iterator[Trained]:
    """Trains tasks one after the other as a configuration asks, each in a folder of its name.

    Args:
      config: the experiment's configuration.
      identity: from :func:`open_run`.
      tasks: what to train, by name.
      make: what makes a trainer of a task, the seeds and the loop.

    Yields:
      Each training when it is done: nothing is trained before it is asked for. One that diverges is left out; its
      folder says so, see :func:`experiments.common.records.diverged`.

    Raises:
      ValueError: if a folder holds another run.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    with _progress() as progress:
        for name, task in tasks.items():
            trainer = make(task._replace(diagnostics=config.diagnostics), seeds, config.loop)
            try:
                history = train(
                    trainer,
                    config.epochs,
                    folder=config.out / name,
                    config=identity | {"arm": name},
                    save_every=config.save_every,
                    progress=progress,
                )
            except DivergenceError as error:
                progress.console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            else:
                yield Trained(name, trainer, history)


def run(config: Config, page: Page, arms: Sequence[Arm]) -> Path:
    """Trains every arm, times its steps, writes the report.

    Args:
      config: the experiment's configuration.
      page: what the report says.
      arms: the first is the reference of all that name no other; a reference comes before those that name it.

    Returns:
      The path of the report.

    Raises:
      ValueError: if there is no arm, two of them have one name, or the folder holds another run.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"A sweep needs one arm or more, every one with a name of its own, got {names}.")
    if config.only is not None:  # one arm's process leaves the folder to the one that started it
        return _train_one(config, _identity(config), arms)
    identity = open_run(config)
    described = [{key: value for key, value in arm._asdict().items() if key != "task"} for arm in arms]
    for arm in described:
        arm["reference"] = arm["reference"] or names[0]
    records.write_json(config.out / "sweep.json", page._asdict() | {"arms": described})
    if config.apart:
        with _progress() as progress:
            cut = apart.train_apart(config.out, names, config.epochs, config.minutes, progress)
        records.write_json(config.out / "cut.json", cut)
        Console().print(*cut, sep="\n")
    else:
        _train(config, identity, arms)
    Console().print(_table(config.out, METRICS[page.metric]))
    return sweep_report.write(config.out)


def _train_one(config: Config, identity: dict[str, Any], arms: Sequence[Arm]) -> Path:
    chosen = {arm.name: arm.task for arm in arms if arm.name == config.only}
    if not chosen:
        raise ValueError(f"No arm is called {config.only!r}; choose one of {', '.join(arm.name for arm in arms)}.")
    list(train_each(config, identity, chosen))
    return config.out / str(config.only)


def _train(config: Options, identity: dict[str, Any], arms: Sequence[Arm]) -> None:
    references = {arm.name: arm.reference or arms[0].name for arm in arms}
    kept: dict[str, Trainer] = {}
    for name, trainer, _ in train_each(config, identity, {arm.name: arm.task for arm in arms}):
        # Only references stay: a compiled arm and its states can be large.
        kept |= {name: trainer} if name in references.values() else {}
        reference = references[name]
        if reference in kept:
            pair = {reference: kept[reference], name: trainer}
            timing.measure(pair, config.out / name / "timing.json", reference=reference)


def _table(folder: Path, metric: Metric) -> Table:
    table = Table(
        Column("arm", overflow="fold"), "last epoch", "best epoch", "gap", "published", "gap", "angle", "step"
    )
    for row in sweep_report.read_rows(folder):
        gaps = ["" if gap is None else f"{gap:+.{metric.digits}f}" for gap in (row.gap, row.published_gap)]
        published = "" if row.published is None else f"{row.published:.1f}"
        step = f"{row.step['ratio']:.2f} x" if row.step else ""
        found = (row.name, str(row.last), str(row.best), gaps[0], published, gaps[1], f"{row.angle.mean:.0f}°", step)
        table.add_row(*found)
    for name in sweep_report.diverged(folder):
        table.add_row(name, "diverged")
    return table


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    return Progress(*columns, TimeElapsedColumn())
