"""Generative models: several outputs, noise and time among the arguments, losses of their own."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.model import Model, Penalty, inputs, tokens


def waves(t, width):
    """Sines and cosines of a time (N,)."""
    angles = t[:, None] * 10.0 ** jnp.linspace(0, 1, width // 2)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class DiTBlock(nnx.Module):
    """Norms without scale of their own; shift, scale and gate come from the condition."""

    def __init__(self, width, rngs):
        plain = {"use_bias": False, "use_scale": False, "rngs": rngs}
        self.norm1, self.norm2 = nnx.LayerNorm(width, **plain), nnx.LayerNorm(width, **plain)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(width, 12, rngs=rngs), nnx.gelu, nnx.Linear(12, width, rngs=rngs))
        self.modulation = nnx.Linear(width, 6 * width, rngs=rngs)

    def __call__(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(nnx.silu(condition))[:, None], 6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nnx.Module):
    """Image patches, time and class to the noise."""

    def __init__(self, rngs, width=8):
        self.patches = nnx.Linear(6, width, rngs=rngs)
        self.positions = 0.1 * jax.random.normal(rngs.params(), (4, width))
        self.time = nnx.Sequential(nnx.Linear(width, width, rngs=rngs), nnx.silu, nnx.Linear(width, width, rngs=rngs))
        self.label = nnx.Embed(5, width, rngs=rngs)
        self.blocks = nnx.List([DiTBlock(width, rngs) for _ in range(2)])
        self.head = nnx.Linear(width, 6, rngs=rngs)

    def __call__(self, x, t, label):
        condition = self.time(waves(t, self.positions.shape[1])) + self.label(label)
        x = self.patches(x) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


class VAE(nnx.Module):
    """Draws from its own stream of keys; returns three arrays and writes the divergence down."""

    def __init__(self, rngs):
        self.encoder = nnx.Linear(6, 8, rngs=rngs)
        self.mean, self.log_var = nnx.Linear(8, 2, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        self.decoder = nnx.Sequential(nnx.Linear(2, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 6, rngs=rngs))
        self.noise = rngs.noise.fork()

    def encode(self, x):
        """Means and log variances."""
        h = nnx.relu(self.encoder(x))
        return self.mean(h), self.log_var(h)

    def __call__(self, x):
        mean, log_var = self.encode(x)
        self.divergence = Penalty(0.5 * (jnp.exp(log_var) + mean**2 - 1 - log_var).sum(-1).mean())
        z = mean + jnp.exp(0.5 * log_var) * jax.random.normal(self.noise(), mean.shape, mean.dtype)
        return self.decoder(z), mean, log_var


class VQVAE(nnx.Module):
    """Codes from a book by the straight-through trick."""

    def __init__(self, rngs):
        self.enter, self.encode = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.book = nnx.Param(jax.random.normal(rngs.params(), (5, 3)))
        self.decode, self.leave = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        z = self.encode(nnx.relu(self.enter(x)))
        distances = ((z[:, None] - self.book[...]) ** 2).sum(-1)
        code = self.book[...][distances.argmin(-1)]
        self.commitment = Penalty(((z - jax.lax.stop_gradient(code)) ** 2).mean())
        self.codes = Penalty(((jax.lax.stop_gradient(z) - code) ** 2).mean())
        return self.leave(nnx.relu(self.decode(z + jax.lax.stop_gradient(code - z))))


class Denoiser(nnx.Module):
    """A step of diffusion: its users call ``noise_of``, which adds noise, and ``loss``, which is a number."""

    def __init__(self, rngs, width=8):
        self.time = nnx.Linear(4, width, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(6, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, 6, rngs=rngs)

    def noise_of(self, x, t, rngs):
        """The predicted noise and the true one."""
        noise = jax.random.normal(rngs.noise(), x.shape, x.dtype)
        keep = jnp.cos(t)[:, None]
        h = nnx.silu(self.fc1(keep * x + jnp.sqrt(1 - keep**2) * noise) + self.time(waves(t, 4)))
        return self.head(nnx.silu(self.fc2(h))), noise

    def loss(self, x, t, rngs):
        """The mean squared error."""
        predicted, noise = self.noise_of(x, t, rngs)
        return ((predicted - noise) ** 2).mean()


class Coupling(nnx.Module):
    """One half moves the other."""

    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        a, b = jnp.split(x, 2, axis=-1)
        shift, scale = jnp.split(self.fc2(nnx.tanh(self.fc1(a))), 2, axis=-1)
        scale = jnp.tanh(scale)
        return jnp.concatenate([b * jnp.exp(scale) + shift, a], axis=-1), scale.sum(-1)


class RealNVP(nnx.Module):
    """An invertible network: what it makes of the data, and the logarithm of its Jacobian's determinant (N,)."""

    def __init__(self, rngs):
        self.layers = nnx.List([Coupling(rngs) for _ in range(3)])

    def __call__(self, x):
        total = jnp.zeros(len(x), x.dtype)
        for layer in self.layers:
            x, change = layer(x)
            total = total + change
        return x, total


