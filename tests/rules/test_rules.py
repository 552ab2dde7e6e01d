"""Every rule against an independent surrogate whose ordinary gradient it must be, and what makes each its own."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.nn import initializers

import jaxfa
from jaxfa.jaxprs.versions import equations, opened
from tests.methods import METHODS, batch, create, refine, signals, train

RNG = np.random.default_rng(1)
KEY = jax.random.PRNGKey(3)
ROWS = {method.name: method for method in METHODS}
LAYER_WISE = ["fa", "usf", "brsf", "frsf", "kolen_pollack", "weight_mirror"]
DIRECT = ["dfa", "dfa_shared", "dkp", "drtp"]


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def surrogate(params, feedback, x, y, direct):
    """A scalar whose ordinary gradient is the rule's; stop_gradient stands where the rule cuts the chain."""
    stop = lax.stop_gradient

    def layer(h, p, f):
        if f is None:
            y = h @ p["w"]
        else:  # its value is h w; its slope in h is b, in w is h, in b what the rule learns from
            b = stop(f.matrix(p["w"]))
            y = stop(h) @ p["w"] + h @ b - stop(h @ b)
            if hasattr(f, "signal") and isinstance(f, type(jaxfa.kolen_pollack().init(KEY, p["w"]))):
                y = y + stop(h) @ f.b - stop(h @ f.b)
        return y + jnp.broadcast_to(p["b"], y.shape)

    h, hidden = x, []
    for i, p in enumerate(params[:-1]):
        h = jnp.tanh(layer(stop(h) if direct else h, p, None if direct else feedback[i]))
        hidden.append(h)
    top = layer(stop(h) if direct else h, params[-1], None if direct else feedback[-1])
    total = optax.softmax_cross_entropy_with_integer_labels(top, y).mean()
    if direct:
        e = (jax.nn.softmax(stop(top)) - jax.nn.one_hot(y, 3)) / len(y)
        total += sum(jnp.vdot(e @ stop(f.b).T, h) for f, h in zip(feedback, hidden, strict=True))
        if "Kolen" in type(feedback[0]).__name__:
            total += sum(jnp.vdot(f.b, stop(h).T @ e) for f, h in zip(feedback, hidden, strict=True))
    return total


