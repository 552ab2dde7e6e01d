"""The generated part of the main README: the results in its table of rules.

A row is written by hand up to its paper; the columns that follow are made of committed results alone.
"""

import re
from collections.abc import Mapping
from typing import Any

from experiments.common.metrics import Estimate

# What results call a rule, where that is not its name.
ARMS = {
    "backprop()": ("bp",),
    "dfa(shared=True)": ("shared_dfa",),
    "dfa(shared=True, buckets=256)": ("hashed_dfa",),
    "grape()": ("grape", "activations"),
    "pepita(mirror=0.1)": ("mirrored_pepita",),
    "ssa(parallel=False)": ("ssa_sequential",),
}
_WRITTEN = 4
_TABLE = re.compile(r"(?<=<!-- rules -->\n).*?(?=<!-- /rules -->)", re.DOTALL)


def fill(readme: str, columns: Mapping[str, dict[str, Any]]) -> str:
    """The README with its table of rules filled in.

    Args:
      readme: the text, in which ``<!-- rules -->`` and ``<!-- /rules -->`` enclose the table.
      columns: what a result's file holds, by the column's heading.

    Returns:
      The text.
    """
    return _TABLE.sub(lambda table: _filled(table[0], columns), readme)


def _filled(table: str, columns: Mapping[str, dict[str, Any]]) -> str:
    head, rule, *rows = (line.split("|")[1 : 1 + _WRITTEN] for line in table.splitlines())
    head += [f" {heading} " for heading in columns]
    rule += ["---"] * len(columns)
    for row in rows:
        call = row[0].split("`")[1]
        names = ARMS.get(call, (call.partition("(")[0],))
        row += [f" {_cell(found, names)} ".replace("  ", " ") for found in columns.values()]
    return "".join(f"|{'|'.join(row)}|\n" for row in (head, rule, *rows))


def _cell(found: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first of the arms that is there: its accuracy, and the angle to the true gradient."""
    arm = next((found["arms"][name] for name in names if name in found["arms"]), None)
    if arm is None:
        return "diverged" if set(names) & set(found["diverged"]) else ""
    accuracy = str(Estimate(arm["last"]["mean"], arm["last"]["std"], 1)).replace(" ", "")
    return accuracy + (f",\N{NO-BREAK SPACE}{arm['angle']['mean']:.0f}°" if arm["angle"] else "")
