"""What feedback alignment conserves, to rounding; what must break it; and what follows from it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.models import MLP, LeNet
from jaxfa.measure.conservation import (
    Pair,
    aligned_init,
    alignment_bound,
    half_square,
    imbalance,
    minimum_norm,
    overlap,
    quantity,
    shrink,
)
from tests.methods import batch, create, signals
from tests.networks import MODELS, attach

RNG = np.random.default_rng(4)
START = RNG.bit_generator.state
KEY = jax.random.PRNGKey(5)
SGD = optax.sgd(0.1)


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws the same, whichever ran before it."""
    RNG.bit_generator.state = START


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def pair_of(params, i):
    return Pair(params[i]["w"], params[i + 1]["w"], params[i]["b"])


def trajectory(gradient, params, feedback, tx, batches):
    """Parameters over time of training with a fixed feedback."""
    state, history = tx.init(params), [params]
    for data in batches:
        updates, state = tx.update(gradient(params, feedback, *data), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


def residuals(history, feedback):
    """For every pair of layers the largest ``|Q_T - Q_0 - sum_t half squares|``, from the parameters alone."""
    found = []
    for i in range(len(history[0]) - 1):
        pairs = [pair_of(params, i) for params in history]
        steps = [jax.tree.map(jnp.subtract, b, a) for a, b in itertools.pairwise(pairs)]
        drift = quantity(pairs[-1], feedback[i + 1]) - quantity(pairs[0], feedback[i + 1])
        assert jnp.abs(drift).max() > 1e-3  # it is no constant of a network that stands still
        found.append(float(jnp.abs(drift - sum(map(half_square, steps))).max()))
    return found


def dense(activation, tx, rule=None, steps=30, examples=8):
    """A trained net with biases, in mini-batches."""
    params, feedback = create(rule or jaxfa.fa(), KEY)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    x, y = batch(5 * examples)
    parts = [(x[i : i + examples], y[i : i + examples]) for i in range(0, len(x), examples)]
    batches = itertools.islice(itertools.cycle(parts), steps)
    return trajectory(lambda *args: signals(*args, activation)[0], params, feedback, tx, batches), feedback


def by_hand(w, above, b, bias):
    """The definition, sum by sum."""
    w, above, b = (np.asarray(a).reshape(-1, *a.shape[-k:]) for a, k in ((w, 1), (above, 2), (b, 2)))
    found = np.zeros(w.shape[-1])
    for j in range(w.shape[-1]):
        found[j] = sum(v**2 / 2 for v in w[:, j]) + bias[j] ** 2 / 2
        for row in range(above.shape[1]):
            if row % w.shape[-1] == j:
                found[j] -= sum(above[t, row, k] * b[t, row, k] for t in range(len(above)) for k in range(b.shape[2]))
    return found


@pytest.mark.parametrize(
    ("w", "above"),
    [((5, 3), (3, 2)), ((3, 2, 4, 3), (2, 3, 3, 5)), ((3, 3, 2, 3), (4 * 3, 5))],
    ids=["dense", "conv", "flattened"],
)
def test_the_quantity_is_its_definition(w, above, x64):
    pair, b = Pair(normal(*w), normal(*above), normal(3)), normal(*above)
    expected = by_hand(*pair[:2], b, pair.bias)
    np.testing.assert_allclose(jax.jit(quantity)(pair, jaxfa.FixedFeedback(b)), expected, rtol=1e-12)
    np.testing.assert_allclose(quantity(pair, b), expected, rtol=1e-12)
    np.testing.assert_allclose(alignment_bound(pair, b), -expected, rtol=1e-12)
    without = quantity(pair._replace(bias=None), b)
    np.testing.assert_allclose(without, expected - np.square(pair.bias) / 2, rtol=1e-12)
    backprop = by_hand(*pair[:2], pair.above / 2, pair.bias)
    np.testing.assert_allclose(quantity(pair), backprop, rtol=1e-12)


@pytest.mark.parametrize(
    ("activation", "tx", "holds"),
    [
        (jax.nn.relu, SGD, True),
        (jax.nn.leaky_relu, SGD, True),
        (jnp.positive, SGD, True),
        (jax.nn.relu, optax.sgd(optax.linear_schedule(0.3, 0.01, 30)), True),
        (jnp.tanh, SGD, False),
        (jax.nn.gelu, SGD, False),
        (jax.nn.relu, optax.sgd(0.1, momentum=0.9), False),
        (jax.nn.relu, optax.adam(0.01), False),
        (jax.nn.relu, optax.chain(optax.add_decayed_weights(0.05), SGD), False),
    ],
    ids=["relu", "leaky_relu", "linear", "schedule", "tanh", "gelu", "momentum", "adam", "weight_decay"],
)
def test_drift_is_half_of_the_squared_steps_for_every_neuron(activation, tx, holds, x64):
    found = residuals(*dense(activation, tx))
    assert max(found) < 1e-12 if holds else min(found) > 1e-3, found


@pytest.mark.parametrize("rule", [jaxfa.usf(), jaxfa.backprop()], ids=["usf", "backprop"])
def test_each_gradient_keeps_the_law_of_its_own_rule_only(rule, x64):
    params, feedback = create(rule, KEY)
    feedback = feedback if jax.tree.leaves(feedback) else [None] * 3
    gradient = signals(params, feedback, *batch(), jax.nn.relu)[0]
    for i in (0, 1):
        pair, step = pair_of(params, i), pair_of(gradient, i)
        assert jnp.abs(imbalance(pair, step, feedback[i + 1])).max() < 1e-15
        other = jaxfa.fa().init(KEY, pair.above)
        assert jnp.abs(imbalance(pair, step, other)).max() > 1e-3


def test_learned_feedback_keeps_the_law_at_each_step_but_conserves_nothing(x64):
    rule = jaxfa.kolen_pollack(weight_decay=0.02)
    tx = jaxfa.optimizer(SGD, rule)
    both = first = create(rule, KEY)
    state, steps = tx.init(both), []
    for _ in range(20):
        gradient = signals(*both, *batch(), jax.nn.relu)
        pair, step = pair_of(both[0], 0), pair_of(gradient[0], 0)
        assert jnp.abs(imbalance(pair, step, both[1][1])).max() < 1e-15
        updates, state = tx.update(gradient, state, both)
        steps.append(half_square(pair_of(updates[0], 0)))
        both = optax.apply_updates(both, updates)
    drift = quantity(pair_of(both[0], 0), both[1][1]) - quantity(pair_of(first[0], 0), first[1][1])
    assert jnp.abs(drift - sum(steps)).max() > 1e-3


def test_drift_vanishes_with_the_learning_rate(x64):
    def drift(rate):
        steps = round(0.4 / rate)
        history, feedback = dense(jax.nn.relu, optax.sgd(rate), steps=steps, examples=2)
        pairs = [pair_of(history[t], 0) for t in (0, -1)]
        return float(sum(quantity(pairs[1], feedback[1]) - quantity(pairs[0], feedback[1])))

    large, small = drift(2e-2), drift(2e-3)
    assert large > 1e-4
    np.testing.assert_allclose(large / small, 10, rtol=0.05)


def conv_loss(params, feedback, x, y, activation):
    h = x
    for p, f in zip(params[:2], feedback[:2], strict=True):
        z = jaxfa.conv(h, p["w"], f)
        h = activation(z + jnp.broadcast_to(p["b"], z.shape))
        n, height, width, c = h.shape
        h = h.reshape(n, height // 2, 2, width // 2, 2, c).max((2, 4))
    out = jaxfa.linear(h.reshape(len(h), -1), params[2]["w"], feedback[2])
    return jnp.sum(jnp.sqrt(1 + jnp.square(out + jnp.broadcast_to(params[2]["b"], out.shape) - y))) / len(x)


@pytest.mark.parametrize(
    ("activation", "tx", "holds"),
    [(jax.nn.relu, SGD, True), (jnp.tanh, SGD, False), (jax.nn.relu, optax.sgd(0.1, momentum=0.9), False)],
    ids=["relu", "tanh", "momentum"],
)
def test_it_holds_for_every_channel_of_convolutions_pooled_and_flattened(activation, tx, holds, x64):
    shapes = [(3, 3, 2, 4), (3, 3, 4, 3), (2 * 2 * 3, 2)]
    params = [{"w": 0.4 * normal(*s), "b": 0.1 * normal(s[-1])} for s in shapes]
    feedback = [None, *(jaxfa.fa().init(k, p["w"]) for k, p in zip(jax.random.split(KEY), params[1:], strict=True))]
    batches = [(normal(4, 8, 8, 2), normal(4, 2)) for _ in range(3)] * 4
    gradient = jax.jit(jax.grad(conv_loss), static_argnums=4)
    found = residuals(trajectory(lambda *args: gradient(*args, activation), params, feedback, tx, batches), feedback)
    assert max(found) < 1e-12 if holds else min(found) > 1e-3, found


def in_hindsight(history, i, j):
    """The matrix row that explains unit ``j``'s whole history best, and what it leaves unexplained."""
    pairs = [pair_of(params, i) for params in history]
    steps = [jax.tree.map(jnp.subtract, b, a) for a, b in itertools.pairwise(pairs)]
    incoming = [p.w[:, j] @ s.w[:, j] + p.bias[j] * s.bias[j] for p, s in zip(pairs, steps, strict=False)]
    outgoing = np.stack([s.above[j] for s in steps])
    row, *_ = np.linalg.lstsq(outgoing, np.stack(incoming), rcond=None)
    return row, np.linalg.norm(outgoing @ row - incoming) / np.linalg.norm(incoming)


def test_direct_feedback_conserves_it_in_the_last_hidden_layer_and_nothing_below(x64):
    history, feedback = dense(jax.nn.relu, SGD, jaxfa.dfa(), steps=60)
    assert residuals(history, [None, normal(6, 5), feedback[-1].b])[-1] < 1e-12
    # Below there is no matrix of the right shape; the best one in hindsight leaves much unexplained.
    assert max(in_hindsight(history, 0, j)[1] for j in range(6)) > 0.1
    # Where the law holds, the history of the weights gives the feedback away.
    history, feedback = dense(jax.nn.relu, SGD, steps=60)
    for j in range(6):
        row, unexplained = in_hindsight(history, 0, j)
        assert unexplained < 1e-9
        np.testing.assert_allclose(row, feedback[1].b[j], atol=1e-6)


@nnx.jit
def imbalances(model, x, y):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    return jaxfa.nn.imbalances(model, loss)


def put(model, rule, x):
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(x.dtype), state))
    return jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), example=x)