@pytest.mark.parametrize("name", [*LAYER_WISE, "dfa", "dkp"])
def test_rules_are_the_gradient_of_a_surrogate(name, x64):
    rule = jaxfa.dkp(distribution=initializers.normal(1.0)) if name == "dkp" else ROWS[name].rule
    params, feedback = create(rule, KEY)
    x, y = batch()
    expected = jax.jit(jax.grad(surrogate, argnums=(0, 1)), static_argnums=4)(params, feedback, x, y, name in DIRECT)
    for a, b in zip(jax.tree.leaves(signals(params, feedback, x, y)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)


@pytest.mark.parametrize(
    ("h_shape", "e_shape", "b_shape", "spec"),
    [
        ((4, 6), (4, 3), (6, 3), "nc,ic->ni"),
        ((4, 2, 3, 6), (4, 3), (2, 3, 6, 3), "nc,hwic->nhwi"),
        ((4, 5, 6), (4, 5, 3), (6, 3), "ntc,ic->nti"),
        ((4, 5, 6), (4, 3), (5, 6, 3), "nc,tic->nti"),
        ((4, 5, 2, 6), (4, 5, 3), (2, 6, 3), "ntc,aic->ntai"),
        ((4, 6), (4, 5, 3), (6, 5, 3), "ntc,itc->ni"),
    ],
    ids=["dense", "image", "token_logits", "sequence_one_output", "token_heads", "vector_to_sequence"],
)
def test_direct_feedback_of_every_shape(h_shape, e_shape, b_shape, spec, x64):
    h, e = normal(*h_shape), normal(*e_shape)

    def delivered(rule, e=e):
        feedback = rule.init(KEY, h, e)
        value, pseudo = jax.vjp(lambda h, f: jaxfa.direct(h, jnp.zeros(e_shape), f)[1], h, feedback)
        assert value.shape == e_shape
        return feedback, *pseudo(e)

    feedback, dh, _ = delivered(jaxfa.dfa())
    assert feedback.b.shape == b_shape
    np.testing.assert_allclose(dh, np.einsum(spec, e, feedback.b), atol=1e-13)
    (e_axes, b_axes), h_axes = spec.split("->")[0].split(","), spec.split("->")[1]
    _, _, signal = delivered(jaxfa.dkp())
    np.testing.assert_allclose(signal.b, np.einsum(f"{h_axes},{e_axes}->{b_axes}", h, e), atol=1e-13)
    feedback, dh, _ = delivered(jaxfa.drtp(), jnp.where(e < 0, -1 / 20, 0))
    np.testing.assert_allclose(dh, -np.einsum(spec, (e < 0) / 20, feedback.b), atol=1e-13)
    feedback, dh, _ = delivered(jaxfa.dfa(shared=True))
    own = np.asarray(feedback.b).reshape(b_shape)
    np.testing.assert_allclose(dh, np.einsum(spec, e, own) / np.sqrt(feedback.b.shape[0]), atol=1e-13)
    feedback, dh, _ = delivered(jaxfa.dfa(shared=True, buckets=2))
    few, signs = (np.asarray(leaf) for leaf in (feedback.b, feedback.signs))
    columns = np.stack([few[:, c % 2] for c in range(signs.size)], -1) / np.sqrt(len(few))
    np.testing.assert_allclose(dh, np.einsum(spec, e, (columns * signs[None]).reshape(b_shape)), atol=1e-13)


def test_a_hashed_matrix_is_never_formed(x64):
    h, e = normal(2, 30), normal(2, 500)

    def program(rule):
        made = jax.make_jaxpr(lambda e: rule.init(KEY, h, e).deliver(h, e))(e)
        return max(var.aval.size for eqn in equations(opened(made)) for var in eqn.outvars)

    rule = jaxfa.dfa(shared=True, buckets=8)
    assert program(rule) < 3 * e.size
    assert program(jaxfa.dfa(shared=True)) == 30 * 500
    feedback = rule.init(KEY, h, e)
    columns = np.asarray(feedback.b)[:, np.arange(500) % 8] / np.sqrt(30)
    signs = np.asarray(feedback.signs)[None]
    np.testing.assert_allclose(feedback.deliver(h, e), e @ (columns * signs).T, atol=1e-12)
    assert np.abs(feedback.deliver(h, e) - e @ columns.T).max() > 1
    assert abs(signs.mean()) < 0.1


def test_more_buckets_than_outputs_would_stay_empty():
    h, e = normal(2, 30), normal(2, 5)
    feedback = jaxfa.dfa(shared=True, buckets=64).init(KEY, h, e)
    assert feedback.b.shape == (30, 5)
    np.testing.assert_allclose(feedback.deliver(h, e), e * feedback.signs[None] @ feedback.b.T / np.sqrt(30), rtol=1e-5)


@pytest.mark.parametrize("options", [{"buckets": 4}, {"buckets": 0, "shared": True}])
def test_buckets_are_of_a_shared_matrix(options):
    with pytest.raises(ValueError, match="buckets is a number from 1, of the columns of a shared matrix"):
        jaxfa.dfa(**options)


def test_the_default_scales_are_the_papers():
    h, logits, w = jnp.ones((2, 400)), jnp.ones((2, 50)), jnp.ones((400, 200))
    for rule, bound in (
        (jaxfa.dfa(), 1 / np.sqrt(400)),
        (jaxfa.dfa(shared=True), 1.0),
        (jaxfa.drtp(), np.sqrt(6 / 400)),
        (jaxfa.dfa(scale=3.0), 3 / np.sqrt(400)),
    ):
        b = np.asarray(rule.init(KEY, h, logits).b)
        np.testing.assert_allclose([b.min(), b.max(), b.std()], [-bound, bound, bound / np.sqrt(3)], rtol=0.01)
    for rule in (jaxfa.fa(), jaxfa.kolen_pollack(), jaxfa.weight_mirror()):
        b, bound = np.asarray(rule.init(KEY, w).b), np.sqrt(6 / 600)
        np.testing.assert_allclose([b.min(), b.max(), b.std()], [-bound, bound, bound / np.sqrt(3)], rtol=0.01)
    assert not np.any(jaxfa.dkp().init(KEY, h, logits).b)
    np.testing.assert_allclose(jaxfa.fa(distribution=initializers.ones, scale=2.0).init(KEY, w).b, 2.0)


def test_one_shared_matrix_serves_smaller_layers_and_refuses_larger():
    logits = jnp.ones((2, 3))
    feedback = jaxfa.dfa(shared=True).init(KEY, jnp.ones((2, 4, 6)), logits)
    assert feedback.shared
    assert feedback.b.shape == (24, 3)
    assert not jaxfa.DirectMatrix.shared
    with pytest.raises(ValueError, match=r"has 24 rows, too few for a layer of 25 units .* for the largest h"):
        feedback.deliver(jnp.ones((2, 25)), logits)


def test_dkp_hidden_layers_stand_still_at_first_and_start_in_the_output_weights_direction(x64):
    init, step = train(jaxfa.dkp(learning_rate=1e-2), optax.sgd(0.1))
    step = jax.jit(step)
    both = first = create(jaxfa.dkp(learning_rate=1e-2), KEY)
    x, y = batch()
    output_gradient = signals(*first, x, y)[0][-1]["w"]
    np.testing.assert_allclose(signals(*first, x, y)[1][-1].b, output_gradient, atol=1e-14)
    state = init(both)
    both, state = step(both, state, x, y, KEY)
    for before, after in zip(first[0][:-1], both[0][:-1], strict=True):
        np.testing.assert_array_equal(before["w"], after["w"])
    assert np.any(first[0][-1]["w"] != both[0][-1]["w"])
    np.testing.assert_array_equal(np.sign(both[1][-1].b), -np.sign(output_gradient))
    later, _ = step(both, state, x, y, KEY)
    for before, after in zip(both[0], later[0], strict=True):
        assert np.all(np.any(before["w"] != after["w"], axis=0))


def test_dkp_decays_and_learns_as_adam_with_l2(x64):
    rule, b, signal = jaxfa.dkp(learning_rate=0.1, weight_decay=0.5), normal(4, 3), normal(4, 3)
    both = ({}, [jaxfa.dkp().init(KEY, jnp.ones((2, 4)), jnp.ones((2, 3))).__class__(b)])
    tx = jaxfa.optimizer(optax.sgd(1.0), rule)
    updates, _ = tx.update(({}, [type(both[1][0])(signal)]), tx.init(both), both)
    np.testing.assert_allclose(updates[1][0].b, -0.1 * np.sign(signal + 0.5 * b), atol=1e-6)


def test_drtp_sees_the_labels_and_not_the_logits(x64):
    params, feedback = create(jaxfa.drtp(), KEY)
    x, y = batch()
    other = [*params[:-1], jax.tree.map(lambda leaf: 2 * leaf + 0.3, params[-1])]
    a, b = signals(params, feedback, x, y)[0], signals(other, feedback, x, y)[0]
    for layer in (0, 1):
        np.testing.assert_allclose(a[layer]["w"], b[layer]["w"], rtol=1e-11)
        assert np.any(signals(params, feedback, x, (y + 1) % 3)[0][layer]["w"] != a[layer]["w"])
    assert np.any(a[2]["w"] != b[2]["w"])


def multi_label(logits, y):
    return optax.sigmoid_binary_cross_entropy(logits, y).sum(-1).mean()


def mean_softmax(logits, y):
    return optax.softmax_cross_entropy(logits, y).mean()


ONE_HOT = np.eye(4)[[0, 1, 2, 3, 1, 0]]
SEVERAL = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 1, 1]])
WEIGHTS = np.array([1.0, 0.5, 0, 2, 1, 1])
TOLD = {
    "one-hot, softmax": (mean_softmax, ONE_HOT, 1 / 6),
    "one-hot, sigmoid": (multi_label, ONE_HOT, 1 / 6),
    "several labels": (multi_label, SEVERAL, 1 / 6),
    "a mean over the classes, too": (lambda z, y: multi_label(z, y) / 4, SEVERAL, 1 / 24),
    "summed": (lambda z, y: 6 * mean_softmax(z, y), ONE_HOT, 1),
    "weights": (lambda z, y: WEIGHTS @ optax.softmax_cross_entropy(z, y), ONE_HOT, WEIGHTS[:, None]),
    "weights, several labels": (
        lambda z, y: WEIGHTS @ optax.sigmoid_binary_cross_entropy(z, y).sum(-1), SEVERAL, WEIGHTS[:, None],
    ),
    "some labels unknown": (
        lambda z, y: jnp.where(y < 0, 0, optax.sigmoid_binary_cross_entropy(z, abs(y))).sum(), SEVERAL - 2 * ONE_HOT, 1,
    ),
    "smoothed": (lambda z, y: mean_softmax(z, 0.7 * y + 0.1), ONE_HOT, None),
    "smoothed, sigmoid": (lambda z, y: multi_label(z, 0.7 * y + 0.1), SEVERAL, None),
    "mixed": (lambda z, y: mean_softmax(z / 20, 0.6 * y + 0.4 * y[::-1]), ONE_HOT, None),
    "squares": (lambda z, y: jnp.square(z - y).sum(-1).mean(), ONE_HOT, None),
    "softmax, taken for sigmoids": (mean_softmax, ONE_HOT, None),
    "taken for a softmax": (multi_label, SEVERAL, None),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_drtp_learns_from_targets_that_the_error_tells_or_refuses_it(name, x64):
    objective, y, c = TOLD[name]
    h, z = normal(6, 5), 2 * normal(6, 4)
    e = jax.grad(lambda z: objective(z, y))(z)
    sigmoid = "sigmoid" in name or "labels" in name or "classes" in name
    feedback = jaxfa.drtp(sigmoid=sigmoid).init(KEY, h, e)

    def deliver(h, z, e):
        return feedback.deliver(h, feedback.reads(z, e))

    if c is None:
        with pytest.raises(ValueError, match="does not tell the targets"):
            deliver(h, z, e)
        assert np.isnan(jax.jit(deliver)(h, z, e)).all(1).any()
        return
    want = -c * np.maximum(y, 0) @ feedback.b.T
    np.testing.assert_allclose(deliver(h, z, e), want, atol=1e-13)
    np.testing.assert_allclose(jax.jit(deliver)(h, z, e), want, atol=1e-13)
    z = z.astype(jnp.bfloat16)
    e = jax.grad(lambda z: objective(z.astype(jnp.float32), y))(z)
    np.testing.assert_allclose(deliver(h, z, e), want, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", ["usf", "brsf", "frsf"])
def test_the_feedback_has_the_sign_of_the_weights_at_every_step(name):
    init, step = train(ROWS[name].rule, optax.sgd(2.0))
    step = jax.jit(step)
    both = create(ROWS[name].rule, KEY)
    state, flips, seen = init(both), 0, []
    for _ in range(12):
        before = both
        both, state = step(both, state, *batch(), KEY)
        flips += np.sum(np.sign(before[0][1]["w"]) != np.sign(both[0][1]["w"]))
        for p, f in zip(both[0][1:], both[1][1:], strict=True):
            b = np.asarray(f.matrix(p["w"]))
            np.testing.assert_array_equal(np.sign(b), np.sign(p["w"]))
        seen.append(np.abs(both[1][1].matrix(both[0][1]["w"])))
    assert flips > 0  # else the test would pass with signs fixed at the start
    changes = [np.mean(a != b) for a, b in itertools.pairwise(seen)]
    assert min(changes) > 0.99 if name == "brsf" else max(changes) == 0


def test_zero_weights_send_nothing_back():
    w = jnp.array([[0.0, -2.0]])
    for rule in (jaxfa.usf(), jaxfa.frsf(), jaxfa.brsf()):
        assert rule.init(KEY, w).matrix(w)[0, 0] == 0


def kolmogorov_smirnov(sample):
    sample = np.sort(np.ravel(sample))
    n = sample.size
    return np.sqrt(n) * max(np.max(np.arange(1, n + 1) / n - sample), np.max(sample - np.arange(n) / n))


def test_brsf_draws_are_uniform_and_independent_over_steps_layers_and_neighbours():
    rule, w = jaxfa.brsf(), jnp.ones((128, 96))
    bound = np.sqrt(6 / (128 + 96))
    one, other = (rule.init(k, w) for k in jax.random.split(KEY))

    def draw(feedback, step):
        step_bytes = jnp.array(list(step.to_bytes(4, "little")), jnp.float32)
        return np.asarray(replace(feedback, step_bytes=step_bytes).matrix(w)) / bound

    np.testing.assert_allclose(draw(one, 0), np.asarray(one.matrix(w)) / bound, rtol=1e-6)
    np.testing.assert_array_equal(draw(one, 5), draw(one, 5))
    samples = [draw(f, t) for f in (one, other) for t in (0, 1, 2, 1000, 2**20)]
    for u in samples:
        assert 0 <= u.min() < 1e-3
        assert 1 - 1e-3 < u.max() <= 1
        assert kolmogorov_smirnov(u) < 1.95  # p = 0.001
        neighbours = [np.corrcoef(u[1:].ravel(), u[:-1].ravel()), np.corrcoef(u[:, 1:].ravel(), u[:, :-1].ravel())]
        assert all(abs(c[0, 1]) < 4 / np.sqrt(u.size) for c in neighbours)
    correlation = np.corrcoef([u.ravel() for u in samples]) - np.eye(len(samples))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(w.size)
    stream = [draw(one, t)[0, 0] for t in range(400)]  # one weight, over time
    assert kolmogorov_smirnov(stream) < 1.95
    assert abs(np.corrcoef(stream[1:], stream[:-1])[0, 1]) < 4 / np.sqrt(400)
    assert kolmogorov_smirnov(samples[0] ** 2) > 10  # the statistic rejects what is not uniform


def test_brsf_quantile_gives_other_distributions():
    w = jnp.ones((128, 96))
    exponential = jaxfa.brsf(quantile=lambda u: -jnp.log1p(-u), scale=2.0).init(KEY, w).matrix(w)
    sample = np.asarray(exponential) / (2 * np.sqrt(6 / (128 + 96)))
    assert kolmogorov_smirnov(1 - np.exp(-sample)) < 1.95
    np.testing.assert_allclose([sample.mean(), sample.std()], 1, rtol=0.03)


def test_brsf_steps_touch_the_counter_alone():
    init, step = train(jaxfa.brsf(), optax.sgd(0.1))
    both = create(jaxfa.brsf(), KEY)
    after, _ = jax.jit(step)(both, init(both), *batch(), KEY)
    for a, b in zip(after[1][1:], both[1][1:], strict=True):
        assert (a.seed, a.step, a.bound) == (b.seed, b.step + 1, b.bound)
    seeds = {int(f.seed) for f in both[1][1:]}
    assert len(seeds) == 2
    again = create(jaxfa.brsf(), KEY)[1][1]
    assert again.seed == both[1][1].seed


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_brsf_counts_and_draws_alike_whatever_its_floats_are_cast_to(dtype):
    init, step = train(jaxfa.brsf(), optax.sgd(0.1))
    both = create(jaxfa.brsf(), KEY)
    seeds = [int(node.seed) for node in both[1][1:]]
    params, feedback = jax.tree.map(lambda leaf: leaf.astype(dtype), both)
    carry = (params, feedback), init((params, feedback))
    run = jax.jit(
        lambda carry: jax.lax.scan(lambda c, _: (step(*c, *batch(dtype=dtype), KEY), None), carry, length=400)
    )
    ((_, after), _), _ = run(carry)
    assert [int(node.step) for node in after[1:]] == [400, 400]
    assert [int(node.seed) for node in after[1:]] == seeds
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(dtype)}
    many = replace(both[1][1], step_bytes=jnp.array([255.0, 255, 255, 0]).astype(dtype))  # it carries
    counts = jaxfa.brsf().transform
    (tick,), _ = counts.update((many,), counts.init((many,)), (many,))
    assert int(optax.apply_updates((many,), (tick,))[0].step) == 2**24


def test_refine_leaves_rules_without_a_phase_of_their_own_alone():
    own = ("weight_mirror", "normative_ldfa", "grape", "fdfa", "pepita_mirrored")

    def phase(rule, x):
        params, feedback = create(rule, KEY)
        refined = refine.__wrapped__(rule, params, feedback, x, KEY)
        changed.append(refined is not feedback)
        return refined

    for method in METHODS:
        changed = []
        jax.eval_shape(partial(phase, method.rule), batch()[0])
        assert changed == [method.name in own]
