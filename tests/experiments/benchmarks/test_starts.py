"""What is told of starts: who keeps the promise of its family, and who is refused."""

from experiments.benchmarks import starts
from experiments.benchmarks.workloads import PLAIN, WORKLOADS, Started, Workload
from experiments.models.gpt import GPT


def rule(attach):
    return {
        "seconds": {"make": 6.0, "attach": attach, "trace": 1.0, "compile": 3.0},
        "gigaflops": 2.0,
        "mebibytes": 8.0,
    }


FOUND = {
    "net": {
        PLAIN: rule(0.0),
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
    assert starts.rows(FOUND["net"])[2] == ["Feedback alignment", "1.29", "1.73", "2.90", "1.00", "3.00", "2.00", "8.0"]


def test_what_a_network_can_not_have_is_told_with_the_reason():
    last = starts.report(FOUND).tables[-1]
    assert last.rows == [["network", "rule", "what attach says"], ["net", "PEPITA", "It can't."]]
    assert [table.title for table in starts.report({"net": {PLAIN: rule(0.0)}}).tables] == ["net"]


def test_times_are_the_least_of_all_rounds(monkeypatch):
    times = iter([9.0, 3.0, 4.0, 2.0, 5.0])  # to warm up, then two rounds of plain Flax and a rule

    def begin(workload, setting, model, seconds):
        del workload, setting, model
        return Started(run=None, seconds=seconds | {"compile": next(times)}, flops=0.0, moved=0.0, temporary=0, given=0)

    monkeypatch.setattr(starts, "begin", begin)
    monkeypatch.setattr(starts, "start", lambda *given: begin(*given, None, {"make": 6.0}))
    monkeypatch.setitem(WORKLOADS, "tiny", Workload(lambda rngs: None, (4,), batch=2))
    found = starts.measure("tiny", ("fa",), 2)
    assert [one["seconds"] for one in found.values()] == [{"make": 6.0, "compile": t} for t in (2.0, 4.0)]


def test_rules_start_on_a_decoder_or_are_refused(monkeypatch):
    def make(rngs):
        return GPT(65, context=4, width=4, depth=1, heads=1, rngs=rngs)

    monkeypatch.setitem(WORKLOADS, "tiny", Workload(make, (4,), batch=2, at=("embedding", "blocks/*")))
    found = starts.measure("tiny", ("dfa", "pepita", "ssa"), 2)
    assert found["dfa"]["seconds"]["make"] == found[PLAIN]["seconds"]["make"]
    assert found["dfa"]["seconds"]["attach"] > 0
    assert "which must be of floats" in found["pepita"]["refused"]
    assert found["ssa"]["refused"].startswith("the error reaches 'blocks/0/attention/out/bias' on 2 ways")
