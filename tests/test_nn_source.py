"""Direct rules whose error is taken at a later layer: below it the rule, above it backpropagation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from tests.networks import MLP, TRAINED, ConvNet, Residual, Scanned, attach, inputs, loss


def gradients(aligned, x):
    return nnx.grad(loss)(aligned, x)["model"]


def test_below_the_source_the_error_there_comes_through_the_factors_and_above_all_is_exact():
    model, x = MLP(nnx.Rngs(0)), inputs(9, 6)
    aligned = attach(model, jaxfa.dldfa(5, source="fc3"), x)
    ours, true = gradients(aligned, x), nnx.grad(loss)(model, x)
    for layer in ("fc2", "fc3"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours[layer], true[layer])
    h = nnx.relu(model.fc1(x))
    last = nnx.relu(model.fc2(h))
    e = jax.grad(lambda last: loss(lambda _: model.fc3(last), x))(last)
    factors = aligned.model.fc2.feedback_tap.feedback.get_value()
    assert factors.p.shape == (8, 5)
    delta = np.asarray(e) @ factors.p @ factors.q.T * (np.asarray(h) > 0)
    np.testing.assert_allclose(ours["fc1"]["kernel"][...], np.asarray(x).T @ delta, rtol=1e-4, atol=1e-6)
    assert np.linalg.norm(ours["fc1"]["kernel"][...] - true["fc1"]["kernel"][...]) > 1e-3


def test_the_forward_pass_is_the_models_own_for_batches_of_any_size():
    model = MLP(nnx.Rngs(0))
    aligned = attach(model, jaxfa.dldfa(5, source="fc3"), inputs(9, 6))
    for count in (9, 4):
        np.testing.assert_array_equal(aligned(inputs(count, 6)), model(inputs(count, 6)))
        assert np.isfinite(gradients(aligned, inputs(count, 6))["fc1"]["kernel"][...]).all()


def test_coverage_says_where_the_error_comes_from():
    aligned = attach(MLP(nnx.Rngs(0)), jaxfa.dldfa(5, source="fc3"), inputs(9, 6))
    rows = aligned.coverage().rows
    assert [(row.layer, row.arrives, row.leaves) for row in rows] == [
        ("fc1", "direct, input of fc2", "not needed: first"),
        ("fc2", "backpropagation", "not needed: input tapped"),
        ("fc3", "exact: last", "backpropagation, allowed"),
    ]


@pytest.mark.parametrize(
    ("make", "x", "at", "source", "below"),
    [
        (Residual, inputs(9, 6), ("stem", "blocks/*"), "blocks/1", ("stem", "blocks/0")),
        (ConvNet, inputs(9, 8, 8, 3), None, "head", ("conv2",)),
    ],
)
def test_it_trains_and_both_factors_learn(make, x, at, source, below):
    rule = jaxfa.dldfa(3, source=source)
    aligned = attach(make(nnx.Rngs(0)), rule, x, at)
    taps = {path for path, _ in nnx.to_flat_state(nnx.state(aligned, jaxfa.nn.Feedback))}
    assert taps == {("model", *_key(path), "feedback_tap", "feedback") for path in below}
    optimizer = nnx.Optimizer(aligned, jaxfa.optimizer(optax.sgd(0.1), rule), wrt=TRAINED)
    before = jax.tree.map(jnp.copy, nnx.state(aligned, *TRAINED))

    @nnx.jit
    def step(aligned, optimizer):
        value, found = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, TRAINED))(aligned, x)
        optimizer.update(aligned, found)
        return value

    values = [step(aligned, optimizer) for _ in range(20)]
    assert values[-1] < values[0]
    after = nnx.state(aligned, *TRAINED)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(old, new)


def _key(path):
    return tuple(int(part) if part.isdigit() else part for part in path.split("/"))


@pytest.mark.parametrize(
    ("make", "at", "source", "message"),
    [
        (MLP, None, "fc9", r"source=\['fc9'\] matches nothing"),
        (MLP, None, "fc2", "No tapped module comes before"),
        (Residual, ("stem",), "blocks/7", r"source=\['blocks/7'\] matches nothing"),
        (Scanned, ("stem",), "blocks", "inside a stack"),
    ],
)
def test_a_source_that_can_be_none_is_refused(make, at, source, message):
    with pytest.raises(ValueError, match=message):
        attach(make(nnx.Rngs(0)), jaxfa.dldfa(3, source=source), inputs(9, 6), at)
