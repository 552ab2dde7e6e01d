"""Blocks that learn as they run: the backward pass keeps no activations, and the gradients are the same."""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxfa


class Deep(nnx.Module):
    def __init__(self, rngs, depth=16):
        self.blocks = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = x + 0.1 * nnx.relu(block(x))
        return self.head(x)


def gradient_of(schedule):
    options = {"rngs": nnx.Rngs(1), "example": x, "at": "blocks/*", "schedule": schedule}
    model = jaxfa.nn.attach(Deep(nnx.Rngs(0)), jaxfa.dfa(), **options)
    graph, state = nnx.split(model)
    gradient = jax.grad(lambda state: (nnx.merge(graph, state)(x) ** 2).mean())
    program = jax.jit(gradient).lower(state).compile()
    kept = program.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{schedule!r}: {kept:.1f} MiB beside parameters and gradients")
    return program(state)


x = jax.random.normal(jax.random.key(0), (1024, 64))
streamed, stored = (jax.tree.leaves(gradient_of(one)) for one in (jaxfa.stacks.stream, jaxfa.stacks.stored))
assert all(jnp.allclose(ours, theirs, rtol=1e-4, atol=1e-6) for ours, theirs in zip(streamed, stored, strict=True))
