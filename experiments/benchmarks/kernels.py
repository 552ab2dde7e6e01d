"""What a program compiled for a GPU runs and moves, read off its text: XLA counts the operations of a CPU's alone."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"}
_LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|branch_computations)=\{?%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ROOM = re.compile(r", [su]8\[\d*\]\{0\}\)$")
_BITS = re.compile(r"\d+")


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


class _Instruction(NamedTuple):
    shape: str
    code: str
    operands: tuple[str, ...]
    rest: str


def counted(text: str) -> Counts:
    """Counts what a compiled program's text holds.

    Args:
      text: of a program that XLA has optimised for a GPU, ``compiled.as_text()``.

    Returns:
      The counts; a loop's body as often as it runs, of two branches the first.
    """
    parts = dict(_parts(text))
    return _run(parts[""], parts)


def _parts(text: str) -> Iterator[tuple[str, dict[str, _Instruction]]]:
    """The instructions of each computation by its name; of the entry by none."""
    name: str | None = None
    found: dict[str, _Instruction] = {}
    for line in text.splitlines():
        if name is None and line.endswith("{") and (line.startswith(("%", "ENTRY"))):
            name, found = ("" if line.startswith("ENTRY") else line[1:].split(" ")[0]), {}
        elif name is not None and line.startswith("}"):
            yield name, found
            name = None
        elif name is not None and (match := _LINE.match(line)):
            found[match[1]] = _instruction(match[2])


def _instruction(text: str) -> _Instruction:
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    stop = _closed(rest, start)
    return _Instruction(shape, rest[:start], tuple(re.findall(r"%([\w.\-]+)", rest[start:stop])), rest[stop:])


def _closed(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"No bracket closes that of {text[start : start + 40]!r}.")


def _run(part: dict[str, _Instruction], parts: dict[str, dict[str, _Instruction]]) -> Counts:
    total = Counts(0, 0, 0, 0)
    for one in part.values():
        if one.code in _NOTHING or one.code.endswith("-done"):
            continue
        called = [parts[name] for name in _CALLED.findall(one.rest) if name in parts]
        if one.code in ("while", "call", "conditional"):
            total = total.plus(_run(called[0], parts), _times(one))
            continue
        shapes = (_result(one), *(part[name].shape for name in one.operands if name in part))
        flops = _all_flops({"": one}, parts, part)
        total = total.plus(Counts(1, flops > 0, flops, sum(map(_bytes, shapes))))
    return total


def _times(one: _Instruction) -> float:
    trips = _TRIPS.search(one.rest)
    if one.code == "while" and trips is None:
        raise ValueError("A loop of this program does not tell how often it runs, so that it can't be counted.")
    return float(trips[1]) if trips else 1


def _result(one: _Instruction) -> str:
    """What a kernel returns, without the room that a library asks for to work in."""
    return _ROOM.sub("", one.shape) if one.code == "custom-call" else one.shape


def _bytes(shape: str) -> float:
    return sum(math.prod(sizes) * bits / 8 for bits, sizes in _arrays(shape))


def _arrays(shape: str) -> Iterator[tuple[int, list[int]]]:
    for name, sizes in _ARRAY.findall(shape):
        bits = _BITS.search(name)
        yield (int(bits[0]) if bits else 8), [int(size) for size in sizes.split(",") if size]


def _all_flops(
    inner: dict[str, _Instruction], parts: dict[str, dict[str, _Instruction]], part: dict[str, _Instruction]
) -> float:
    """Operations of instructions, whose operands stand in ``part``, and of all that they call."""
    total = 0.0
    for one in inner.values():
        called = [parts[name] for name in _CALLED.findall(one.rest) if name in parts]
        total += _flops(one, part) + sum(_all_flops(each, parts, each) for each in called)
    return total


def _flops(one: _Instruction, part: dict[str, _Instruction]) -> float:
    """Operations of a product; none of anything else."""
    target = _TARGET.search(one.rest)
    library = target[1] if target else ""
    if one.code == "dot" or "matmul" in library or "gemm" in library:
        contracted = re.search(r'lhs_contracting_dim(?:ension)?s[="]*:?[{\["]*([\d",]+)', one.rest)
        left = next(_arrays(part[one.operands[0]].shape))[1]
        inner = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted[1])) if contracted else 1
        return 2.0 * math.prod(next(_arrays(one.shape))[1]) * inner
    window = re.search(r"dim_labels=\w+_(\w+)->", one.rest)
    if window is None:
        return 0.0
    arrays = [next(_arrays(shape))[1] for shape in (one.shape, *(part[name].shape for name in one.operands[:2]))]
    # Which of the result and the operands are the filter and what its outputs are.
    filters, outputs = (0, 2) if "BackwardFilter" in library else (2, 1) if "BackwardInput" in library else (2, 0)
    channels = arrays[filters][window[1].index("o")]
    return 2.0 * math.prod(arrays[filters]) * math.prod(arrays[outputs]) / channels
