"""The bytes that a compiled program sends between devices, read off its text."""

import math
import re
from collections import defaultdict

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (.+?) (all-(?:gather|reduce|to-all)|collective-\w+|reduce-scatter|ragged-all-to-all)(-start)?\("
)


def sent(text: str, devices: int) -> dict[str, int]:
    """Bytes sent by all devices together in one run of a program, by kind of collective.

    What is inside a loop counts once a turn. A collective over all devices is counted as a ring would carry it.

    Args:
      text: ``compiled.as_text()``.
      devices: how many devices it runs on; all collectives but permutations must be over all of them.

    Returns:
      For each kind the bytes.

    Raises:
      ValueError: if there is a loop of unknown length, or a collective that is not counted here.
    """
    computations = _computations(text)
    total: defaultdict[str, int] = defaultdict(int)

    def walk(name: str, times: int) -> None:
        for line in computations[name]:
            if found := _COLLECTIVE.search(line):
                total[found[2]] += times * _carried(found[2], _size(found[1]), line, devices)
            if "while(" in line:
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                if turns is None:
                    raise ValueError(f"A loop of unknown length: {line.strip()[:200]}")
                walk(_callee("body", line), times * int(turns[1]))
            elif found := re.search(r" (?:call|fusion)\(.*(?:to_apply|calls)=%([\w.\-]+)", line):
                walk(found[1], times)

    walk("ENTRY", 1)
    return dict(total)


def _computations(text: str) -> dict[str, list[str]]:
    computations: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.endswith("{") and (found := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            name = "ENTRY" if found[1] else found[2]
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations


def _callee(role: str, line: str) -> str:
    found = re.search(rf"{role}=%([\w.\-]+)", line)
    assert found, line
    return found[1]


def _size(shapes: str) -> int:
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(_BYTES[dtype] * math.prod(map(int, filter(None, axes.split(",")))) for dtype, axes in found)


def _carried(kind: str, size: int, line: str, devices: int) -> int:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}(?:,|$)", line.replace("},{", ";"))
        return size * len(pairs[1].split(";")) if pairs else 0
    # In units of the result's size, all devices together.
    rings = {"all-gather": devices - 1, "all-reduce": 2 * (devices - 1), "reduce-scatter": devices * (devices - 1)}
    if kind not in rings:
        raise ValueError(f"Not counted: {line.strip()[:200]}")
    return size * rings[kind]
