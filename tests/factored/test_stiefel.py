"""Steps that keep columns orthonormal."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxfa
from jaxfa.factored.manifold import polar, random_orthonormal, tangent
from jaxfa.jaxprs.versions import equations, opened

KEYS = jax.random.split(jax.random.PRNGKey(0), 2)


def start(n=9, r=4):
    u = jnp.linalg.qr(jax.random.normal(KEYS[0], (n, r)))[0]
    return u, jax.random.normal(KEYS[1], (n, r))


def off(u):
    return jnp.abs(u.mT @ u - jnp.eye(u.shape[-1])).max()


def test_a_tangent_step_is_a_projection_that_leaves_the_columns_orthonormal_to_first_order(x64):
    u, d = start()
    along = tangent(u, d)
    chex.assert_trees_all_close(u.T @ along, -(along.T @ u), atol=1e-14)
    chex.assert_trees_all_close(tangent(u, along), along, atol=1e-14)
    np.testing.assert_allclose(jnp.vdot(d - along, along), 0, atol=1e-13)
    ratio = off(u + 1e-3 * along) / off(u + 1e-4 * along)
    np.testing.assert_allclose(ratio, 100, rtol=1e-3)
    np.testing.assert_allclose(off(u + 1e-3 * d) / off(u + 1e-4 * d), 10, rtol=0.01)  # control: not along it


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 100.0])
def test_the_retraction_keeps_columns_orthonormal(size, x64):
    u, d = start()
    assert off(polar(u, size * tangent(u, d))) < 1e-13
    u, d = u.astype(jnp.float32), d.astype(jnp.float32)
    assert off(polar(u, size * tangent(u, d))) < 2e-6


def test_the_retraction_agrees_with_the_step_to_first_order(x64):
    u, d = start()
    along = tangent(u, d)
    errors = [jnp.linalg.norm(polar(u, t * along) - (u + t * along)) for t in (1e-2, 1e-3)]
    np.testing.assert_allclose(errors[0] / errors[1], 100, rtol=0.05)


STARTS = {
    "not orthonormal": 2 * np.random.default_rng(0).normal(size=(8, 4)),
    "zeros": np.zeros((8, 4)),
    "one column, repeated": np.ones((8, 4)),
    "two columns of four": np.diag([0.0, 1.0, 0.0, 3.0])[:, [1, 3, 0, 2]].repeat(2, 0),
    "square": np.diag([1.0, 0.0, -2.0, 0.0]),
    "tiny": 1e-35 * np.random.default_rng(0).normal(size=(8, 4)),
    "nearly dependent": np.ones((8, 4)) + 1e-6 * np.random.default_rng(0).normal(size=(8, 4)),
    "large": 100 * np.random.default_rng(0).normal(size=(8, 4)),
    "huge": 1e30 * np.random.default_rng(0).normal(size=(8, 4)),
}


@pytest.mark.parametrize("first", STARTS.values(), ids=STARTS)
def test_from_any_start_columns_are_orthonormal_after_the_first_step(first):
    u, tx = jnp.asarray(first, jnp.float32), jaxfa.factored.stiefel()
    size = jnp.abs(u).max()
    # What is large is exact to its own rounding, at the next step to that of 1.
    for limit in (1e-6 + 1e-6 * size, 1e-5):
        updates, _ = tx.update(0.1 * jnp.asarray(STARTS["not orthonormal"][: len(u)], jnp.float32), tx.init(u), u)
        u = u + updates
        assert off(u) < limit or (limit > 1 and jnp.all(jnp.isfinite(u)))


def test_the_nearest_orthonormal_columns_to_dependent_ones_keep_what_these_say(x64):
    u, d = start()
    left, sizes, right = jnp.linalg.svd(d, full_matrices=False)
    dependent = left @ jnp.diag(sizes.at[2:].set(0)) @ right
    got = polar(dependent, 0 * d)
    assert off(got) < 1e-13
    chex.assert_trees_all_close(got @ right[:2].T, left[:, :2], atol=1e-13)
    stacked = jnp.stack([u, jnp.zeros_like(u)])
    for found in (jax.vmap(polar)(stacked, 0 * stacked), polar(stacked, 0 * stacked)):
        chex.assert_trees_all_close(found[0], u, atol=1e-14)
        assert off(found[1]).max() < 1e-13


def test_matrices_of_several_shapes_step_in_one_loop_each_as_if_alone(x64):
    (u, d), tx = start(), jaxfa.factored.stiefel()
    alone = {"near": (u, 1e-3 * d), "far": (u[:, :2], 100 * d[:, :2]), "off": (2 * d, u)}
    steps, params = ({name: pair[i] for name, pair in alone.items()} for i in (1, 0))
    updates, _ = tx.update(steps, tx.init(params), params)
    for name, (own, step) in alone.items():
        left, _, right = jnp.linalg.svd(own + tangent(own, step), full_matrices=False)
        chex.assert_trees_all_close(own + updates[name], left @ right, atol=1e-12)
    made = equations(opened(jax.make_jaxpr(lambda: tx.update(steps, tx.init(params), params))()))
    assert sum(eqn.primitive.name == "while" for eqn in made) == 1


def test_columns_rounded_to_half_precision_still_step_along_the_manifold():
    u, d = (array.astype(jnp.bfloat16) for array in start())
    assert off(u.astype(jnp.float32)) > 1e-4
    along, across = (
        jaxfa.factored.stiefel(retract=True, project=project).update(d, optax.EmptyState(), u)[0].astype(jnp.float32)
        for project in (True, False)
    )
    wide = [array.astype(jnp.float32) for array in (u, d)]
    expected = polar(wide[0], tangent(*wide)) - wide[0]
    chex.assert_trees_all_close(along, expected, atol=1e-2)
    assert jnp.abs(across - expected).max() > 0.1


def test_outside_of_jit_a_second_step_compiles_nothing(caplog):
    tx = jaxfa.factored.stiefel()

    def step():
        u, d = (array.astype(jnp.float32) for array in start(7, 3))
        return tx.update(d, tx.init(u), u)

    step()
    with caplog.at_level("WARNING", logger="jax"), jax.log_compiles():
        step()
    assert "ompiling" not in caplog.text


def test_the_retraction_is_the_nearest_and_not_another(x64):
    u, d = start()
    y = u + d
    left, _, right = jnp.linalg.svd(y, full_matrices=False)
    chex.assert_trees_all_close(polar(u, d), left @ right, atol=1e-12)
    assert jnp.linalg.norm(jnp.linalg.qr(y)[0] - left @ right) > 0.1
    chex.assert_trees_all_close(jax.vmap(polar)(jnp.stack([u, u]), jnp.stack([d, 0 * d]))[0], left @ right, atol=1e-12)


def test_adam_finds_the_nearest_orthonormal_columns_if_it_sees_the_projected_gradient(x64):
    u, target = start()
    best = jnp.linalg.svd(target, compute_uv=False).sum()

    def found(tx):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: -jnp.vdot(p["u"], target) + p["b"].sum())(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), off(params["u"])

        params = {"u": u, "b": jnp.ones(3)}
        (params, _), drifts = jax.jit(lambda carry: lax.scan(step, carry, length=200))((params, tx.init(params)))
        assert drifts.max() < 1e-12
        assert params["b"][0] < 0
        return jnp.vdot(params["u"], target) / best

    after, before = (
        optax.masked(jaxfa.factored.stiefel(retract=way), {"u": True, "b": False}) for way in (True, False)
    )
    adam = optax.adamw(optax.cosine_decay_schedule(0.1, 200), weight_decay=0.1)
    assert found(optax.chain(before, adam, after)) > 0.999
    assert jnp.vdot(u, target) / best < found(optax.chain(adam, after)) < 0.95


def test_without_a_retraction_it_drifts_and_without_a_projection_more(x64):
    u, d = start()

    def drift(**options):
        tx = jaxfa.factored.stiefel(retract=False, **options)
        return off(u + tx.update(0.1 * d, tx.init(u), u)[0])

    assert 1e-4 < drift() < 0.5 * drift(project=False)


def test_what_is_no_tall_matrix_is_refused():
    tx = jaxfa.factored.stiefel()
    for wrong in (jnp.ones(3), jnp.ones((2, 3))):
        with pytest.raises(ValueError, match="r <= n"):
            tx.init(wrong)
        with pytest.raises(ValueError, match="r <= n"):
            tx.update(wrong, optax.EmptyState(), wrong)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.eye(3), tx.init(jnp.eye(3)))


@pytest.mark.parametrize("shape", [(150, 150), (300, 131), (20, 3)])
def test_random_columns_span_what_normal_draws_do(shape, x64):
    found = random_orthonormal(KEYS[0], shape, jnp.float64)
    left = np.linalg.svd(jax.random.normal(KEYS[0], shape, jnp.float64), full_matrices=False)[0]
    np.testing.assert_allclose(found @ found.T, left @ left.T, atol=1e-11)
    np.testing.assert_allclose(found.T @ found, np.eye(shape[1]), atol=1e-13)


def test_random_columns_of_several_are_drawn_one_after_the_other():
    # jaxlib's decomposition of a batch waits for threads of the pool that it runs on: two of them can hang.
    keys = jax.random.split(KEYS[0], 3)
    together = jax.vmap(lambda key: random_orthonormal(key, (8, 3), jnp.float32))
    for key, found in zip(keys, together(keys), strict=True):
        np.testing.assert_array_equal(found, random_orthonormal(key, (8, 3), jnp.float32))
    for one in (lambda: together(keys), lambda: random_orthonormal(KEYS[0], (3, 8, 3), jnp.float32)):
        made = equations(opened(jax.make_jaxpr(one)()))
        assert [eqn.invars[0].aval.ndim for eqn in made if eqn.primitive.name in ("qr", "geqrf")] == [2]
