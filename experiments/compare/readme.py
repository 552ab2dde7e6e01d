"""The generated parts of the README: the results in the table of rules, and the picture of the comparison.

Both are made of committed results alone. A row of the table is written by hand, up to its paper; this fills in the
columns that follow.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common import records
from experiments.compare import picture

README = Path(__file__).parents[2] / "README.md"
PICTURE = README.parent / "docs" / "images" / "compare.svg"
# The experiments whose results have a column, and its heading.
SHOWN = {"compare": "digits", "grape_resnet20": "ResNet-20, CIFAR-100"}
# What results call a rule, where that is not its name.
ARMS = {"backprop()": ("bp",), "dfa(shared=True)": ("shared_dfa",), "grape()": ("grape", "letter")}
_WRITTEN = 4
_TABLE = re.compile(r"(?<=<!-- rules -->\n).*?(?=<!-- /rules -->)", re.DOTALL)


def write(found: Sequence[dict[str, Any]]) -> None:
    """Writes the README's table and the picture anew.

    Args:
      found: every committed result.
    """
    records.replace(README, fill(README.read_text(), found))
    records.replace(PICTURE, picture.draw(chosen(found)["compare"]))


def chosen(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results that are shown: of each experiment the one with the most arms.

    Args:
      found: every committed result.

    Returns:
      The results by the experiment's name.
    """
    by_size = sorted(found, key=lambda one: len(one["arms"]))
    results = {one["config"]["experiment"]: one for one in by_size}
    return {name: results[name] for name in SHOWN if name in results}


def fill(readme: str, found: Sequence[dict[str, Any]]) -> str:
    """The README with its table of rules filled in.

    Args:
      readme: the text, in which ``<!-- rules -->`` and ``<!-- /rules -->`` enclose the table.
      found: every committed result.

    Returns:
      The text.
    """
    return _TABLE.sub(lambda table: _filled(table[0], chosen(found)), readme)


def _filled(table: str, results: dict[str, dict[str, Any]]) -> str:
    head, rule, *rows = (line.split("|")[1 : 1 + _WRITTEN] for line in table.splitlines())
    head += [f" {SHOWN[name]} " for name in results]
    rule += ["---"] * len(results)
    for row in rows:
        call = row[0].split("`")[1]
        names = ARMS.get(call, (call.partition("(")[0],))
        for one in results.values():
            arms = [one["arms"][name] for name in names if name in one["arms"]]
            row.append(f" {_cell(arms[0])} " if arms else " ")
    return "".join(f"|{'|'.join(row)}|\n" for row in (head, rule, *rows))


def _cell(arm: dict[str, Any]) -> str:
    if "last" not in arm:
        return "diverged"
    mean, std = arm["last"]["mean"], arm["last"]["std"]
    angle = "" if arm["angle"] is None else f",\N{NO-BREAK SPACE}{arm['angle']:.0f}°"
    return f"{mean:.1f}{'' if std is None else f'±{std:.1f}'}{angle}"
