"""Blocks for stacks: what tests of one device and of several run, by every direct rule."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfa.base import is_direct
from tests.methods import METHODS

OTHERS = "ssa", "auglocal", "forward_gradient"  # which are told of layers, of what is above, or of one batch
DIRECT = {m.name: m.rule for m in METHODS if is_direct(m.rule) and not m.name.startswith(OTHERS)}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1]))


def dense(p, h):
    return h + jnp.tanh(h @ p["w"] + jnp.broadcast_to(p["b"], h.shape))


def attention(p, h):
    q, k, v = (h @ p[name] for name in "qkv")
    return h + jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v


def conv(p, h):
    return h + jax.nn.relu(lax.conv_general_dilated(h, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