@pytest.mark.parametrize("normalised", [False, True])
def test_batch_normalisation_breaks_it(normalised, x64):
    x, y = normal(16, 4, 4, 1), jnp.arange(16) % 3
    model = put(MLP((4, 4, 1), 3, (6, 5), normalised=normalised, rngs=nnx.Rngs(0)), jaxfa.fa(), x)
    found = imbalances(model, x, y)
    assert sorted(found) == ["layers/0", "layers/1"]
    for value in found.values():
        assert jnp.abs(value).max() > 1e-3 if normalised else jnp.abs(value).max() < 1e-15


def test_alignment_never_falls_below_its_bound_and_an_aligned_start_keeps_it(x64):
    for tx, aligned, kept in (
        (SGD, False, False),
        (SGD, True, True),
        (optax.chain(optax.add_decayed_weights(1.0), SGD), True, False),
    ):
        params, feedback = create(jaxfa.fa(), KEY)
        if aligned:
            made = aligned_init([p["w"] for p in params], feedback)
            params = [{"w": w, "b": p["b"]} for w, p in zip(made, params, strict=True)]
        x, y = batch(40)
        history = trajectory(
            lambda *args: signals(*args, jax.nn.relu)[0], params, feedback, tx, [(x, (y + 1) % 3)] * 20 + [(x, y)] * 40
        )
        for i in (0, 1):
            pairs = [pair_of(params, i) for params in history]
            steps = [half_square(jax.tree.map(jnp.subtract, b, a)) for a, b in itertools.pairwise(pairs)]
            bound = alignment_bound(pairs[0], feedback[i + 1]) - sum(steps)
            start, end = (overlap(pair, feedback[i + 1]) for pair in (pairs[0], pairs[-1]))
            assert (end >= bound - 1e-12).all() == (tx is SGD)
            assert (bound + sum(steps) > 0.49 * start).all() == aligned
            assert (end > 0.4 * start).all() == kept


