"""Transformers beyond the decoder: mixtures of experts, encoders, encoder and decoder, adapters."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.model import Model, Penalty, tokens

WORDS = 11


class OneHotExperts(nnx.Module):
    """Every token goes to its best expert by a one-hot product; the balance of loads is a penalty."""

    def __init__(self, width, rngs, experts=3, hidden=6):
        def init(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / shape[-2] ** 0.5)

        self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
        self.up, self.down = init(experts, width, hidden), init(experts, hidden, width)

    def __call__(self, x):
        scores = nnx.softmax(self.router(x))
        chosen = jax.nn.one_hot(scores.argmax(-1), scores.shape[-1], dtype=x.dtype)
        self.balance = Penalty((chosen.mean((0, 1)) * scores.mean((0, 1))).sum())
        h = jnp.einsum("nte,ntd->entd", chosen, x)
        h = nnx.relu(jnp.einsum("entd,edf->entf", h, self.up[...]))
        return jnp.einsum("entf,efd,nte->ntd", h, self.down[...], chosen * scores)


class GatheredExperts(nnx.Module):
    """Every token gathers its best expert's weights by index."""

    def __init__(self, width, rngs, experts=3, hidden=6):
        def init(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / shape[-2] ** 0.5)

        self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
        self.up, self.down = init(experts, width, hidden), init(experts, hidden, width)

    def __call__(self, x):
        weight, index = jax.lax.top_k(nnx.softmax(self.router(x)), 1)
        h = nnx.relu(jnp.einsum("ntd,ntdf->ntf", x, self.up[...][index[..., 0]]))
        return weight * jnp.einsum("ntf,ntfd->ntd", h, self.down[...][index[..., 0]])


class MixtureBlock(nnx.Module):
    """A norm and experts beside the residual stream."""

    def __init__(self, width, experts, rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.experts = experts(width, rngs)

    def __call__(self, x):
        return x + self.experts(self.norm(x))


class Mixture(nnx.Module):
    """Two such blocks."""

    def __init__(self, rngs, experts, width=8):
        self.embed = nnx.Embed(WORDS, width, rngs=rngs)
        self.blocks = nnx.List([MixtureBlock(width, experts, rngs) for _ in range(2)])
        self.head = nnx.Linear(width, WORDS, rngs=rngs)

    def __call__(self, words):
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class EncoderBlock(nnx.Module):
    """Flax's attention and a perceptron, each followed by its norm, with dropout."""

    def __init__(self, width, rngs):
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(width, 12, rngs=rngs), nnx.gelu, nnx.Linear(12, width, rngs=rngs))
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, mask=None, *, deterministic):
        h = self.attention(x, mask=mask, deterministic=deterministic)
        x = self.norm1(x + self.dropout(h, deterministic=deterministic))
        return self.norm2(x + self.dropout(self.mlp(x), deterministic=deterministic))


class Encoder(nnx.Module):
    """Words, segments and positions are embedded; padding is masked; ``deterministic`` is passed by keyword."""

    def __init__(self, rngs, width=8, length=5):
        self.words = nnx.Embed(WORDS, width, rngs=rngs)
        self.segments = nnx.Embed(2, width, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (1, length, width)))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.blocks = nnx.List([EncoderBlock(width, rngs) for _ in range(2)])
        self.head = nnx.Linear(width, WORDS, rngs=rngs)

    def __call__(self, words, segments, padding, *, deterministic=False):
        x = self.norm(self.words(words) + self.segments(segments) + self.positions)
        mask = padding[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask, deterministic=deterministic)
        return self.head(x)


class DecoderBlock(nnx.Module):
    """Attends to itself and to what the encoder made of the source."""

    def __init__(self, width, rngs):
        self.own = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.cross = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.mlp = nnx.Linear(width, width, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(3)])

    def __call__(self, x, memory):
        x = x + self.own(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        x = x + self.cross(self.norms[1](x), memory)
        return x + nnx.relu(self.mlp(self.norms[2](x)))


class Translator(nnx.Module):
    """An encoder and a decoder with cross attention; one embedding for both."""

    def __init__(self, rngs, width=8):
        self.embed = nnx.Embed(WORDS, width, rngs=rngs)
        self.encoder = nnx.List([EncoderBlock(width, rngs) for _ in range(2)])
        self.decoder = nnx.List([DecoderBlock(width, rngs) for _ in range(2)])
        self.head = nnx.Linear(width, WORDS, rngs=rngs)

    def __call__(self, source, target):
        memory = self.embed(source)
        for block in self.encoder:
            memory = block(memory, deterministic=True)
        x = self.embed(target)
        for block in self.decoder:
            x = block(x, memory)
        return self.head(x)


class Adapted(nnx.Module):
    """A block whose projections carry adapters of rank two; one is a linear layer with its own, one wraps a layer."""

    def __init__(self, rngs, width=8):
        some = nnx.initializers.normal(0.3)
        self.embed = nnx.Embed(WORDS, width, rngs=rngs)
        self.up = nnx.LoRALinear(width, 12, lora_rank=2, b_initializer=some, rngs=rngs)
        base = nnx.Linear(12, width, rngs=rngs)
        self.down = nnx.LoRA(12, 2, width, base_module=base, b_initializer=some, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, WORDS, rngs=rngs)

    def __call__(self, words):
        x = self.embed(words)
        return self.head(x + self.down(nnx.gelu(self.up(self.norm(x)))))


def lines():
    """A batch of three lines of five words."""
    return (tokens(3, 5, below=WORDS),)


def pair():
    """Lines of two lengths."""
    return tokens(3, 4, below=WORDS), tokens(3, 5, below=WORDS, seed=1)


def padded():
    """Lines, their segments and what is no padding."""
    return tokens(3, 5, below=WORDS), tokens(3, 5, below=2), jnp.arange(5) < jnp.array([[5], [3], [4]])


MODELS = (
    Model("mixture of experts, one-hot", lambda rngs: Mixture(rngs, OneHotExperts), lines, ("embed", "blocks/*")),
    Model("mixture of experts, gathered", lambda rngs: Mixture(rngs, GatheredExperts), lines, ("embed", "blocks/*")),
    Model("BERT", Encoder, padded, ("norm", "blocks/*"), kwargs=lambda: {"deterministic": False}),
    Model(
        "encoder and decoder", Translator, pair, ("input of encoder/0", "input of decoder/0", "encoder/*", "decoder/*")
    ),
    Model("LoRA", Adapted, lines, ("embed", "norm", "up", "down")),
)
