"""How long what was run has taken, as results tell it."""

from collections.abc import Iterable, Mapping
from typing import Any


def took(found: Mapping[str, Any]) -> str:
    """The end of a sentence on a result: how long its runs took, which those that were killed do not tell.

    Args:
      found: what a file of results holds.

    Returns:
      Where a run was killed, how long its arms trained; empty where nothing tells.
    """
    whole, trained = _minutes(found)
    if whole is not None:
        return f", {whole:.0f} minutes" if whole >= 1 else ", less than a minute"
    return f", {60 * trained:.0f} s of training" if trained else ""


def together(every: Iterable[Mapping[str, Any]], preset: str = "cpu") -> str:
    """A sentence on how long all results of a preset took, one after the other.

    Args:
      every: what the files of results hold.
      preset: whose results are counted.

    Returns:
      The sentence, which says how many tell less.
    """
    told = [_minutes(found) for found in every if found.get("name") == preset]
    hours = sum(trained if whole is None else whole for whole, trained in told) / 60
    part = sum(whole is None and trained > 0 for whole, trained in told)
    none = sum(whole is None and not trained for whole, trained in told)
    less = [f"of {part} only the training was timed"] if part else []
    less += [f"{none} tell no time"] if none else []
    return (
        f"Results of the preset `{preset}` ({len(told)}) took {hours:.1f} hours{''.join(f'; {one}' for one in less)}."
    )


def _minutes(found: Mapping[str, Any]) -> tuple[float | None, float]:
    """The minutes of a result's runs, unless one was killed or is too old to tell; and those of its arms' training."""
    minutes = [run.get("minutes") for run in found["runs"]]
    trained = sum(arm["seconds"] for arm in found.get("arms", {}).values()) / 60
    return (None if None in minutes else sum(minutes)), trained
