"""What must depend on what, and what may: a result depends on an argument if another argument changes it."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxfa
from jaxfa.jaxprs.dependence import depend

A, B = jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0])
RATE, WHICH = jnp.array(0.5), jnp.array(1)


def written(a, b):
    ref = jax.new_ref(b)
    ref[...] = a
    return ref[...]


# What is computed of a and b, and of each of them whether it must depend on it and whether it may.
CASES = {
    "itself": (lambda a, b: a, (1, 1), (0, 0)),
    "a constant": (lambda a, b: jnp.zeros_like(a), (0, 0), (0, 0)),
    "a sum": (lambda a, b: b + jnp.exp(-a), (1, 1), (1, 1)),
    "a factor": (lambda a, b: 0.1 * a, (1, 1), (0, 0)),
    "a factor of zero": (lambda a, b: b - 0.0 * a, (0, 0), (1, 1)),
    "a factor that rounds to zero": (lambda a, b: b + a * jnp.full(2, 0.5).astype(int), (0, 0), (1, 1)),
    "a factor that is known as it runs": (lambda a, b: b - RATE * a, (0, 1), (1, 1)),
    "two factors": (lambda a, b: a * b, (1, 1), (1, 1)),
    "two factors, of which one may be zero": (lambda a, b: a * (RATE * b), (0, 1), (0, 1)),
    "zero by another": (lambda a, b: jnp.zeros_like(a) / jnp.sum(b * b), (0, 0), (0, 0)),
    "a ratio": (lambda a, b: a / (1 + RATE * b), (1, 1), (0, 1)),
    "chosen either way": (lambda a, b: jnp.where(RATE > 1, a, a * b), (1, 1), (0, 1)),
    "chosen or not": (lambda a, b: jnp.where(RATE > 1, a, 0), (0, 1), (0, 0)),
    "chosen by another": (lambda a, b: jnp.where(jnp.sum(b) > 1, a, -a), (1, 1), (0, 1)),
    "one of two branches": (lambda a, b: jax.lax.cond(WHICH > 0, lambda: a, lambda: a + b), (1, 1), (0, 1)),
    "compiled": (lambda a, b: jax.jit(lambda x: jax.jit(jnp.negative)(x) * 2)(a), (1, 1), (0, 0)),
    "a loop": (lambda a, b: jax.lax.fori_loop(0, 3, lambda i, x: x + a, b), (0, 1), (0, 1)),
    "written and read": (written, (0, 1), (0, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_must_depend_does_and_what_may_not_does_not(name):
    function, *expected = CASES[name]
    (found,) = depend(jax.make_jaxpr(function)(A, B))
    assert [(found.must >> i & 1, found.may >> i & 1) for i in range(2)] == expected
    for (must, may), other in zip(expected, ((-3 * A - 1, B), (A, -3 * B - 1)), strict=True):
        changed = not jnp.array_equal(function(*other), function(A, B))
        assert must <= changed <= may


def roots(tx, rule, w):
    """How many square roots a step takes."""
    both = [w], [rule.init(jax.random.key(0), w)]
    tx = jaxfa.optimizer(tx, rule)
    return str(jax.make_jaxpr(tx.update)(both, tx.init(both), both)).count(" sqrt ")


def test_a_step_is_taken_once_for_weights_and_once_for_feedback_where_the_program_tells_who_steps():
    w = jnp.ones((3, 2))
    assert roots(optax.adam(1e-3), jaxfa.fa(), w) == 1
    assert roots(optax.adamw(1e-3), jaxfa.kolen_pollack(), w) == 2
    # A rate of its own schedule may be zero.
    assert roots(optax.adam(optax.linear_schedule(0.0, 1e-3, 10)), jaxfa.kolen_pollack(), w) == 4