def test_shrinking_meets_the_condition_and_scales_no_more_than_it_must(x64):
    pair, b = Pair(4 * normal(5, 4), normal(4, 3), normal(4)), normal(4, 3)
    pair = pair._replace(above=b * jnp.array([[1.0], [1e4], [0.1], [-1.0]]))
    made = jax.jit(functools.partial(shrink, ratio=0.3))(pair, b)
    square, room = 2 * half_square(made), overlap(pair, b)
    np.testing.assert_allclose(square[jnp.array([0, 2])], 0.6 * room[jnp.array([0, 2])], rtol=1e-12)
    assert square[1] < 0.6 * room[1]
    for unchanged in (1, 3):  # small enough; not aligned, so that nothing helps
        np.testing.assert_array_equal(made.w[:, unchanged], pair.w[:, unchanged])
    np.testing.assert_allclose(made.w / pair.w, jnp.broadcast_to(made.bias / pair.bias, (5, 4)), rtol=1e-12)
    for ratio in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {ratio}"):
            shrink(pair, b, ratio)


def linear_regression(start, steps=4000):
    """``|w_1 w_2 - w_mn| / |w_mn|`` over time, for a two-layer linear net under feedback alignment."""
    x, y, b = normal(8, 20), normal(8, 1), normal(6, 1)
    least = x.T @ jnp.linalg.solve(x @ x.T, y)  # the closed form
    np.testing.assert_allclose(minimum_norm(x, y), least, rtol=1e-9)
    first = {"zero": jnp.zeros((20, 6)), "in span": 0.1 * minimum_norm(x, normal(8, 6)), "random": 0.1 * normal(20, 6)}
    feedback = jaxfa.FixedFeedback(b)

    def loss(params):
        return 0.5 * jnp.sum((jaxfa.linear(x @ params[0], params[1], feedback) - y) ** 2)

    def step(params, _):
        params = jax.tree.map(lambda p, g: p - 2e-3 * g, params, jax.grad(loss)(params))
        return params, jnp.linalg.norm(params[0] @ params[1] - least) / jnp.linalg.norm(least)

    params, error = jax.jit(lambda params: jax.lax.scan(step, params, length=steps))((first[start], b))
    assert loss(params) < 1e-18
    return error


