"""Muon on the networks of the experiments: which parameters it takes, as which matrices, and what it does to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
from experiments.common.optimizers import hidden_kernels, is_hidden, muon
from experiments.models import networks as models
from experiments.models.cnn import PoolingCNN
from experiments.models.vgg import VGG
from experiments.models.vit import ViT
from tests import networks

SHAPE = (16, 16, 3)


class Separable(nnx.Module):
    """A depthwise convolution between two that are not, on an embedding of pixels' levels."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs)
        self.pointwise = nnx.Conv(6, 8, (1, 1), use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)


def build(name):
    return models.architecture(name, (32, 32, 3)).make((32, 32, 3), 10, rngs=nnx.Rngs(0))


BLOCK = ("first/conv", "second/conv")
STRIDED = [2 * i + j for i in (1, 2) for j in (1, 2)]
# name: (model, first and last, the layers that are Muon's)
CASES = {
    "mlp": (lambda: build("mlp"), ("layers/0", "head"), {"layers/1", "layers/2"}),
    "lenet": (lambda: build("lenet"), ("conv1", "head"), {"conv2", "fc1", "fc2"}),
    "convnet": (lambda: build("convnet"), ("convs/0", "head"), {"convs/1", "convs/2"}),
    "resnet20": (
        lambda: build("resnet20"),
        ("stem", "head"),
        {f"blocks/{i}/{conv}" for i in range(9) for conv in BLOCK} | {f"blocks/{i}/shortcut/conv" for i in (3, 6)},
    ),
    "vgg": (
        lambda: VGG(SHAPE, 10, widths=(4, 8), rngs=nnx.Rngs(0)),
        ("blocks/0/conv", "head"),
        {"blocks/1/conv", "blocks/2/conv", "blocks/3/conv", "classifier"},
    ),
    "vit": (
        lambda: ViT(SHAPE, 10, width=8, depth=1, heads=2, rngs=nnx.Rngs(0)),
        ("embedding", "head"),
        {f"blocks/0/attention/{name}" for name in ("query", "key", "value", "out")} | {"blocks/0/fc1", "blocks/0/fc2"},
    ),
    "cnn": (
        lambda: PoolingCNN(SHAPE, 10, (4, 6, 8), normalised=False, rngs=nnx.Rngs(0)),
        ("layers/0", "head"),
        {"layers/1/conv", "layers/2/conv"},
    ),
    "resnet18": (
        lambda: models.ResNet(SHAPE, 10, (4, 6, 8, 10), repeats=2, rngs=nnx.Rngs(0)),
        ("stem", "head"),
        {f"blocks/{i}/{conv}" for i in range(8) for conv in BLOCK} | {f"blocks/{i}/shortcut/conv" for i in (2, 4, 6)},
    ),
    "separable": (lambda: Separable(nnx.Rngs(0)), ("conv", "head"), {"pointwise"}),
    "scanned": (lambda: networks.Scanned(nnx.Rngs(0)), ("stem", "head"), {"blocks/up", "blocks/down"}),
}


def parameters(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def random_like(tree, seed=1):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def step(tx, gradients, params):
    return jax.jit(lambda gradients: tx.update(gradients, tx.init(params), params)[0])(gradients)


@pytest.mark.parametrize("name", CASES)
def test_hidden_kernels_are_those_between_the_first_and_the_last(name):
    make, but, expected = CASES[name]
    model = nnx.eval_shape(make)
    found = names(is_hidden(hidden_kernels(model, but=but), {"anywhere": (parameters(model),)}))
    assert set(found) == {f"anywhere/0/{name}" for name in names(parameters(model))}
    assert {key for key in found if found[key]} == {f"anywhere/0/{layer}/kernel" for layer in expected}


@pytest.mark.parametrize("name", ["lenet", "separable", "scanned"])
def test_muon_takes_hidden_kernels_and_adam_all_else(name):
    make, but, expected = CASES[name]
    model = nnx.eval_shape(make)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), parameters(model))
    gradients = random_like(params)
    tx = muon(1.0, hidden_kernels(model, but=but), adam_rate=1e-3)
    found = names(step(tx, gradients, params))
    adam = names(jax.tree.map(lambda g: -1e-3 * jnp.sign(g), gradients))
    by_adam = {key for key in found if np.allclose(found[key], adam[key], rtol=1e-3)}
    assert set(found) - by_adam == {f"{layer}/kernel" for layer in expected}


def newton_schulz(gradient):
    """Jordan's iteration, in double precision."""
    x = np.asarray(gradient, dtype=np.float64)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


