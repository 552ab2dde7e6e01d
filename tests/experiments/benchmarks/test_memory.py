"""The experiment on memory: what it claims holds at a small size, and its report says what was measured."""

import dataclasses

import pytest

from experiments.benchmarks import memory
from experiments.benchmarks.memory_steps import FUSED, REFERENCE, REMATERIALISED, STORED, STREAMED
from experiments.common import records, sweep

TINY = memory.Config(depths=(2, 16), timed=2, width=8, batch=512, repeats=(1,), timed_repeats=1, images=4, pixels=8)


@pytest.mark.long
def test_streamed_memory_is_flat_and_the_report_says_so(tmp_path):
    config = dataclasses.replace(TINY, rounds=2, out=tmp_path)
    page = sweep.run(memory.EXPERIMENT, config)
    found = records.read_json(tmp_path / "memory.json")
    size = {(one["method"], one["depth"]): one["temporary"] for one in found["stack"]}
    for flat in (STREAMED, FUSED):
        assert size[flat, 16] <= 1.3 * size[flat, 2]
    # The controls grow.
    for growing in (REFERENCE, REMATERIALISED, STORED):
        assert size[growing, 16] > 2 * size[growing, 2]
    (head, *rows), text = memory.memory_table(found["stack"]), page.read_text()
    assert head[1:3] == ["2", "16"]
    assert len(rows) == 6
    assert f"{size[STREAMED, 2] / 2**20:.1f}" in text
    assert all(one["low"] <= one["ratio"] <= one["high"] for one in found["resnet"])
    before = (tmp_path / "memory.json").read_bytes()
    assert sweep.run(memory.EXPERIMENT, config) == page  # a finished measurement is kept
    assert (tmp_path / "memory.json").read_bytes() == before