@pytest.mark.parametrize("start", ["zero", "in span", "random"])
def test_a_linear_network_finds_the_least_solution_from_the_span_of_its_data_alone(start, x64):
    error = linear_regression(start)
    if start == "random":
        assert error[-1] > 0.05
        return
    assert error[-1] < 1e-10
    rates = [jnp.log(error[t] / error[t + 100]) for t in (200, 300)]
    assert rates[0] > 0.1
    np.testing.assert_allclose(rates[0], rates[1], rtol=0.2)  # exponentially


def test_links_are_read_off_the_gradient():
    def readers(name, rule):
        make, x, at = MODELS[name]
        return {
            layer: link.reader
            for layer, link in jaxfa.nn.consecutive_layers(attach(make(nnx.Rngs(0)), rule, x, at)).items()
        }

    assert readers("mlp", jaxfa.fa()) == readers("mlp", jaxfa.backprop()) == {"fc1": "fc2", "fc2": "fc3"}
    assert readers("mlp", jaxfa.dfa()) == {"fc2": "fc3"}
    assert readers("mlp", jaxfa.dkp()) == {}
    assert readers("conv, batch norm, dropout", jaxfa.fa()) == {}  # in groups
    with pytest.raises(ValueError, match=r"give attach\(\) an example="):
        jaxfa.nn.consecutive_layers(attach(MODELS["mlp"][0](nnx.Rngs(0)), jaxfa.fa(), None))


@pytest.mark.parametrize(
    ("rule", "layers"),
    [(jaxfa.fa(), ["conv1", "conv2", "fc1", "fc2"]), (jaxfa.dfa(), ["fc2"])],
    ids=["fa", "dfa"],
)
def test_it_holds_in_a_model_that_knows_nothing_of_it(rule, layers, x64):
    x, y = normal(4, 12, 12, 1), jnp.arange(4) % 3
    model = put(LeNet((12, 12, 1), 3, rngs=nnx.Rngs(0)), rule, x)
    found = imbalances(model, x, y)
    assert sorted(found) == layers
    assert max(jnp.abs(value).max() for value in found.values()) < 1e-15


@pytest.mark.parametrize("name", ["mlp", "conv, batch norm, dropout", "scanned", "transformer"])
def test_any_model_starts_aligned(name):
    make, x, _ = MODELS[name]
    model = attach(make(nnx.Rngs(0)), jaxfa.fa(), x)
    nnx.jit(jaxfa.nn.align)(model)
    links = jaxfa.nn.consecutive_layers(model)
    for link in links.values():
        assert (alignment_bound(link.pair, link.feedback) > 0).all()
    for path, angle in nnx.jit(jaxfa.nn.weight_angles)(model).items():
        assert jnp.max(angle) < (30 if path in links else 0.1), path


@pytest.mark.parametrize("rule", [jaxfa.dfa(), jaxfa.backprop()], ids=["dfa", "backprop"])
def test_what_has_no_feedback_of_its_weights_shape_has_no_aligned_start(rule):
    with pytest.raises(ValueError, match="needs a layer-wise rule"):
        jaxfa.nn.align(attach(MODELS["mlp"][0](nnx.Rngs(0)), rule, MODELS["mlp"][1]))


def test_what_does_not_fit_is_refused():
    pair = Pair(jnp.ones((4, 3)), jnp.ones((5, 2)))
    with pytest.raises(ValueError, match=r"\(5, 2\) do not read the 3 units of weights \(4, 3\)"):
        quantity(pair, pair.above)
    pair = Pair(jnp.ones((4, 3)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"\(3, 4\) is not for weights \(3, 2\)"):
        overlap(pair, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="DirectMatrix has no matrix in the place of the weights"):
        quantity(pair, jaxfa.DirectMatrix(jnp.ones((3, 2))))
    with pytest.raises(ValueError, match="zip"):
        aligned_init([pair.w, pair.above], [None])