def test_a_convolution_is_one_matrix_of_window_and_channels():
    kernel = jnp.zeros((3, 3, 4, 6))
    model = nnx.eval_shape(lambda: nnx.Sequential(nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))))
    params = {"layers": {0: {"kernel": kernel, "bias": jnp.zeros(6)}}}
    gradients = random_like(params)
    update = step(muon(0.5, hidden_kernels(model, but=()), adam_rate=1e-3), gradients, params)
    flat = gradients["layers"][0]["kernel"].reshape(36, 6)
    np.testing.assert_allclose(update["layers"][0]["kernel"].reshape(36, 6), -0.5 * newton_schulz(flat), atol=1e-4)
    sigma = np.linalg.svd(update["layers"][0]["kernel"].reshape(36, 6) / 0.5, compute_uv=False)
    assert 0.6 < sigma.min() < sigma.max() < 1.25
    # Not so by windows, which is what default dimension numbers of the last two axes would be.
    by_window = np.stack([newton_schulz(one) for one in np.asarray(gradients["layers"][0]["kernel"]).reshape(9, 4, 6)])
    assert abs(update["layers"][0]["kernel"].reshape(9, 4, 6) + 0.5 * by_window).max() > 0.05


def test_attention_projects_all_heads_as_one_matrix():
    model = nnx.eval_shape(CASES["vit"][0])
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), parameters(model))
    gradients = random_like(params)
    update = names(step(muon(1.0, hidden_kernels(model, but=("embedding", "head")), adam_rate=1e-3), gradients, params))
    for name in ("query", "out"):
        key = f"blocks/0/attention/{name}/kernel"
        np.testing.assert_allclose(
            update[key].reshape(8, 8), -newton_schulz(names(gradients)[key].reshape(8, 8)), atol=1e-3
        )


def changed_layers(tx, params):
    """Which layers' updates of a stack change with the gradient of its first, by parameter."""
    gradients = random_like(params)
    others = jax.tree.map(lambda g: g, gradients)
    others["blocks"] = jax.tree.map(
        lambda g, new: g.at[0].set(new[0]), gradients["blocks"], random_like(params, 2)["blocks"]
    )
    updates = [names(step(tx, each, params)["blocks"]) for each in (gradients, others)]
    return {
        key: set(np.flatnonzero(np.any(np.reshape(updates[0][key] != updates[1][key], (3, -1)), 1)))
        for key in updates[0]
    }


def test_stacked_layers_are_never_mixed():
    model = networks.Scanned(nnx.Rngs(0))
    params, gradients = parameters(model), random_like(parameters(model))
    tx = muon(1.0, hidden_kernels(model, but=("stem", "head")), adam_rate=1e-3)
    assert all(layers == {0} for layers in changed_layers(tx, params).values())
    update = step(tx, gradients, params)["blocks"]["up"]["kernel"]
    expected = np.stack([-newton_schulz(one) for one in np.asarray(gradients["blocks"]["up"]["kernel"])])
    np.testing.assert_allclose(update, expected, atol=1e-3)
    # Left to its defaults, optax takes the stack of biases for a matrix.
    assert changed_layers(optax.contrib.muon(1.0), params)["up/bias"] == {0, 1, 2}


def test_it_finds_the_kernels_behind_a_rule_and_leaves_the_feedback():
    model, x = networks.Residual(nnx.Rngs(0)), jnp.ones((5, 6))
    aligned = networks.attach(model, jaxfa.fa(), x)
    tx = muon(1.0, hidden_kernels(model, but=("stem", "head")), adam_rate=1e-3)
    _, params, feedback, _ = nnx.split(aligned, nnx.Param, jaxfa.nn.Feedback, ...)
    both = nnx.to_pure_dict(params), nnx.to_pure_dict(feedback)
    updates = step(jaxfa.optimizer(tx, jaxfa.fa()), jax.tree.map(jnp.ones_like, both), both)
    moved = {key for key, leaf in names(updates[0]).items() if abs(leaf).max() > 2e-3}
    assert moved == {f"model/blocks/{i}/{name}/kernel" for i in (0, 1) for name in ("up", "down")}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates[1]))


def test_muon_equalises_what_is_there_and_makes_no_rank():
    model = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(20, 12, rngs=nnx.Rngs(0))))
    thin = jax.random.normal(jax.random.key(0), (20, 3)) * jnp.array([[1.0, 0.3, 0.1]])
    params = {"layers": {0: {"kernel": thin @ jax.random.normal(jax.random.key(1), (3, 12)), "bias": jnp.ones(12)}}}
    update = step(muon(1.0, hidden_kernels(model, but=()), adam_rate=1e-3), params, params)["layers"][0]["kernel"]
    sigma = np.linalg.svd(update, compute_uv=False)
    assert sigma[2] > 0.6
    assert sigma[3] < 1e-3


@pytest.mark.parametrize("path", ["heads", "norm", "layers/9", "layer"])
def test_a_path_that_names_no_layer_is_refused(path):
    model = nnx.eval_shape(CASES["cnn"][0])
    with pytest.raises(ValueError, match=r"names no layer; the layers here are \['head', 'layers/0/conv'"):
        hidden_kernels(model, but=(path,))
