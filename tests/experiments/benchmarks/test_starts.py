"""What is told of starts: who keeps the promise of its family, and who is refused."""

import pytest

from experiments.benchmarks import starts
from experiments.benchmarks.workloads import WORKLOADS, Started, Workload
from experiments.models.gpt import GPT


def rule(attach, make=6.0, plain=3.0):
    return {
        "make": make,
        "seconds": {"attach": attach, "trace": 1.0, "compile": 3.0},
        "plain": {"attach": 0.0, "trace": 1.0, "compile": plain},
        "gigaflops": 2.0,
        "mebibytes": 8.0,
    }


FOUND = {
    "net": {
        "fa": rule(2.9),
        "usf": rule(3.1),
        "dfa": rule(4.9),
        "predsim": rule(5.1),
        "pepita": {"refused": "It can't."},
    }
}


def test_each_family_has_its_own_promise():
    assert starts.findings(FOUND) == [
        ("1 of 2", "layer-wise rules start in 1.3 times plain Flax's time or less, net."),
        ("1 of 2", "direct and local rules start in 1.5 times plain Flax's time or less, net."),
    ]
    row = ["Feedback alignment", "1.29", "1.73", "2.90", "1.00", "3.00", "4.00", "2.00", "8.0"]
    assert starts.rows(FOUND["net"])[1] == row


def test_a_rule_stands_beside_its_own_process_and_the_making_is_everybodys():
    found = starts.ratios({"fa": rule(2.0, make=5.0), "dfa": rule(2.0, make=7.0, plain=5.0), "usf": rule(2.0)})
    assert found["fa"] == {"start": 12.0 / 10.0, "without making": 6.0 / 4.0}
    assert found["dfa"] == {"start": 12.0 / 12.0, "without making": 6.0 / 6.0}


def test_what_a_network_can_not_have_is_told_with_the_reason():
    last = starts.report(FOUND).tables[-1]
    assert last.rows == [["network", "rule", "what attach says"], ["net", "PEPITA", "It can't."]]
    assert [table.title for table in starts.report({"net": {"fa": rule(0.0)}}).tables] == ["net"]
    assert starts.findings({"net": {"pepita": {"refused": "It can't."}}})[0][0] == "0 of 0"


def test_times_are_the_least_of_all_rounds(monkeypatch):
    times = iter([9.0, 5.0, 3.0, 4.0])  # two rounds of plain Flax, the first to warm up, and a rule

    def begin(workload, setting, model):
        del workload, model
        counts = {"flops": 3e9 if setting.rule else 0.0, "moved": 0.0, "temporary": 0, "given": 0}
        return Started(run=None, seconds=dict.fromkeys(starts.PARTS, next(times)), **counts)

    monkeypatch.setattr(starts, "begin", begin)
    monkeypatch.setitem(WORKLOADS, "tiny", Workload(lambda rngs: None, (4,), batch=2))
    found = starts.started("tiny", "fa", 2)
    assert found["plain"] == dict.fromkeys(starts.PARTS, 3.0)
    assert found["seconds"] == dict.fromkeys(starts.PARTS, 4.0)
    assert found["gigaflops"] == 3.0


def test_what_was_measured_before_a_cut_is_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def measure(network, method, rounds):
        asked.append((network, method, rounds))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return rule(2.9)

    monkeypatch.setattr(starts, "measure", measure)
    config = starts.Config(out=tmp_path, networks=("mlp",), methods=("fa", "dfa"))
    with pytest.raises(KeyboardInterrupt):
        starts.study(config, {})
    assert starts.study(config, {}).findings[0][0] == "1 of 1"
    assert [method for _, method, _ in asked] == ["fa", "dfa", "dfa"]


def test_rules_start_on_a_decoder_or_are_refused(monkeypatch):
    def make(rngs):
        return GPT(65, context=4, width=4, depth=1, heads=1, rngs=rngs)

    monkeypatch.setitem(WORKLOADS, "tiny", Workload(make, (4,), batch=2, at=("embedding", "blocks/*")))
    found = {name: starts.started("tiny", name, 1) for name in ("dfa", "pepita", "ssa")}
    assert found["dfa"]["seconds"]["attach"] > found["dfa"]["plain"]["attach"]
    assert "which must be of floats" in found["pepita"]["refused"]
    assert found["ssa"]["refused"].startswith("the error reaches 'blocks/0/attention/out/bias' on 2 ways")
