"""What a benchmark's step computes."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmarks.workloads import RULES, Workload, start


class Normalised(nnx.Module):
    """Convolutions with batch normalisation, of which the first lies below the first tap."""

    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(n, 16, (3, 3), use_bias=False, rngs=rngs) for n in (3, 16, 16)])
        self.norms = nnx.List([nnx.BatchNorm(16, rngs=rngs) for _ in self.convs])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def test_refine_adds_one_forward_pass_to_the_step_and_not_two():
    workload = Workload(Normalised, (8, 8, 3), batch=4)
    graph, arrays = nnx.split(Normalised(nnx.Rngs(0)))
    once = jax.jit(lambda arrays, x: nnx.merge(graph, arrays)(x)).lower(arrays, jnp.ones((4, 8, 8, 3)))
    forward = once.compile().cost_analysis()["flops"]
    grape, dfa = (start(workload, RULES[name]).flops for name in ("GrAPE", "DFA"))
    # Its own is the forward mode's; the first convolution, below all taps, has none. Learning counts for the rest.
    assert grape - dfa < 1.5 * forward
