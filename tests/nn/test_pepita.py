"""PEPITA on Flax models: what learns in the second pass, with which masks and statistics, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from tests.networks import MLP, ConvNet, Recurrent, Residual, Scanned, Transformer, attach, inputs, loss


def same(h):
    return h


class Small(nnx.Module):
    """A convolution, a pool that halves the map, a dense layer: the paper's network in small."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (2, 2), padding="VALID", param_dtype=float, rngs=rngs)
        self.head = nnx.Linear(12, 4, param_dtype=float, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), (2, 2))
        return self.head(x.reshape(len(x), -1))


def test_a_convolution_learns_as_a_numpy_reference(x64):
    x = np.asarray(jax.random.normal(jax.random.key(0), (5, 5, 5, 2)))
    model = Small(nnx.Rngs(0))
    aligned = jaxfa.nn.attach(model, jaxfa.pepita(scale=1.0), rngs=nnx.Rngs(1), example=x)
    got = nnx.jit(nnx.grad(loss))(aligned, x)["model"]
    k, w = np.asarray(model.conv.kernel[...]), np.asarray(model.head.kernel[...])
    f = np.asarray(jax.tree.leaves(nnx.state(aligned, jaxfa.nn.Feedback))[0])
    assert f.shape == (5, 5, 2, 4)

    def run(x):
        patches = np.stack([[x[:, i : i + 2, j : j + 2] for j in range(4)] for i in range(4)])  # (4, 4, N, 2, 2, 2)
        h = np.maximum(np.einsum("ijnhwc,hwco->nijo", patches, k), 0)
        pooled = h.reshape(5, 2, 2, 2, 2, 3).max((2, 4)).reshape(5, -1)
        return patches, h, pooled, pooled @ w

    _, first, _, logits = run(x)
    e = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    e[np.arange(5), np.arange(5) % 4] -= 1
    patches, second, pooled, _ = run(x + np.einsum("hwco,no->nhwc", f, e))
    assert ((first > 0) & (second == 0)).any()
    kernel = np.einsum("ijnhwc,nijo->hwco", patches, (first - second) / 5)
    np.testing.assert_allclose(got.conv.kernel[...], kernel, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(got.head.kernel[...], pooled.T @ e / 5, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(got.head.bias[...], e.mean(0), rtol=1e-10, atol=1e-13)


class TimeMajor(nnx.Module):
    """Takes ``(T, N, n)``."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return self.model(x.swapaxes(0, 1)).mean(1)


CASES = {
    "mlp": (MLP, inputs(9, 6), jaxfa.pepita(scale=1.0), None, ()),
    "mirrored": (MLP, inputs(9, 6), jaxfa.pepita(mirror=0.1), None, ()),
    "norms": (ConvNet, inputs(9, 8, 8, 3), jaxfa.pepita(scale=1.0), None, ()),
    "blocks": (Residual, inputs(9, 6), jaxfa.pepita(activation=same, scale=1.0), ("stem", "blocks/*"), ()),
    "recurrent": (Recurrent, inputs(9, 4, 6), jaxfa.pepita(activation=same, scale=1.0), "rnn", ()),
    "tokens": (
        Transformer,
        jnp.arange(12).reshape(4, 3) % 11,
        jaxfa.pepita(activation=same, modulate="embed"),
        "block",
        "embed",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_models_train_and_what_a_pass_writes_is_written_once(name):
    make, x, rule, at, allow = CASES[name]
    aligned, plain = attach(make(nnx.Rngs(0)), rule, x, at, allow=allow), make(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        aligned, jaxfa.optimizer(optax.adam(3e-3), rule), wrt=(learned := (nnx.Param, jaxfa.nn.Feedback))
    )
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(aligned.model, nnx.Param)))

    @nnx.jit
    def step(aligned, optimizer):
        if rule.refine is not jaxfa.base.keep:
            aligned.refine(jax.random.key(0), x)
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, learned))(aligned, x)
        optimizer.update(aligned, grads)
        return value

    first = step(aligned, optimizer)
    np.testing.assert_allclose(first, loss(plain, x), rtol=1e-5)  # and with its masks and its statistics
    kinds = nnx.Any(nnx.BatchStat, nnx.RngCount)
    mine, theirs = (jax.tree.leaves(nnx.state(model, kinds)) for model in (aligned.model, plain))
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for _ in range(30):
        last = step(aligned, optimizer)
    assert last < first
    after = nnx.as_pure(nnx.state(aligned.model, nnx.Param))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(is_moved == ("embed" not in str(path)) for path, is_moved in jax.tree.leaves_with_path(moved))


def test_both_passes_have_one_mask():
    class Dropped(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(1, 1, use_bias=False, kernel_init=nnx.initializers.ones, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(1, 1, use_bias=False, kernel_init=nnx.initializers.ones, rngs=rngs)

        def __call__(self, x):
            return self.head(self.dropout(self.fc(x)))

    x = jnp.ones((64, 1))
    rule = jaxfa.pepita(activation=same, distribution=nnx.initializers.ones, scale=1.0)
    # Tapped after the dropout: where the masks were not alike an example's activities would differ by about 2.
    aligned = jaxfa.nn.attach(Dropped(nnx.Rngs(0)), rule, rngs=nnx.Rngs(1), example=x, at="dropout")

    @nnx.jit
    def run(aligned):
        return nnx.grad(lambda model: (1e-3 * (y := model(x)).mean(), y), has_aux=True)(aligned)

    gradient, y = run(aligned)
    assert set(y[:, 0].tolist()) == {0.0, 2.0}
    # The input grows by 1e-3, an activity by as much times its mask, through which what it differs by goes back.
    wanted = -((y**2) * 1e-3 * 1.001).mean()
    np.testing.assert_allclose(gradient["model"].fc.kernel[0, 0], wanted, rtol=1e-3)


def test_the_table_says_where_errors_begin():
    aligned = attach(MLP(nnx.Rngs(0)), jaxfa.pepita(), inputs(9, 6))
    arrives = [row.arrives for row in aligned.coverage().rows]
    assert arrives == ["direct, output of fc1", "direct, output of fc2", "exact: last"]
    assert not aligned.coverage().violations


def test_a_norm_is_tapped_in_the_place_of_the_layer_that_it_follows():
    at = ("norm", "conv2")
    found, named = (attach(ConvNet(nnx.Rngs(0)), jaxfa.pepita(), inputs(9, 8, 8, 3), one) for one in (None, at))
    assert found.coverage().rows == named.coverage().rows
    assert found.note == "tapped: norm, conv2; the outputs of layers that lead to others, or of norms behind these"
    # One that follows none is the user's to name.
    first = nnx.Sequential(nnx.LayerNorm(6, rngs=nnx.Rngs(0)), nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu)
    model = nnx.Sequential(*first.layers, nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"at= names what learns: layers, or blocks, and beside them .* norms"):
        attach(model, jaxfa.pepita(), inputs(9, 6))


def test_what_has_no_second_pass_is_refused():
    rule = jaxfa.pepita()
    with pytest.raises(ValueError, match=r"must be of floats. For tokens, modulate what embeds them"):
        attach(Transformer(nnx.Rngs(0)), rule, jnp.zeros((9, 4), int), "block")
    with pytest.raises(ValueError, match="'blocks/norm' inside a transformation"):
        attach(Scanned(nnx.Rngs(0)), rule, inputs(9, 6))
    with pytest.raises(ValueError, match="'conv2' sends the error on to 'norm/bias'"):
        attach(ConvNet(nnx.Rngs(0)), rule, inputs(9, 8, 8, 3), ("conv1", "conv2"))
    with pytest.raises(ValueError, match="The tap 'fc3' is at the logits themselves"):
        attach(MLP(nnx.Rngs(0)), rule, inputs(9, 6), "fc*")
    with pytest.raises(ValueError, match=r"\(4, ..., n\) as the input .* Say modulate= with the path of a module"):
        attach(TimeMajor(MLP(nnx.Rngs(0))), rule, inputs(5, 4, 6))
    with pytest.raises(ValueError, match=r"at= names modules, not \['input of fc2'\]"):
        attach(MLP(nnx.Rngs(0)), rule, inputs(9, 6), "input of fc2")
    with pytest.raises(ValueError, match=r"\['fc1'\] come before the modulated 'fc2'"):
        attach(MLP(nnx.Rngs(0)), jaxfa.pepita(modulate="fc2"), inputs(9, 6), "fc1")
    for schedule in (jaxfa.stacks.stream, jaxfa.stacks.dispatch(jaxfa.stacks.mesh(layer=1))):
        with pytest.raises(ValueError, match=r"two passes forward: take jaxfa\.stacks\.stored"):
            attach(Residual(nnx.Rngs(0)), rule, inputs(9, 6), ("stem", "blocks/*"), schedule=schedule)
