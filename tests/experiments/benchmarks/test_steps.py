"""What is told of steps: ratios of starts, and how far a step is from what its operations and bytes take."""

from experiments.benchmarks import ceilings, steps


def rule(make, attach, **more):
    return {"seconds": {"make": make, "attach": attach, "trace": 1.0, "compile": 2.0}} | more


COUNTS = {"gigaflops": 3.0, "gigabytes": 0.5, "mebibytes": 8.0, "product": 30.0, "copy": 50.0}
TIMES = {"milliseconds": 40.0, "ratio": 1.5, "low": 1.4, "high": 1.7}
RULES = {
    steps.PLAIN: rule(6.0, 0.0, **COUNTS, step=TIMES | {"ratio": 1.0}),
    "FA": rule(9.0, 1.5, **COUNTS, step=TIMES),
    "DFA": rule(7.0, 3.0),
    "PyTorch, FA": {"step": TIMES},
}


def test_a_start_has_one_making_for_all_rules():
    found = steps.starts(RULES)
    assert found["FA"] == {"start": 11.5 / 10.0, "without making": 4.5 / 3.0}
    assert found["DFA"] == {"start": 13.0 / 10.0, "without making": 2.0}
    assert "PyTorch, FA" not in found
    assert steps.start_rows(RULES)[2] == ["FA", "1.15", "1.50", "9.00", "1.50", "1.00", "2.00"]


def test_a_step_stands_beside_what_a_product_and_a_copy_take():
    table = steps.step_rows(RULES)
    assert table[2] == ["FA", "1.50", "1.40 to 1.70", "40.0", "30.0", "50.0", "3.00", "0.50", "8.0"]
    assert table[3] == ["DFA", *[""] * 8]
    assert table[4][:4] == ["PyTorch, FA", "1.50", "1.40 to 1.70", "40.0"]


def test_operations_and_bytes_take_their_time_at_the_measured_rates():
    limit = ceilings.Ceilings(gigaflops=100.0, gigabytes=10.0)
    assert limit.times(50.0, 2.0) == {"product": 500.0, "copy": 200.0}
    measured = ceilings.measure()
    assert measured.gigaflops > 1
    assert measured.gigabytes > 0.1
