"""The one function that runs every experiment: trains its arms, times them, records, reports.

An experiment that was killed goes on where it was.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.common import apart, page, plots, records, timing
from experiments.common.experiment import Arm, Experiment, Histories, Training, identity
from experiments.common.programs import keep_programs
from experiments.common.published import as_published, smaller
from experiments.common.train import DivergenceError, train
from experiments.common.trainer import Trainer


def run(experiment: Experiment, config: Any) -> Path:
    """Trains every arm, times the steps, makes the study if there is one, writes the report.

    Args:
      experiment: what to run.
      config: one of its presets, or another configuration of that class.

    Returns:
      The path of the report; of the arm's folder if the configuration names one arm alone.

    Raises:
      ValueError: if there is no arm, two of them have one name, or the folder holds another run.
      FileNotFoundError: if the data set is not there.
      FloatingPointError: if a study has nothing left to show, since every training diverged.
    """
    started, known = time.monotonic(), identity(experiment.name, config)
    if config.keep_programs:
        keep_programs()
    arms = list(experiment.arms(config)) if experiment.arms else []
    _check(experiment, arms)
    if getattr(config, "only", None) is not None:  # one arm's process leaves the folder to the one that started it
        return _train_one(config, known, arms)
    records.open_run(config.out, known, fresh=config.fresh)
    described = [_described(arm, arms[0].name) for arm in arms]
    said = experiment.page._asdict() | {"claim": experiment.claim}
    told = {"as_published": as_published(experiment, known), "smaller": smaller(experiment, known), "arms": described}
    records.write_json(config.out / "sweep.json", said | told)
    if arms:
        _train(config, known, arms, timed=experiment.study is None)
    if experiment.study is not None:
        _study(experiment, config, arms)
    records.took(config.out, time.monotonic() - started)
    Console().print(*page.tables(config.out))
    return page.write(config.out)


def _check(experiment: Experiment, arms: Sequence[Arm]) -> None:
    names = [arm.name for arm in arms]
    if (experiment.study is None and not names) or len(set(names)) < len(names):
        raise ValueError(f"A sweep needs one arm or more, every one with a name of its own, got {names}.")


def _described(arm: Arm, first: str) -> dict[str, Any]:
    """What the report says of an arm before any number."""
    found = {key: value for key, value in arm._asdict().items() if key not in ("task", "seeds")}
    return found | {"reference": arm.reference or first}


def _train_one(config: Training, known: dict[str, Any], arms: Sequence[Arm]) -> Path:
    chosen = [arm for arm in arms if arm.name == config.only]
    if not chosen:
        raise ValueError(f"No arm is called {config.only!r}; choose one of {', '.join(arm.name for arm in arms)}.")
    list(train_each(config, known, chosen))
    return config.out / str(config.only)


def _train(config: Training, known: dict[str, Any], arms: Sequence[Arm], *, timed: bool) -> None:
    if config.apart:
        names = [arm.name for arm in arms]
        with _progress() as progress:
            cut = apart.train_apart(config.out, names, config.epochs, config.minutes, progress)
        Console().print(*cut, sep="\n")
        return
    references = {arm.name: arm.reference or arms[0].name for arm in arms}
    kept: dict[str, Trainer] = {}
    for name, trainer in train_each(config, known, arms):
        # Only references stay: a compiled arm and its states can be large.
        kept |= {name: trainer} if name in references.values() else {}
        reference = references[name]
        if timed and reference in kept:
            pair = {reference: kept[reference], name: trainer}
            timing.measure(pair, config.out / name / "timing.json", reference=reference)


def train_each(config: Training, known: dict[str, Any], arms: Sequence[Arm]) -> Iterator[tuple[str, Trainer]]:
    """Trains arms one after the other, each in a folder of its name.

    Args:
      config: the experiment's configuration.
      known: what results depend on, from :func:`experiments.common.experiment.identity`.
      arms: what to train.

    Yields:
      Each arm's name and trainer when it is done: nothing is trained before it is asked for. One that diverges is left
      out; its folder says so, see :func:`experiments.common.records.diverged`.
    """
    every = range(config.seed, config.seed + config.seeds)
    with _progress() as progress:
        for arm in arms:
            task = arm.task._replace(diagnostics=config.diagnostics)
            trainer = Trainer(task, arm.seeds or every, config.loop)
            folder, every_field = config.out / arm.name, known | {"arm": arm.name}
            how: dict[str, Any] = {"save_every": config.save_every, "progress": progress}
            try:
                train(trainer, config.epochs, folder=folder, config=every_field, **how)
            except DivergenceError as error:
                progress.console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            else:
                yield arm.name, trainer


def _study(experiment: Experiment, config: Any, arms: Sequence[Arm]) -> None:
    lost = records.diverged(config.out)
    histories: Histories = {
        arm.name: found
        for arm in arms
        if arm.name not in lost and len(found := records.read(config.out / arm.name)) > 1
    }
    if arms and not histories:
        raise FloatingPointError(
            f"Nothing in {config.out} is left to draw: {'; '.join(map(' '.join, lost.items())) or 'all was cut'}."
        )
    assert experiment.study is not None
    with plots.style():
        study = experiment.study(config, histories)
        page.save(config.out, study)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    return Progress(*columns, TimeElapsedColumn())
