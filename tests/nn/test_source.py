"""Direct rules whose error is taken at a later layer: below it the rule, above it backpropagation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from tests.networks import LOOKS, MLP, TRAINED, ConvNet, Residual, Scanned, attach, inputs, loss

pytestmark = LOOKS


def gradients(aligned, x):
    return nnx.jit(nnx.grad(loss))(aligned, x)["model"]


def test_below_the_source_the_error_there_comes_through_the_factors_and_above_all_is_exact():
    model, x = MLP(nnx.Rngs(0)), inputs(9, 6)
    aligned = attach(model, jaxfa.dldfa(5, source="fc3"), x)
    ours, true = gradients(aligned, x), nnx.jit(nnx.grad(loss))(model, x)
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


def test_a_source_in_the_middle_has_its_layers_above_left_to_backpropagation():
    class Deeper(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(4)])

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = nnx.relu(layer(x))
            return self.layers[-1](x)

    x = inputs(9, 6)
    aligned = attach(Deeper(nnx.Rngs(0)), jaxfa.dldfa(5, source="layers/2"), x)
    found, true = gradients(aligned, x)["layers"], nnx.jit(nnx.grad(loss))(jaxfa.nn.plain(aligned), x)["layers"]
    exact = [bool(jnp.allclose(found[i]["kernel"][...], true[i]["kernel"][...], atol=1e-6)) for i in range(4)]
    assert exact == [False, True, True, True]


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
        (MLP, None, "fc9", "'fc9' is none of those here"),
        (MLP, None, "fc2", "No tapped module comes before"),
        (Residual, ("stem",), "blocks/*", "path of one module"),
        (Scanned, ("stem",), "blocks", "inside a stack"),
    ],
)
def test_a_source_that_can_be_none_is_refused(make, at, source, message):
    with pytest.raises(ValueError, match=message):
        attach(make(nnx.Rngs(0)), jaxfa.dldfa(3, source=source), inputs(9, 6), at)


class Normed(nnx.Module):
    """A norm under the head; with ``branched`` a second way from the input to the head, run after the first."""

    def __init__(self, rngs, branched):
        self.fc1, self.fc2, self.fc3 = (nnx.Linear(6, 6, rngs=rngs) for _ in range(3))
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.side1, self.side2 = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(12 if branched else 6, 3, rngs=rngs)
        self.branched = branched

    def __call__(self, x, skip=False):
        h = self.fc3(jnp.tanh(self.fc2(jnp.tanh(self.fc1(x)))))
        if skip:
            return self.head(h)
        h = self.norm(h)
        return self.head(jnp.concatenate([h, self.side2(jnp.tanh(self.side1(x)))], -1) if self.branched else h)


def test_backpropagation_below_or_beside_a_source_is_refused():
    x, rule = inputs(9, 6), jaxfa.dldfa(2, source="norm")
    all_tapped = attach(Normed(nnx.Rngs(0), False), rule, x, ("fc1", "fc2", "fc3"))
    assert all_tapped.allow == ("head/kernel",)
    with pytest.raises(ValueError, match="'fc2' sends the error on to 'fc1/"):
        attach(Normed(nnx.Rngs(0), False), rule, x, ("fc2",))
    with pytest.raises(ValueError, match="'side2' sends the error on to 'side1/"):
        attach(Normed(nnx.Rngs(0), True), rule, x, ("fc1", "fc2", "fc3"))


def test_a_call_that_never_reaches_the_source_is_refused():
    aligned = attach(Normed(nnx.Rngs(0), False), jaxfa.dldfa(2, source="norm"), inputs(9, 6), ("fc1", "fc2", "fc3"))
    with pytest.raises(ValueError, match="never reaches the rule's source 'norm'"):
        nnx.grad(lambda model: model(inputs(9, 6), skip=True).sum())(aligned)
