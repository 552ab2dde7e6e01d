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
    whole, minutes = _minutes(found)
    if whole:
        return f", {minutes:.0f} minutes" if minutes >= 1 else ", less than a minute"
    return f", {60 * minutes:.0f} s of training" if minutes else ""


def together(every: Iterable[Mapping[str, Any]], preset: str = "cpu") -> str:
    """A sentence on how long all results of a preset took, one after the other.

    Args:
      every: what the files of results hold.
      preset: whose results are counted.

    Returns:
      The sentence, which says how many of them tell less than all.
    """
    told = [_minutes(found) for found in every if found.get("name") == preset]
    less = sum(not whole for whole, _ in told)
    but = f", of which {less} tell no more than their arms' training" if less else ""
    return f"All {len(told)} results of the preset `{preset}` took {sum(time for _, time in told) / 60:.1f} hours{but}."


def _minutes(found: Mapping[str, Any]) -> tuple[bool, float]:
    """Whether all of a result's runs tell their time; and minutes, of its arms' training if they do not."""
    minutes = [run.get("minutes") for run in found["runs"]]
    if None not in minutes:
        return True, sum(minutes)
    return False, sum(arm["seconds"] for arm in found.get("arms", {}).values()) / 60
