"""Trains the arms of a sweep side by side, each in a process of its own, until they are done or the time is up.

On a GPU most of a short run is compiling, which processes do at the same time; the device itself they share in turns.
Every process records and checkpoints as if it were alone, so that a cut loses little and the same command goes on.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from experiments.common import records

COMMAND = (sys.executable, "-m", "experiments")
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 20.0


def train_apart(folder: Path, arms: Sequence[str], epochs: int, minutes: float | None, progress: Progress) -> list[str]:
    """Runs this very command once for each arm, all at once.

    Args:
      folder: the sweep's folder; every arm has one of its name in it, with its output beside it in ``NAME.log``.
      arms: the names of the arms.
      epochs: how many epochs each is to train.
      minutes: when to stop what is not done; None never stops it.
      progress: where to show how far they are.

    Returns:
      A sentence for each arm that was stopped or failed.
    """
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    bars = {arm: progress.add_task(arm, total=epochs) for arm in arms}
    # Else what ends this process would leave the arms' behind, to write beside those of the next.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    processes = {arm: _start(folder, arm) for arm in arms}
    try:
        while any(process.poll() is None for process in processes.values()) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            for arm, bar in bars.items():
                progress.update(bar, completed=records.reached(folder / arm))
    finally:
        stopped = [arm for arm, process in processes.items() if process.poll() is None]
        for arm in stopped:
            processes[arm].terminate()
        for process in processes.values():
            _wait(process)
        signal.signal(signal.SIGTERM, before)
    unfinished = [arm for arm in arms if processes[arm].returncode and not _is_done(folder / arm, epochs)]
    return [_told(folder, arm, processes[arm], stopped, epochs) for arm in unfinished]


def share_device() -> None:
    """Lets this process and those that it starts take of the device's memory what they need, as they need it.

    Else the first to touch the device would reserve most of it.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _is_done(folder: Path, epochs: int) -> bool:
    # A process also fails for another arm's divergence.
    return records.reached(folder) == epochs or (folder / records.DIVERGED).exists()


def _start(folder: Path, arm: str) -> subprocess.Popen[bytes]:
    command = [*COMMAND, *sys.argv[1:], "--only", arm]
    with (folder / f"{arm}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _wait(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _told(folder: Path, arm: str, process: "subprocess.Popen[bytes]", stopped: Sequence[str], epochs: int) -> str:
    if arm in stopped:
        return f"{arm} was cut at epoch {records.reached(folder / arm)} of {epochs}; the same command goes on."
    return f"{arm} failed with exit status {process.returncode}; {folder / arm}.log says why."
