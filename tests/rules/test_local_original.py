"""PredSim and AugLocal give the numbers of their authors' code on the same weights (``local_original.json``).

PyTorch 2.13, float64. PredSim: ``LocalLossBlockLinear`` and ``LocalLossBlockConv`` of
https://github.com/anokland/local-loss (7b3b40b), without batch norm, decoders of 20 features, whose loss is rounded to
single precision. AugLocal: ``AuxNetwork`` of https://github.com/ChenxiangMA/AugLocal (98c90d6), two residual blocks of
16 channels. What is there of every gradient is the sum of magnitudes and the first four entries, in our layout's order.
"""

import json
import math
import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfa

ORIGINAL = json.loads((pathlib.Path(__file__).parent / "local_original.json").read_text())
ONEHOT, MEAN = np.eye(3)[[0, 1, 2, 1, 0, 1]], np.full(6, 1 / 6)


def wave(*shape, seed):
    """The numbers that both were given."""
    k = np.arange(math.prod(shape))
    return jnp.asarray(np.sin(0.7 * k + 0.013 * k**2 + seed).reshape(shape))


def agree(found, original):
    for name, array in found.items():
        one = [jnp.abs(array).sum(), *array.reshape(-1)[:4]] if array.ndim else array
        np.testing.assert_allclose(one, original[name], 1e-7 if name == "loss" else 1e-9, 1e-13, err_msg=name)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_predsim(kind, x64):
    x, kernel, s, features, op = {
        "dense": ((5,), (5, 4), (4, 4), 4, jnp.matmul),
        "conv": ((8, 8, 2), (3, 3, 2, 5), (3, 3, 5, 5), 20, jaxfa.conv),
    }[kind]
    x, params = wave(6, *x, seed=0), (wave(*kernel, seed=1), wave(kernel[-1], seed=2))
    seeds = {"w": wave(features, 3, seed=3), "b": wave(3, seed=4), "s": wave(*s, seed=5)}

    def layer(kernel, bias):
        y = op(x, kernel)
        return jax.nn.relu(y + jnp.broadcast_to(bias, y.shape))

    h, back = jax.vjp(layer, *params)
    feedback = replace(jaxfa.predsim(pooled=20).init(jax.random.PRNGKey(0), h, ONEHOT), **seeds)
    dh, signal = feedback.learn(h, jnp.asarray(-ONEHOT) / 6)
    (weight, bias), name = back(dh), {"dense": "linear_loss", "conv": "conv_loss"}[kind]
    found = {"loss": feedback.loss(h, ONEHOT, MEAN), "encoder.weight": weight, "encoder.bias": bias}
    found |= {"decoder_y.weight": signal.w, "decoder_y.bias": signal.b, f"{name}.weight": signal.s}
    agree(found, ORIGINAL[kind])
    with pytest.raises(AssertionError):  # the control
        agree({"loss": replace(feedback, beta=0.98).loss(h, ONEHOT, MEAN)}, ORIGINAL[kind])


def residual(x, w):
    """The block of the paper's code: two convolutions with batch normalisation around a shortcut."""
    p, _ = w
    y = jax.nn.relu(_norm(jaxfa.conv(x, p["conv1.weight"]), p["bn1.weight"], p["bn1.bias"]))
    return jax.nn.relu(_norm(jaxfa.conv(y, p["conv2.weight"]), p["bn2.weight"], p["bn2.bias"]) + x)


def _norm(x, scale, bias):
    x = (x - x.mean((0, 1, 2), keepdims=True)) / jnp.sqrt(x.var((0, 1, 2), keepdims=True) + 1e-5)
    return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


def test_auglocal(x64):
    params, seed = [], 1
    for _ in range(2):
        one = {}
        for name in ("conv1", "bn1", "conv2", "bn2"):
            if name.startswith("conv"):
                one[f"{name}.weight"] = wave(3, 3, 16, 16, seed=seed) / 10
                seed += 1
            else:
                one |= {f"{name}.weight": wave(16, seed=seed) / 4 + 1, f"{name}.bias": wave(16, seed=seed + 1) / 4}
                seed += 2
        params.append(one)
    h = wave(6, 4, 4, 16, seed=0)
    above = [jaxfa.Layer(residual, jax.ShapeDtypeStruct(h.shape, h.dtype), (p, {})) for p in params]
    # Four blocks above, of which two are taken.
    made = jaxfa.auglocal(depth=2, pyramid=0).init(jax.random.PRNGKey(0), h, ONEHOT, above=tuple(above * 2), below=0)
    assert made.adapters == (None, None)
    feedback = replace(made, params=tuple(params), w=wave(16, 3, seed=seed), b=wave(3, seed=seed + 1))
    dh, signal = feedback.learn(h, jnp.asarray(-ONEHOT) / 6)
    found = {f"head.{i}.{name}": g for i, one in enumerate(signal.params) for name, g in one.items()}
    found |= {"loss": feedback.loss(h, ONEHOT, MEAN), "h": dh, "head.4.weight": signal.w, "head.4.bias": signal.b}
    assert found.keys() == ORIGINAL["auglocal"].keys()
    agree(found, ORIGINAL["auglocal"])