class Discriminator(nnx.Module):
    """Convolutions whose weights are divided by their largest singular value."""

    def __init__(self, rngs):
        def conv(n, m):
            return nnx.Conv(n, m, (3, 3), strides=2, rngs=rngs)

        self.conv1, self.conv2 = (nnx.SpectralNorm(conv(*widths), rngs=rngs) for widths in ((3, 4), (4, 6)))
        self.head = nnx.SpectralNorm(nnx.Linear(24, 1, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        x = nnx.leaky_relu(self.conv1(x, update_stats=True))
        x = nnx.leaky_relu(self.conv2(x, update_stats=True))
        return self.head(x.reshape(len(x), -1), update_stats=True)


class PixelCNN(nnx.Module):
    """Convolutions whose masks hide what comes later."""

    def __init__(self, rngs):
        def conv(n, m, centre):
            return nnx.Conv(n, m, (3, 3), mask=self.mask(n, m, centre), rngs=rngs)

        self.conv1, self.conv2 = conv(1, 4, 0.0), conv(4, 4, 1.0)
        self.head = nnx.Conv(4, 3, (1, 1), rngs=rngs)

    @staticmethod
    def mask(n, m, centre):
        """Ones above, and to the left."""
        rows = jnp.array([[1.0, 1.0, 1.0], [1.0, centre, 0.0], [0.0, 0.0, 0.0]])
        return jnp.broadcast_to(rows[..., None, None], (3, 3, n, m))

    def __call__(self, x):
        return self.head(nnx.relu(self.conv2(nnx.relu(self.conv1(x)))))


class Generator(nnx.Module):
    """A style scales the convolution's weights for each image, which are then normalised."""

    def __init__(self, rngs):
        self.style = nnx.Sequential(nnx.Linear(3, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 4, rngs=rngs))
        self.base = nnx.Param(jax.random.normal(rngs.params(), (1, 4, 4, 4)))
        self.kernel = nnx.Param(0.2 * jax.random.normal(rngs.params(), (3, 3, 4, 4)))
        self.head = nnx.Conv(4, 3, (1, 1), rngs=rngs)

    def __call__(self, z):
        kernels = self.kernel[...] * (1 + self.style(z))[:, None, None, :, None]
        kernels = kernels / jnp.sqrt((kernels**2).sum((1, 2, 3), keepdims=True) + 1e-6)

        def convolve(kernel):
            return jax.lax.conv_general_dilated(
                self.base[...], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )[0]

        return self.head(nnx.relu(jax.vmap(convolve)(kernels)))


def vectors():
    """A batch of four."""
    return (inputs(4, 6),)


def noisy():
    """Vectors, times and where noise comes from."""
    return inputs(4, 6), jnp.linspace(0.1, 1.0, 4), nnx.Rngs(noise=0)


def patches():
    """Patches, times and labels."""
    return inputs(4, 4, 6), jnp.linspace(0.1, 1.0, 4), tokens(4, below=5)


DENOISER = ("time", "fc1", "fc2")
MODELS = (
    Model("DiT", DiT, patches, ("patches", "time", "label", "blocks/*")),
    Model(
        "VAE, own KL variable",
        VAE,
        vectors,
        ("encoder", "mean", "log_var", "decoder/layers/0"),
        logits=lambda out: out[0],
    ),
    Model("VQ-VAE, straight through", VQVAE, vectors, ("enter", "encode", "decode")),
    Model("diffusion step", Denoiser, noisy, DENOISER, method="noise_of", logits=lambda out: out[0]),
    Model("diffusion loss", Denoiser, noisy, DENOISER, method="loss"),
    # What the last coupling returns is the logits; it learns exactly but for its first layer.
    Model("RealNVP", RealNVP, vectors, ("layers/0", "layers/1", "layers/2/fc1"), logits=lambda out: out[0]),
    Model("discriminator with spectral norm", Discriminator, lambda: (inputs(4, 8, 8, 3),), ("conv1", "conv2")),
    Model("PixelCNN, masked convolutions", PixelCNN, lambda: (inputs(4, 5, 5, 1),), ("conv1", "conv2")),
    Model(
        "StyleGAN, modulated convolution",
        Generator,
        lambda: (inputs(4, 3),),
        ("style", "base", "input of head"),
        allow=("base",),
    ),
)
