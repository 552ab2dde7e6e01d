"""The networks: plain NNX, and fit for every rule."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxfa.nn
from experiments.common.methods import METHODS
from experiments.models import networks as models
from experiments.models.vgg import VGG
from experiments.models.vit import ViT
from jaxfa.base import is_direct

SHAPES = {"mlp": (8, 8, 1), "lenet": (28, 28, 1), "convnet": (8, 8, 1), "resnet20": (32, 32, 3)}


def make(name):
    return models.architecture(name, SHAPES[name]).make(SHAPES[name], 10, rngs=nnx.Rngs(0))


def test_models_do_not_know_jaxfa():
    code = inspect.getsource(models)
    assert "import jaxfa" not in code
    assert "from jaxfa" not in code


@pytest.mark.parametrize("name", models.MODELS)
def test_logits_and_every_parameter_has_a_gradient(name):
    def gradient():
        model, images = make(name), jnp.ones((4, *SHAPES[name]))

        def loss(model):
            logits = model(images)
            return logits.sum(), logits

        gradients, logits = nnx.grad(loss, has_aux=True)(model)
        return nnx.to_pure_dict(gradients), logits

    gradients, logits = jax.eval_shape(gradient)
    assert logits.shape == (4, 10)
    assert len(jax.tree.leaves(gradients)) > 4


def test_resnet20_has_twenty_layers_and_the_published_size():
    parameters = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(make("resnet20"), nnx.Param)))
    kernels = [leaf for leaf in jax.tree.leaves(parameters) if leaf.ndim == 4 and leaf.shape[0] == 3]
    assert len(kernels) + 1 == 20
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert 0.26e6 < size < 0.28e6


@pytest.mark.parametrize(("depth", "width", "millions"), [(56, 16, 0.86), (20, 8, 0.07)])
def test_a_resnet_of_another_depth_or_width_has_its_size(depth, width, millions):
    def size():
        options = {"repeats": (depth - 2) // 6, "rngs": nnx.Rngs(0)}
        return nnx.state(models.ResNet((32, 32, 3), 100, (width, 2 * width, 4 * width), **options), nnx.Param)

    leaves = jax.tree.leaves(nnx.to_pure_dict(jax.eval_shape(size)))
    assert sum(leaf.shape[0] == 3 and leaf.ndim == 4 for leaf in leaves) + 1 == depth
    assert abs(sum(leaf.size for leaf in leaves) - millions * 1e6) < 1e4


def test_vgg16_has_thirteen_convolutions():
    def make():
        return VGG((32, 32, 3), 100, widths=(64, 128, 256, 512, 512), repeats=(2, 2, 3, 3, 3), rngs=nnx.Rngs(0))

    leaves = jax.tree.leaves(nnx.to_pure_dict(jax.eval_shape(lambda: nnx.state(make(), nnx.Param))))
    assert sum(leaf.ndim == 4 for leaf in leaves) == 13
    assert jax.eval_shape(lambda: make()(jnp.ones((2, 32, 32, 3)))).shape == (2, 100)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_every_model_takes_both_families(name, rule):
    found, chosen = models.architecture(name, SHAPES[name]), METHODS[rule]

    def attach():
        at = found.taps if chosen.direct else None
        example = jnp.ones((4, *SHAPES[name]))
        aligned = jaxfa.nn.attach(make(name), chosen.rule(), rngs=nnx.Rngs(1), at=at, example=example)
        return nnx.to_pure_dict(nnx.state(aligned, jaxfa.nn.Feedback))

    assert jax.tree.leaves(jax.eval_shape(attach))


def test_direct_agrees_with_the_rule():
    for chosen in METHODS.values():
        assert chosen.direct == is_direct(chosen.rule())


def test_max_pool_is_flax_own():
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    assert (models.max_pool(x) == nnx.max_pool(x, (2, 2), (2, 2))).all()


def test_refusals_name_the_choices():
    with pytest.raises(ValueError, match=r"lenet needs images of at least 12 x 12 pixels, got 8 x 8.*mlp, convnet"):
        models.architecture("lenet", (8, 8, 1))
    with pytest.raises(ValueError, match=r"vgg.*mlp, lenet, convnet, resnet20"):
        models.architecture("vgg", (32, 32, 3))


def test_networks_of_the_published_sizes():
    def parameters(make):
        return jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(make((32, 32, 3), 10, rngs=nnx.Rngs(0)), nnx.Param)))

    made = parameters(VGG)
    assert [made["blocks"][i]["conv"]["kernel"].shape[-1] for i in range(8)] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert made["classifier"]["kernel"].shape == (512, 256)
    # A block of width d holds 4 d^2 in its attention and 2 * 2 d^2 in its layers, and biases and norms.
    d = 8
    block = 4 * d * d + 4 * d + 4 * d * d + 3 * d + 4 * d
    expected = 8 * block + (48 * d + d) + (65 + 1) * d + 2 * d + (10 * d + 10)
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters(partial(ViT, width=d)))) == expected


def test_vit_without_positions_does_not_know_where_a_patch_stands():
    model = ViT((8, 8, 3), 5, width=8, depth=1, heads=2, dropout=0.0, rngs=nnx.Rngs(0))
    forward = nnx.jit(lambda model, image: model(image))
    image = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    swapped, inside = jnp.roll(image, (4, 4), (1, 2)), jnp.roll(image, (2, 2), (1, 2))
    assert jnp.abs(forward(model, image) - forward(model, swapped)).max() > 1e-3
    model.positions[...] = jnp.zeros_like(model.positions[...])
    np.testing.assert_allclose(forward(model, image), forward(model, swapped), rtol=1e-4, atol=1e-5)
    assert jnp.abs(forward(model, image) - forward(model, inside)).max() > 1e-3


def test_vit_refuses_parts_of_patches():
    with pytest.raises(ValueError, match="whole patches of 4 pixels, got 8 x 10"):
        ViT((8, 10, 3), 5, rngs=nnx.Rngs(0))
