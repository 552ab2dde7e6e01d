"""What an experiment is: a value of a page, presets, and arms to train or a study to make.

:func:`experiments.common.sweep.run` runs every one.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

from matplotlib.figure import Figure

from experiments.common import bounds, data, records
from experiments.common.bounds import FROM_ZERO
from experiments.common.metrics import MetricName
from experiments.common.task import Task
from experiments.common.trainer import Loop

Histories: TypeAlias = Mapping[str, list[dict[str, Any]]]
OWN = "the paper's own"


class Arm(NamedTuple):
    """One training of an experiment.

    Attributes:
      name: the name of its folder; no other arm has it.
      group: the line of the figure that it lies on, or the part of the table.
      x: where on that line; None for one that lies on no line, drawn as a level.
      task: what is trained.
      published: the published number, such as accuracy in percent; None if there is none. It is shown in the published
        set-up alone.
      reference: the name of the arm that it is compared with; by default the first arm.
      axis: what ``x`` counts; arms of another axis get a figure of their own.
      title: what the table calls it; by default its ``x`` or its name.
      note: a few words under the title.
      origin: where the published number comes from.
      seeds: those that it trains side by side; None trains all of the configuration's.
    """

    name: str
    group: str
    x: float | None
    task: Task
    published: float | None = None
    reference: str | None = None
    axis: str = "rank"
    title: str = ""
    note: str = ""
    origin: str = OWN
    seeds: Sequence[int] | None = None


class Page(NamedTuple):
    """What the report says before any number, beside the docstring's first line and its claim.

    Attributes:
      title: a heading, best a question.
      published: whose the published numbers are, and how they were taken.
      metric: what the numbers are.
      epoch: of which the published numbers are: the last, also where the paper does not say, or each training's best.
        Gaps to a reference are of the same epoch.
    """

    title: str
    published: str = ""
    metric: MetricName = "accuracy"
    epoch: Literal["last", "best"] = "best"


class Table(NamedTuple):
    """Rows of cells, the first of them the header."""

    title: str
    rows: Sequence[Sequence[str]]


class Study(NamedTuple):
    """What an experiment shows that is more than each arm's course.

    Attributes:
      figure: one figure, made inside :func:`experiments.common.plots.style`.
      caption: what the figure shows.
      tables: the numbers.
      findings: what came of it: pairs of a figure and the sentence that it begins.
      numbers: more of them, as JSON values, for the file of results alone.
    """

    figure: Figure
    caption: str
    tables: Sequence[Table]
    findings: Sequence[tuple[str, str]] = ()
    numbers: Any = None


class Experiment(NamedTuple):
    """An experiment.

    Attributes:
      module: ``__name__`` of its file, from which its name comes.
      about: ``__doc__`` of its file: a line, a paragraph with the claim, one with the command, and, once there are
        results, one that begins with "Verdict:" and holds no number, since numbers are in the tables.
      presets: configurations by name; ``cpu`` is the default.
      page: what the report says before any number.
      arms: ``configuration -> arms``; the first is the reference of all that name no other.
      study: ``(configuration, records of each arm that did not diverge) -> Study``; None shows the arms side by side.
      size: the fields that, as in the preset ``paper``, make the published set-up, beside all images: see
        :mod:`experiments.common.published`. None where there is no published number.
    """

    module: str
    about: str | None
    presets: Mapping[str, Any]
    page: Page
    arms: Callable[[Any], Iterable[Arm]] | None = None
    study: Callable[[Any, Histories], Study] | None = None
    size: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The name of the command line: ``grape_deep`` for ``experiments.grape.deep``."""
        return "_".join(dict.fromkeys(self.module.removeprefix("experiments.benchmarks.").split(".")[-2:]))

    @property
    def paper(self) -> str:
        """The folder that it lies in."""
        return self.module.split(".")[1]

    def paragraphs(self) -> list[str]:
        """The docstring's, each in one line."""
        return [" ".join(one.split()) for one in (self.about or "").strip().split("\n\n")]

    @property
    def claim(self) -> str:
        """The docstring's first line, and the paragraph on what the paper says that the experiment will show."""
        found = (one for one in self.paragraphs()[1:] if one.startswith("Claim"))
        return " ".join([self.paragraphs()[0], *found]).replace("``", "")

    @property
    def verdict(self) -> str:
        """The docstring's paragraph on whether the claim holds here, and if not, why; empty if it has none."""
        found = (one for one in self.paragraphs() if one.startswith("Verdict: "))
        return next(found, "").removeprefix("Verdict: ")

    def preset(self, name: str) -> Any:
        """A preset's configuration, its results in a folder of that name."""
        return dataclasses.replace(self.presets[name], out=Path("runs") / f"{self.name}-{name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every experiment can be told."""

    out: Path = Path("runs")
    """The folder of the results; a run that was killed goes on from its last checkpoint there."""
    fresh: bool = False
    """The results in the folder are deleted first."""
    keep_programs: bool = True
    """Compiled programs are kept in the user's cache folder, for other arms and the next run to find."""

    arms: ClassVar[tuple[str, ...]] = ()
    """The fields that choose arms: more of them may join the results that are there."""

    def __post_init__(self) -> None:
        bounds.check(self)

    def unread(self) -> tuple[str, ...]:
        """The fields that no arm of this run reads; the command line refuses to set them."""
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds(Options):
    """What every experiment of several seeds can be told."""

    seeds: int = 3
    """How many trainings each arm has, side by side."""
    seed: Annotated[int, FROM_ZERO] = 0
    """The first seed; the others follow it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Seeds):
    """What every experiment that trains can be told."""

    epochs: int = 10
    """Passes over the training images."""
    images: int | None = None
    """How many of the training images to take; None takes all."""
    test_images: int | None = None
    """How many of the test images to take; None takes all."""
    split: Literal["test", "validation"] = "test"
    """The images to test on: the test set, or a tenth of the training set held out, to tune a choice by."""
    loop: Loop = "auto"
    """Each batch is one compiled step, or a scan runs many; auto chooses by the backend. Both draw the same numbers."""
    diagnostics: bool = False
    """Every epoch's record also holds each layer's effective ranks, and how far what is conserved has drifted."""
    save_every: int = 10
    """Epochs from one checkpoint to the next; the last is always saved."""
    data: Path | None = None
    """The folder of the cached data sets; None is the one that JAXFA_DATA names, else ./data."""
    apart: bool = False
    """Every arm trains in a process of its own, all at once; steps are not timed then."""
    minutes: float | None = None
    """The time after which arms that train apart are stopped; the same command goes on later. None never stops."""
    only: str | None = None
    """The one arm that is trained, without a report; None trains all."""

    def unread(self) -> tuple[str, ...]:
        return () if self.apart else ("minutes",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Training):
    """What most experiments can be told, too."""

    batch: int = 64
    """How many examples a step has."""
    learning_rate: float = 1e-3
    """The learning rate of Adam, before it decays."""


def load(config: Training, name: data.DatasetName, shrink: int = 1) -> data.Dataset:
    """The part of an image data set that a configuration asks for, on the device."""
    return prepare(config, data.shrink(data.load(name, config.data), shrink))


def finished(config: Training, arms: Iterable[Arm], histories: Histories) -> list[Arm]:
    """The arms that were trained to the last epoch: of others there may be no last state, or an earlier one."""
    return [arm for arm in arms if arm.name in histories and histories[arm.name][-1]["epoch"] == config.epochs]


def prepare(config: Training, dataset: data.Dataset) -> data.Dataset:
    """The part of a data set that a configuration asks for, on the device."""
    if config.split == "validation":
        dataset = data.hold_out(dataset)
    return data.on_device(data.first(dataset, config.images, config.test_images))


def identity(experiment: str, config: Options) -> dict[str, Any]:
    """What results depend on: the configuration without where and how it runs, and which arms stand beside."""
    how = ("loop", "diagnostics", "save_every", "out", "data", "fresh", "keep_programs", "apart", "minutes", "only")
    return records.identity(experiment, config, (*how, *config.arms))
