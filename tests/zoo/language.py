"""Language models: what their blocks, heads and caches look like in people's code."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.model import Model, tokens

WORDS = 11


class GPTBlock(nnx.Module):
    """Attention with one projection to queries, keys and values, then a multilayer perceptron; norms come first."""

    def __init__(self, width, heads, rngs):
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.project = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x, past=None):
        n, t, width = x.shape
        q, k, v = (part.reshape(n, t, self.heads, -1) for part in jnp.split(self.qkv(self.norm1(x)), 3, axis=-1))
        if past is not None:
            k, v = jnp.concatenate([past[0], k], axis=1), jnp.concatenate([past[1], v], axis=1)
        mask = jnp.tril(jnp.ones((t, k.shape[1]), bool), k.shape[1] - t)
        x = x + self.project(jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(n, t, width))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)))), (k, v)


class GPT(nnx.Module):
    """The head is the embedding's transpose; returns the logits and every block's keys and values."""

    def __init__(self, rngs, width=8, length=8):
        self.embed = nnx.Embed(WORDS, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([GPTBlock(width, 2, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, words, cache=None):
        start = 0 if cache is None else cache[0][0].shape[1]
        x = self.embed(words) + self.positions(start + jnp.arange(words.shape[1]))
        new = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, None if cache is None else cache[i])
            new.append(kept)
        return self.embed.attend(self.norm(x)), new

    def logits(self, words):
        """The logits alone."""
        return self(words)[0]


class Cache(nnx.Module):
    """Keys and values of one block, written in place."""

    def __init__(self, n, length, width):
        self.k = nnx.Cache(jnp.zeros((n, length, width)))
        self.v = nnx.Cache(jnp.zeros((n, length, width)))

    def write(self, start, k, v):
        """Writes what is new and returns all."""
        self.k[...] = jax.lax.dynamic_update_slice(self.k[...], k.astype(self.k.dtype), (0, start, 0))
        self.v[...] = jax.lax.dynamic_update_slice(self.v[...], v.astype(self.v.dtype), (0, start, 0))
        return self.k[...], self.v[...]


class Decoder(nnx.Module):
    """One layer of attention whose cache is a module among the arguments."""

    def __init__(self, rngs, width=8):
        self.embed = nnx.Embed(WORDS, width, rngs=rngs)
        self.q, self.k, self.v, self.out = (nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(4))
        self.head = nnx.Linear(width, WORDS, rngs=rngs)

    def __call__(self, words, cache, start=0):
        x = self.embed(words)
        k, v = cache.write(start, self.k(x), self.v(x))
        mask = jnp.arange(k.shape[1]) <= start + jnp.arange(words.shape[1])[:, None]
        scores = jnp.einsum("ntd,nsd->nts", self.q(x), k) / k.shape[-1] ** 0.5
        return self.head(x + self.out(nnx.softmax(jnp.where(mask, scores, -1e9)) @ v))


class RMSNorm(nnx.Module):
    """Divides by the root of the mean square."""

    def __init__(self, width):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * self.scale[...]


def rotate(x, sin, cos):
    """Turns pairs of features (N, t, heads, d) by their position's angles (t, d/2)."""
    a, b = jnp.split(x, 2, axis=-1)
    sin, cos = sin[:, None], cos[:, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class LlamaBlock(nnx.Module):
    """All weights are the block's own: ``x @ w`` and einsums; grouped keys and values; a gated perceptron."""

    def __init__(self, width, rngs, heads=2, head=4, hidden=12):
        def init(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / shape[0] ** 0.5)

        self.wq, self.wk, self.wv = init(width, heads, head), init(width, 1, head), init(width, 1, head)
        self.wo = init(heads * head, width)
        self.gate, self.up, self.down = init(width, hidden), init(width, hidden), init(hidden, width)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)

    def __call__(self, x, sin, cos):
        n, t, _ = x.shape
        h = self.norm1(x)
        q, k, v = (jnp.einsum("ntd,dhk->nthk", h, w[...]) for w in (self.wq, self.wk, self.wv))
        h = jax.nn.dot_product_attention(rotate(q, sin, cos), rotate(k, sin, cos), v, is_causal=True)
        x = x + h.reshape(n, t, -1) @ self.wo
        h = self.norm2(x)
        return x + (nnx.silu(h @ self.gate) * (h @ self.up)) @ self.down


