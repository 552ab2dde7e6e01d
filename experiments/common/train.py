"""The loop over epochs that every experiment shares: trains, measures, records, checkpoints, resumes."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

from experiments.common import checkpoint, records
from experiments.common.trainer import State, Trainer


class DivergenceError(FloatingPointError):
    """A training whose loss is no finite number; its folder says so, and it is not trained again."""


def train(
    trainer: Trainer,
    epochs: int,
    *,
    folder: Path,
    config: dict[str, Any],
    save_every: int = 5,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Trains all seeds of a task, going on from the folder's last checkpoint if there is one.

    Args:
      trainer: the compiled task.
      epochs: how many epochs in all.
      folder: the run's folder; see :mod:`experiments.common.records`.
      config: everything that the results depend on; a folder of another configuration is refused.
      save_every: epochs from one checkpoint to the next; the last epoch is always saved.
      progress: where to show how far it is.

    Returns:
      One record per epoch, from 0 (before the first step).

    Raises:
      ValueError: if the folder or its checkpoint is of another configuration, or damaged, or diagnostics are asked for
        that its records lack.
      DivergenceError: if a loss is not finite, now or in an earlier run of the same configuration.
    """
    records.open_run(folder, config)
    note = folder / records.DIVERGED
    if note.exists():
        raise _error(folder, note.read_text())
    if trainer.task.diagnostics and any("error_rank" not in record for record in records.read(folder)):
        raise ValueError(
            f"{folder} holds epochs that were trained without diagnostics: choose another --out, or --fresh."
        )
    (folder / "coverage.txt").write_text(f"{trainer.coverage}\n")
    with checkpoint.checkpoints(folder) as manager:
        state = trainer.init()
        done, state = checkpoint.restore(manager, state) or (-1, state)
        history = records.truncate(folder, done)
        bar = progress.add_task(folder.name, total=epochs, completed=max(done, 0)) if progress else None
        for epoch in range(done + 1, epochs + 1):
            try:
                state, record = _epoch(trainer, state, epoch)
            except DivergenceError as error:
                records.replace(note, str(error))
                raise _error(folder, str(error)) from None
            history.append(records.append(folder, record))
            if epoch == epochs or epoch % save_every == 0:
                checkpoint.save(manager, epoch, state)
            if progress and bar is not None:
                accuracy = float(np.mean(record["test_accuracy"]))
                progress.update(bar, completed=epoch, description=f"{folder.name:<14} {accuracy:6.1%}")
    return history


def _error(folder: Path, note: str) -> DivergenceError:
    return DivergenceError(f"{folder} {note}; lower the learning rate. The records of the epochs before it are kept.")


def _epoch(trainer: Trainer, state: State, epoch: int) -> tuple[State, dict[str, Any]]:
    """Trains for one epoch (none for epoch 0) and measures: the only place where the host waits for the device."""
    started = time.perf_counter()
    losses: Any = []
    if epoch:
        state, losses = trainer.advance(state, trainer.shuffle(state), trainer.steps)
        losses = np.asarray(jax.device_get(losses)).T
        _stop_unless_finite(trainer, epoch, "training", losses)
        state = trainer.task.between(state, epoch) if trainer.task.between else state
    found = trainer.evaluate(state)
    _stop_unless_finite(trainer, epoch, "test", found["test_loss"][None])
    seconds = time.perf_counter() - started
    record: dict[str, Any] = {"epoch": epoch, "step": epoch * trainer.steps, "seconds": round(seconds, 3)}
    record["train_loss"] = losses.mean(0).tolist() if epoch else None
    return state, record | {key: _lists(value) for key, value in found.items()}


def _lists(value: Any) -> Any:
    return {key: _lists(item) for key, item in value.items()} if isinstance(value, dict) else value.tolist()


def _stop_unless_finite(trainer: Trainer, epoch: int, name: str, losses: np.ndarray) -> None:
    """Raises an error with the place of the first of these losses, ``(steps, seeds)``, that is no number."""
    steps, seeds = np.nonzero(~np.isfinite(losses))
    if len(steps):
        step = (epoch - 1) * trainer.steps + steps[0] + 1 if name == "training" else epoch * trainer.steps
        value, seed = losses[steps[0], seeds[0]], trainer.seeds[seeds[0]]
        raise DivergenceError(f"diverged: the {name} loss is {value} at step {step}, epoch {epoch}, seed {seed}")
