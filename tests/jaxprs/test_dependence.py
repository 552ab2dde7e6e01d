"""What depends on what, beside the definition: a result depends on an argument if another argument changes it."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxfa
from jaxfa.jaxprs.dependence import dependent

G, H = jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0])


def nested(g, h, first, second):
    return jax.lax.cond(
        first > 0,
        lambda g: jax.lax.switch(second, [lambda g: g, lambda g: 0 * g, lambda g: h], g),
        jnp.zeros_like,
        g,
    )


# What is computed, the scalars that are known as it runs, and whether it depends on G.
CASES = {
    "itself": (lambda g, h: g, (), True),
    "another": (lambda g, h: h, (), False),
    "a constant": (lambda g, h: jnp.zeros_like(g), (), False),
    "a sum": (lambda g, h: h + jnp.exp(g), (), True),
    "a factor": (lambda g, h, rate: h - rate * g, (0.1,), True),
    "no factor": (lambda g, h, rate: h - rate * g, (0.0,), False),
    "no factor, from either side": (lambda g, h, rate: (g * rate) @ h, (0.0,), False),
    "a factor that is zero here and there": (lambda g, h: g * (h > 3), (), True),
    "a factor of itself": (lambda g, h: g * jnp.sum(0 * g), (), False),
    "chosen": (lambda g, h, which: jnp.where(which > 0, g, h), (1,), True),
    "not chosen": (lambda g, h, which: jnp.where(which > 0, g, h), (-1,), False),
    "chosen by itself": (lambda g, h: jnp.where(jnp.isfinite(g).all(), h, g), (), False),
    "chosen entry by entry": (lambda g, h: jnp.where(g > 0, h, -h), (), True),
    "a branch": (nested, (1, 0), True),
    "a branch times zero": (nested, (1, 1), False),
    "a branch without it": (nested, (1, 2), False),
    "another branch": (nested, (0, 0), False),
    "compiled": (lambda g, h, rate: jax.jit(lambda x: jax.jit(jnp.negative)(x) * rate)(g), (0.0,), False),
    "a loop": (lambda g, h: jax.lax.fori_loop(0, 3, lambda i, x: x + g, h), (), True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_result_depends_on_what_changes_it(name, compiled):
    function, scalars, expected = CASES[name]
    run = jax.jit(dependent, static_argnums=0) if compiled else dependent
    value, depends = run(function, G, H, *map(jnp.asarray, scalars))
    assert bool(depends) == expected
    assert jnp.array_equal(value, function(G, H, *scalars))
    if expected:
        assert not jnp.array_equal(value, function(-3 * G, H, *scalars))


def test_each_of_a_batch_has_its_own_answer():
    def run(rate):
        return dependent(lambda g, rate: rate * g, G, rate)[1]

    assert jax.vmap(run)(jnp.array([0.0, 1.0])).tolist() == [False, True]


def test_a_rule_that_asks_when_the_optimizer_steps_runs_it_once_for_weights_and_once_for_feedback():
    w = jnp.ones((3, 2))

    def roots(rule):
        both = [w], [rule.init(jax.random.key(0), w)]
        tx = jaxfa.optimizer(optax.adam(1e-3), rule)
        return str(jax.make_jaxpr(tx.update)(both, tx.init(both), both)).count(" sqrt ")

    assert roots(jaxfa.fa()) == 1
    assert roots(jaxfa.kolen_pollack()) == 2
