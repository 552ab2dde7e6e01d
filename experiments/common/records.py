"""A run's folder: ``config.json``, ``environment.json``, one line of ``metrics.jsonl`` per epoch, checkpoints.

A training that diverged has ``diverged.txt``, too: one line that says where. It is not trained again.

A folder belongs to one configuration. Files are replaced whole, so that a kill at any moment leaves the old or the new.
"""

import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

DIVERGED = "diverged.txt"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_PEERS = ("torch", "biotorch")  # beside which benchmarks run, where they are installed


def open_run(folder: Path, config: dict[str, Any], *, fresh: bool = False) -> None:
    """Makes a run's folder, or finds one of the same configuration; notes where and with what it runs.

    Args:
      folder: the run's folder.
      config: everything that the results depend on, as JSON values.
      fresh: whether to delete what is there.

    Raises:
      ValueError: if the folder holds a run of another configuration, or files that are no run.
    """
    # Both files: no folder but a run's is ever deleted.
    if fresh and (folder / "config.json").exists() and (folder / "environment.json").exists():
        shutil.rmtree(folder)
    config = json.loads(json.dumps(config))
    if (folder / "config.json").exists():
        _check_same(folder, read_json(folder / "config.json"), config)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files but no config.json, so it is no run's folder: choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    starts = read_json(folder / "environment.json") if (folder / "environment.json").exists() else []
    write_json(folder / "environment.json", [*starts, environment()])


def took(folder: Path, seconds: float) -> None:
    """Notes how long the run that ends took since its start; one that a kill ends notes nothing."""
    *before, last = read_json(folder / "environment.json")
    write_json(folder / "environment.json", [*before, last | {"minutes": round(seconds / 60, 1)}])


def identity(experiment: str, config: Any, ignored: Sequence[str]) -> dict[str, Any]:
    """What results depend on: a configuration without where it runs, and which other runs stand beside.

    Args:
      experiment: the experiment's name.
      config: a dataclass.
      ignored: the fields that no result depends on.

    Returns:
      The experiment and the other fields, as JSON values.
    """
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key not in ignored}
    return json.loads(json.dumps({"experiment": experiment} | fields))


def environment() -> dict[str, Any]:
    """The machine, the versions, the commit and the time."""
    device = jax.devices()[0]
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "backend": jax.default_backend(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **_versions(),
        "commit": _commit(),
        "command": " ".join(sys.argv),
    }


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in _PACKAGES}
    for name in _PEERS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def append(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Adds one line to ``metrics.jsonl`` and sees it to the disk; returns it with None for NaN, which JSON has not."""
    record = _finite(record)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return record


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without a last line that a kill cut short."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def reached(folder: Path) -> int:
    """The last epoch that a run has a record of."""
    return max((record["epoch"] for record in read(folder)), default=0)


def truncate(folder: Path, epoch: int) -> list[dict[str, Any]]:
    """Drops what a killed run wrote after the checkpoint of ``epoch`` (-1: everything); returns what stays."""
    records = [record for record in read(folder) if record["epoch"] <= epoch]
    replace(folder / "metrics.jsonl", "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
    return records


def diverged(folder: Path) -> dict[str, str]:
    """What is said of every training below a folder that diverged, by the training's name."""
    return {str(path.parent.relative_to(folder)): path.read_text().strip() for path in sorted(folder.rglob(DIVERGED))}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    replace(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
      ValueError: if the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): delete its folder, or run with --fresh.") from error


def replace(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if keys:
        changes = "; ".join(f"{key} was {there.get(key)!r}, is now {here.get(key)!r}" for key in keys)
        raise ValueError(
            f"{folder} holds a run of another configuration: {changes}. Choose another --out, or delete that run with "
            f"--fresh."
        )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    if "JAXFA_COMMIT" in os.environ:  # where the code was copied without its repository
        return os.environ["JAXFA_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
