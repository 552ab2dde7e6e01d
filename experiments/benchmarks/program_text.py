"""A compiled program's text, as XLA writes it, taken apart: its computations, and the instructions of each."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

ENTRY = "ENTRY"
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|branch_computations)=\{?%?([\w.\-]+)")
_TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_BITS = re.compile(r"\d+")


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      shape: what it returns, as written.
      code: what it does, such as ``fusion``.
      operands: their names.
      rest: what is written behind them.
    """

    shape: str
    code: str
    operands: tuple[str, ...]
    rest: str


Computations = dict[str, dict[str, Instruction]]


def computations(text: str) -> Computations:
    """The instructions of each computation by their names; the first to run is ``ENTRY``."""
    found: Computations = {}
    name = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = ENTRY if head[1] else head[2]
            found[name] = {}
        elif name and (match := _LINE.match(line)):
            found[name][match[1]] = _instruction(match[2])
    return found


def _instruction(text: str) -> Instruction:
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    stop = _closed(rest, start)
    return Instruction(shape, rest[:start], tuple(re.findall(r"%([\w.\-]+)", rest[start:stop])), rest[stop:])


def _closed(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"No bracket closes that of {text[start : start + 40]!r}.")


def called(one: Instruction, every: Computations) -> list[dict[str, Instruction]]:
    """The computations that an instruction runs: of two branches the first, of a loop its body."""
    return [every[name] for name in _CALLED.findall(one.rest) if name in every]


def turns(one: Instruction) -> int:
    """How often an instruction runs what it calls.

    Raises:
      ValueError: if a loop does not tell.
    """
    known = _TURNS.search(one.rest)
    if one.code == "while" and known is None:
        raise ValueError(f"A loop of unknown length: {one.rest.strip()[:200]}")
    return int(known[1]) if known else 1


def arrays(shape: str) -> Iterator[tuple[float, list[int]]]:
    """The bytes of a number and the sizes of the axes, for each array of a shape."""
    for name, sizes in _ARRAY.findall(shape):
        bits = _BITS.search(name)
        yield (int(bits[0]) if bits else 8) / 8, [int(size) for size in sizes.split(",") if size]


def size(shape: str) -> float:
    """The bytes of all arrays of a shape."""
    return sum(each * math.prod(sizes) for each, sizes in arrays(shape))
