"""The bytes that a compiled program sends between devices, read off its text."""

import re
from collections import defaultdict

from experiments.benchmarks.program_text import ENTRY, Instruction, called, computations, size, turns

_COLLECTIVE = re.compile(r"(all-(?:gather|reduce|to-all)|collective-\w+|reduce-scatter|ragged-all-to-all)(-start)?$")


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
    every = computations(text)
    total: defaultdict[str, int] = defaultdict(int)

    def walk(part: dict[str, Instruction], times: int) -> None:
        for one in part.values():
            if found := _COLLECTIVE.match(one.code):
                total[found[1]] += times * _carried(found[1], int(size(one.shape)), one.rest, devices)
            for inner in called(one, every):
                walk(inner, times * turns(one))

    walk(every[ENTRY], 1)
    return dict(total)


def _carried(kind: str, whole: int, rest: str, devices: int) -> int:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}(?:,|$)", rest.replace("},{", ";"))
        return whole * len(pairs[1].split(";")) if pairs else 0
    # In units of the result's size, all devices together.
    rings = {"all-gather": devices - 1, "all-reduce": 2 * (devices - 1), "reduce-scatter": devices * (devices - 1)}
    if kind not in rings:
        raise ValueError(f"Not counted: {kind} {rest.strip()[:200]}")
    return whole * rings[kind]
