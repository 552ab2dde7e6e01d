"""What is told of steps: how far one is from what its operations and bytes take."""

from experiments.benchmarks import ceilings, steps

COUNTS = {"gigaflops": 3.0, "gigabytes": 0.5, "mebibytes": 8.0, "product": 30.0, "copy": 50.0}
TIMES = {"milliseconds": 40.0, "ratio": 1.5, "low": 1.4, "high": 1.7}
RULES = {
    steps.PLAIN: COUNTS | {"step": TIMES | {"ratio": 1.0}},
    "FA": COUNTS | {"step": TIMES},
    "PyTorch, FA": {"step": TIMES},
}


def test_a_step_stands_beside_what_a_product_and_a_copy_take():
    table = steps.step_rows(RULES)
    assert table[2] == ["FA", "1.50", "1.40 to 1.70", "40.0", "30.0", "50.0", "3.00", "0.50", "8.0"]
    assert table[3] == ["PyTorch, FA", "1.50", "1.40 to 1.70", "40.0", *[""] * 5]


def test_operations_and_bytes_take_their_time_at_the_measured_rates():
    limit = ceilings.Ceilings(gigaflops=100.0, gigabytes=10.0)
    assert limit.times(50.0, 2.0) == {"product": 500.0, "copy": 200.0}
    measured = ceilings.measure()
    assert measured.gigaflops > 1
    assert measured.gigabytes > 0.1