class Llama(nnx.Module):
    """Rotary tables are plain arrays; returns the logits and the cache that it was not given."""

    def __init__(self, rngs, width=8, length=8):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (WORDS, width)))
        self.layers = nnx.List([LlamaBlock(width, rngs) for _ in range(2)])
        self.norm = RMSNorm(width)
        self.head = nnx.Param(jax.random.normal(rngs.params(), (width, WORDS)) / width**0.5)
        angles = jnp.arange(length)[:, None] / 100.0 ** (jnp.arange(2) / 2)
        self.sin, self.cos = jnp.sin(angles), jnp.cos(angles)

    def __call__(self, words, cache=None):
        x = self.embedding[words]
        for layer in self.layers:
            x = layer(x, self.sin[: words.shape[1]], self.cos[: words.shape[1]])
        return self.norm(x) @ self.head, cache


class Einsum(nnx.Module):
    """A layer of one's own."""

    def __init__(self, shape, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape) * shape[-2] ** -0.5)

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w[...])


class Embedder(nnx.Module):
    """Reads words and writes them by one table."""

    def __init__(self, words, width, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (words, width)))

    def encode(self, words):
        """Words to vectors."""
        return self.table[...][words] * self.table.shape[1] ** 0.5

    def decode(self, x):
        """Vectors to logits."""
        return x @ self.table[...].T


class GemmaBlock(nnx.Module):
    """Own einsum layers, a pair of gates in one array; carries the cache first, the stream second."""

    def __init__(self, width, rngs, heads=2, head=4):
        self.q = Einsum((heads, width, head), rngs)
        self.kv = Einsum((2, 1, width, head), rngs)
        self.out = Einsum((heads, head, width), rngs)
        self.gating, self.linear = Einsum((2, width, 12), rngs), Einsum((12, width), rngs)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)

    def __call__(self, x):
        h = self.norm1(x)
        q = self.q("ntd,hdk->nthk", h)
        k, v = self.kv("ntd,chdk->cnthk", h)
        x = x + self.out("nthk,hkd->ntd", jax.nn.dot_product_attention(q, k, v, is_causal=True))
        gate, up = self.gating("ntd,cdf->cntf", self.norm2(x))
        return (k, v), x + self.linear("ntf,fd->ntd", nnx.gelu(gate) * up)


class Gemma(nnx.Module):
    """An embedder of its own at both ends; logits are capped by tanh."""

    def __init__(self, rngs, width=8):
        self.embedder = Embedder(WORDS, width, rngs)
        self.blocks = nnx.List([GemmaBlock(width, rngs) for _ in range(2)])
        self.norm = RMSNorm(width)

    def __call__(self, words):
        x, cache = self.embedder.encode(words), {}
        for i, block in enumerate(self.blocks):
            cache[f"layer_{i}"], x = block(x)
        return 5 * jnp.tanh(self.embedder.decode(self.norm(x)) / 5), cache


def words():
    """A batch of three lines of five words."""
    return (tokens(3, 5, below=WORDS),)


def first(outputs):
    """Logits come first."""
    return outputs[0]


MODELS = (
    Model("GPT, tied head", GPT, words, ("input of blocks/0", "blocks/*"), method="logits"),
    Model("GPT that returns its cache", GPT, words, ("input of blocks/0", "blocks/*"), logits=first),
    Model("decoder with a cache module", Decoder, lambda: (*words(), Cache(3, 5, 8)), ("embed", "q", "k", "v", "out")),
    Model("Llama, own products, RoPE", Llama, words, ("input of layers/0", "layers/*")),
    Model("Gemma, own einsums", Gemma, words, ("input of blocks/0", "blocks/*"), logits=first),
)
