"""Forward gradients on Flax models: each gradient takes its derivative on its own batch, and keeps nothing of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from jaxfa.jaxprs.versions import equations, opened
from jaxfa.nn.taps.tap import taps_of
from tests.networks import LOOKS, MLP, Residual, Scanned, Transformer, attach, inputs, loss

RULE = jaxfa.forward_gradient()
pytestmark = LOOKS


class Small(nnx.Module):
    """A convolution and a dense layer."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (2, 2), padding="VALID", param_dtype=float, rngs=rngs)
        self.head = nnx.Linear(27, 4, param_dtype=float, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).reshape(len(x), -1))


def test_a_convolution_learns_as_a_numpy_reference(x64):
    x = jax.random.normal(jax.random.key(0), (5, 4, 4, 2))
    model = Small(nnx.Rngs(0, params=0))
    aligned = jaxfa.nn.attach(model, RULE, rngs=nnx.Rngs(1), example=x)
    got = nnx.jit(nnx.grad(loss))(aligned, x)["model"]
    k, w = np.asarray(model.conv.kernel[...], float), np.asarray(model.head.kernel[...], float)
    p = np.asarray(aligned.model.head.feedback_tap.feedback.get_value().draw(aligned(x)), float)
    assert p.shape == (5, 27)
    patches = np.stack([[x[:, i : i + 2, j : j + 2] for j in range(3)] for i in range(3)])  # (3, 3, N, 2, 2, 2)
    a = np.einsum("ijnhwc,hwco->nijo", patches, k) + np.asarray(model.conv.bias[...])
    h = np.maximum(a, 0).reshape(5, -1)
    logits = h @ w + np.asarray(model.head.bias[...])
    e = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    e[np.arange(5), np.arange(5) % 4] -= 1
    e /= 5
    delta = (p * np.sum((p @ w) * e, -1, keepdims=True)).reshape(a.shape) * (a > 0)
    np.testing.assert_allclose(got.conv.kernel[...], np.einsum("ijnhwc,nijo->hwco", patches, delta), rtol=1e-11)
    np.testing.assert_allclose(got.head.kernel[...], h.T @ e, rtol=1e-11, atol=1e-14)


def mean_of_draws(aligned, x, count=3000):
    """The mean gradient over draws of the feedback's seeds, and the true one."""
    graph, feedback, rest = nnx.split(aligned, jaxfa.nn.Feedback, ...)
    leaves, structure = jax.tree.flatten(feedback)

    def gradient(key):
        keys = jax.random.split(key, len(leaves))
        seeds = [jnp.floor(jax.random.uniform(k, leaf.shape, maxval=256)) for k, leaf in zip(keys, leaves, strict=True)]
        model = nnx.merge(graph, jax.tree.unflatten(structure, seeds), rest, copy=True)
        return nnx.as_pure(nnx.state(nnx.grad(loss)(model, x)["model"]))

    found = jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(0), count))
    true = nnx.as_pure(nnx.state(nnx.grad(loss)(jaxfa.nn.plain(aligned), x)))
    return found, true


