"""What a program compiled for a GPU runs and moves, read off its text: XLA counts the operations of a CPU's alone."""

import math
import re
from typing import NamedTuple

from experiments.benchmarks.program_text import (
    ENTRY,
    Computations,
    Instruction,
    arrays,
    called,
    computations,
    size,
    turns,
)

_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"}
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ROOM = re.compile(r", [su]8\[\d*\]\{0\}\)$")


class Counts(NamedTuple):
    """What a program runs and moves.

    Attributes:
      kernels: how many programs the device starts, one after the other.
      products: those of them that are products of matrices or convolutions.
      flops: operations of the products.
      moved: bytes that all kernels read and write.
    """

    kernels: float
    products: float
    flops: float
    moved: float

    def plus(self, other: "Counts", times: float = 1) -> "Counts":
        """The sum with so many times another's."""
        return Counts(*(a + times * b for a, b in zip(self, other, strict=True)))


def counted(text: str) -> Counts:
    """Counts what a compiled program's text holds.

    Args:
      text: of a program that XLA has optimised for a GPU, ``compiled.as_text()``.

    Returns:
      The counts; a loop's body as often as it runs, of two branches the first.

    Raises:
      ValueError: if a loop does not tell how often it runs.
    """
    every = computations(text)
    return _run(every[ENTRY], every)


def _run(part: dict[str, Instruction], every: Computations) -> Counts:
    total = Counts(0, 0, 0, 0)
    for one in part.values():
        if one.code in _NOTHING or one.code.endswith("-done"):
            continue
        if one.code in ("while", "call", "conditional"):
            total = total.plus(_run(called(one, every)[0], every), turns(one))
            continue
        shapes = (_result(one), *(part[name].shape for name in one.operands if name in part))
        flops = _all_flops(one, part, every)
        total = total.plus(Counts(1, flops > 0, flops, sum(map(size, shapes))))
    return total


def _result(one: Instruction) -> str:
    """What a kernel returns, without the room that a library asks for to work in."""
    return _ROOM.sub("", one.shape) if one.code == "custom-call" else one.shape


def _all_flops(one: Instruction, part: dict[str, Instruction], every: Computations) -> float:
    """Operations of an instruction, whose operands stand in ``part``, and of all that it calls."""
    inside = (_all_flops(inner, each, every) for each in called(one, every) for inner in each.values())
    return _flops(one, part) + sum(inside)


def _flops(one: Instruction, part: dict[str, Instruction]) -> float:
    """Operations of a product; none of anything else."""
    target = _TARGET.search(one.rest)
    library = target[1] if target else ""
    if one.code == "dot" or "matmul" in library or "gemm" in library:
        contracted = re.search(r'lhs_contracting_dim(?:ension)?s[="]*:?[{\["]*([\d",]+)', one.rest)
        left = next(arrays(part[one.operands[0]].shape))[1]
        inner = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted[1])) if contracted else 1
        return 2.0 * math.prod(next(arrays(one.shape))[1]) * inner
    window = re.search(r"dim_labels=\w+_(\w+)->", one.rest)
    if window is None:
        return 0.0
    sizes = [next(arrays(shape))[1] for shape in (one.shape, *(part[name].shape for name in one.operands[:2]))]
    # Which of the result and the operands are the filter and what its outputs are.
    filters, outputs = (0, 2) if "BackwardFilter" in library else (2, 1) if "BackwardInput" in library else (2, 0)
    channels = sizes[filters][window[1].index("o")]
    return 2.0 * math.prod(sizes[filters]) * math.prod(sizes[outputs]) / channels