CASES = {
    "mlp": (MLP, RULE, None),
    "blocks": (Residual, jaxfa.forward_gradient(separate=True), ("stem", "blocks/*")),
    "scanned": (Scanned, RULE, ("stem", "blocks")),
    "tokens": (Transformer, RULE, ("embed", "block")),
    "weights": (MLP, jaxfa.forward_gradient(weights=True), None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_draws_is_the_true_gradient(name):
    make, rule, at = CASES[name]
    x = jnp.arange(6).reshape(2, 3) if name == "tokens" else inputs(4, 6)
    aligned = attach(make(nnx.Rngs(0)), rule, x, at)
    for _, block in nnx.iter_modules(aligned):
        if isinstance(block, nnx.BatchNorm):  # what examples do to each other is left out
            block.use_running_average = True
    found, true = mean_of_draws(aligned, x)
    for samples, one in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
        error = jnp.sum((samples.mean(0) - one) ** 2)
        assert error < 12 * jnp.sum(samples.var(0)) / len(samples) + 1e-12
    single = jnp.concatenate([(s[0] - t).ravel() for s, t in zip(*map(jax.tree.leaves, (found, true)), strict=True)])
    assert jnp.linalg.norm(single) > 0.1  # one draw is not enough


def test_weights_learn_their_own_draws_times_the_slope_along_all_of_them(x64):
    x = inputs(9, 6)
    aligned = attach(MLP(nnx.Rngs(0)), jaxfa.forward_gradient(weights=True), x)
    gradient = nnx.jit(nnx.grad(loss))
    got, true = gradient(aligned, x)["model"], gradient(jaxfa.nn.plain(aligned), x)
    taps = {path: tap.feedback.get_value().draw(aligned(x))[0] for path, tap in taps_of(aligned.model).items()}
    assert set(taps) == {f"fc{i}/{name}" for i in (1, 2, 3) for name in ("kernel", "bias")}
    pairs = {path: [getattr(getattr(tree, path[:3]), path[4:])[...] for tree in (got, true)] for path in taps}
    slope = sum(jnp.vdot(taps[path], one) for path, (_, one) in pairs.items())
    for path, (mine, _) in pairs.items():
        np.testing.assert_allclose(mine, slope * taps[path], rtol=1e-5)


def test_perturbed_weights_are_not_drawn_once_for_each_example():
    aligned = attach(MLP(nnx.Rngs(0)), jaxfa.forward_gradient(weights=True), inputs(9, 6))
    graph, state = nnx.split(aligned)
    program = opened(
        jax.make_jaxpr(lambda state: nnx.state(nnx.grad(loss)(nnx.merge(graph, state), inputs(9, 6))))(state)
    )
    shapes = {var.aval.shape for eqn in equations(program) for var in eqn.outvars if hasattr(var.aval, "shape")}
    assert (8, 8) in shapes
    assert (9, 8, 8) not in shapes


def test_the_derivative_is_taken_with_the_masks_of_this_very_pass():
    class Dropped(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(64, 1, use_bias=False, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(1, 1, use_bias=False, kernel_init=nnx.initializers.ones, rngs=rngs)

        def __call__(self, x):
            return self.head(self.dropout(self.fc(x)))

    x = jnp.eye(64)
    aligned = jaxfa.nn.attach(Dropped(nnx.Rngs(0)), RULE, rngs=nnx.Rngs(1), example=x, at="fc")
    count = int(aligned.model.dropout.rngs.count[...])

    @nnx.jit
    def run(aligned):
        return nnx.value_and_grad(lambda model: ((y := model(x)).sum(), y), has_aux=True)(aligned)

    (_, y), gradient = run(aligned)
    mask = 2.0 * (y[:, 0] != 0)
    assert 16 < mask.sum() / 2 < 48
    # Signs square to one, so that each example's error is what it is multiplied by: its own mask.
    np.testing.assert_allclose(gradient["model"].fc.kernel[...][:, 0], mask, rtol=1e-6)
    assert int(aligned.model.dropout.rngs.count[...]) == count + 1


def test_a_streamed_model_learns_the_same():
    x = inputs(9, 6)
    at = ("stem", "blocks/*")
    models = [
        attach(Residual(nnx.Rngs(0)), RULE, x, at, schedule=s) for s in (jaxfa.stacks.stored, jaxfa.stacks.stream)
    ]
    one, other = (jax.tree.leaves(nnx.jit(nnx.grad(loss))(model, x)) for model in models)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_nothing_of_a_batch_is_kept_and_any_batch_may_follow():
    aligned = attach(MLP(nnx.Rngs(0)), RULE, inputs(9, 6))
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(aligned, jaxfa.nn.Feedback))]
    assert shapes == [(4,)] * 4
    learned = (nnx.Param, jaxfa.nn.Feedback)
    optimizer = nnx.Optimizer(aligned, jaxfa.optimizer(optax.adam(1e-2), RULE), wrt=learned)

    @nnx.jit
    def step(aligned, optimizer, x):
        optimizer.update(aligned, nnx.grad(loss, argnums=nnx.DiffState(0, learned))(aligned, x))

    first = float(loss(aligned, inputs(9, 6)))
    for i in range(60):
        step(aligned, optimizer, inputs(9, 6)[: 9 if i % 2 else 6])
    assert float(loss(aligned, inputs(9, 6))) < 0.8 * first
    assert [leaf.shape for leaf in jax.tree.leaves(nnx.state(aligned, jaxfa.nn.Feedback))] == shapes


def test_a_single_layer_learns_exactly():
    x, model = inputs(9, 6), nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    aligned = jaxfa.nn.attach(model, RULE, rngs=nnx.Rngs(1), example=x)
    got, true = nnx.grad(loss)(aligned, x)["model"], nnx.grad(loss)(model, x)
    np.testing.assert_allclose(got.kernel[...], true.kernel[...], rtol=1e-6)


def test_what_perturbed_weights_cannot_do_is_refused():
    rule, x = jaxfa.forward_gradient(weights=True), inputs(9, 6)
    with pytest.raises(ValueError, match="leave out at="):
        attach(MLP(nnx.Rngs(0)), rule, x, "fc1")
    with pytest.raises(ValueError, match="'blocks/down' is a stack of layers"):
        attach(Scanned(nnx.Rngs(0)), rule, x)
