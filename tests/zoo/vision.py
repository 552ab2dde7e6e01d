"""Vision models: convolutions, shortcuts of every kind, patches."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.model import Model, inputs


class ResidualBlock(nnx.Module):
    """Two convolutions with batch norms; the shortcut is a convolution where the shape changes."""

    def __init__(self, n, m, stride, rngs):
        self.conv1 = nnx.Conv(n, m, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(m, rngs=rngs)
        self.conv2 = nnx.Conv(m, m, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(m, rngs=rngs)
        self.shortcut = nnx.Conv(n, m, (1, 1), strides=stride, rngs=rngs) if stride > 1 else None

    def __call__(self, x, *, train):
        h = nnx.relu(self.norm1(self.conv1(x), use_running_average=not train))
        h = self.norm2(self.conv2(h), use_running_average=not train)
        return nnx.relu(h + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """Whether it trains is a keyword without default."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(4, 4, 1, rngs), ResidualBlock(4, 6, 2, rngs)])
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x, *, train):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(x.mean((1, 2)))


class ViTBlock(nnx.Module):
    """Norm, attention, norm, perceptron."""

    def __init__(self, width, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(width, 12, rngs=rngs), nnx.Linear(12, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x))))


class ViT(nnx.Module):
    """Patches, a class token and positions that are parameters of the model itself."""

    def __init__(self, rngs, width=8):
        self.patches = nnx.Conv(3, width, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.token = nnx.Param(0.1 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (1, 5, width)))
        self.blocks = nnx.List([ViTBlock(width, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 5, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), 4, -1)
        token = jnp.broadcast_to(self.token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class ConvNeXtBlock(nnx.Module):
    """Depthwise convolution, norm, wide perceptron, layer scale, shortcut."""

    def __init__(self, width, rngs):
        self.depthwise = nnx.Conv(width, width, (3, 3), feature_group_count=width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 8, rngs=rngs), nnx.Linear(8, width, rngs=rngs)
        self.gamma = nnx.Param(0.3 * jnp.ones(width))

    def __call__(self, x):
        h = self.down(nnx.gelu(self.up(self.norm(self.depthwise(x)))))
        return x + self.gamma * h


class ConvNeXt(nnx.Module):
    """Stem, two stages, a norm before each change of resolution."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (2, 2), strides=2, rngs=rngs)
        self.stem_norm = nnx.LayerNorm(4, rngs=rngs)
        self.stage1 = nnx.Sequential(ConvNeXtBlock(4, rngs), ConvNeXtBlock(4, rngs))
        self.reduce = nnx.Sequential(nnx.LayerNorm(4, rngs=rngs), nnx.Conv(4, 6, (2, 2), strides=2, rngs=rngs))
        self.stage2 = nnx.Sequential(ConvNeXtBlock(6, rngs))
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stage2(self.reduce(self.stage1(self.stem_norm(self.stem(x)))))
        return self.head(self.norm(x.mean((1, 2))))


class MBConv(nnx.Module):
    """Inverted bottleneck: expand, depthwise, squeeze and excite, project."""

    def __init__(self, n, rngs, wide=8):
        def conv(n, m, size, **kwargs):
            return nnx.Conv(n, m, (size, size), use_bias=False, rngs=rngs, **kwargs)

        self.expand, self.depthwise = conv(n, wide, 1), conv(wide, wide, 3, feature_group_count=wide)
        self.squeeze, self.excite = nnx.Linear(wide, 2, rngs=rngs), nnx.Linear(2, wide, rngs=rngs)
        self.project = conv(wide, n, 1)
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for width in (wide, wide, n)])

    def __call__(self, x):
        h = nnx.silu(self.norms[0](self.expand(x)))
        h = nnx.silu(self.norms[1](self.depthwise(h)))
        h = h * nnx.sigmoid(self.excite(nnx.silu(self.squeeze(h.mean((1, 2), keepdims=True)))))
        return x + self.norms[2](self.project(h))


class EfficientNet(nnx.Module):
    """A stem, two inverted bottlenecks, a head with dropout."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        self.blocks = nnx.Sequential(MBConv(4, rngs), MBConv(4, rngs))
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.blocks(nnx.silu(self.stem(x))).mean((1, 2))))


class DenseNet(nnx.Module):
    """Every layer reads what all before it have made."""

    def __init__(self, rngs, layers=3, growth=3):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        widths = [4 + growth * i for i in range(layers)]
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for width in widths])
        self.layers = nnx.List([nnx.Conv(width, growth, (3, 3), rngs=rngs) for width in widths])
        self.head = nnx.Linear(4 + growth * layers, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = jnp.concatenate([x, layer(nnx.relu(norm(x)))], axis=-1)
        return self.head(nnx.avg_pool(x, (2, 2), strides=(2, 2)).mean((1, 2)))


class UNet(nnx.Module):
    """Down, through, up; what was made on the way down is read on the way up."""

    def __init__(self, rngs):
        self.down1, self.down2 = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.middle = nnx.Conv(6, 6, (3, 3), rngs=rngs)
        self.rise2 = nnx.ConvTranspose(6, 6, (2, 2), strides=(2, 2), rngs=rngs)
        self.up2 = nnx.Conv(12, 4, (3, 3), rngs=rngs)
        self.rise1 = nnx.ConvTranspose(4, 4, (2, 2), strides=(2, 2), rngs=rngs)
        self.up1 = nnx.Conv(8, 4, (3, 3), rngs=rngs)
        self.head = nnx.Conv(4, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        def pool(h):
            return nnx.max_pool(h, (2, 2), strides=(2, 2))

        one = nnx.relu(self.down1(x))
        two = nnx.relu(self.down2(pool(one)))
        x = nnx.relu(self.middle(pool(two)))
        x = nnx.relu(self.up2(jnp.concatenate([self.rise2(x), two], axis=-1)))
        return self.head(nnx.relu(self.up1(jnp.concatenate([self.rise1(x), one], axis=-1))))


class MixerBlock(nnx.Module):
    """Mixes tokens, then channels."""

    def __init__(self, tokens, width, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.tokens = nnx.Linear(tokens, tokens, rngs=rngs)
        self.channels = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        x = x + nnx.gelu(self.tokens(self.norm1(x).swapaxes(1, 2))).swapaxes(1, 2)
        return x + nnx.gelu(self.channels(self.norm2(x)))


class Mixer(nnx.Module):
    """Patches, mixers in a plain Python dict of modules, a head on the mean."""

    def __init__(self, rngs, width=6):
        self.patches = nnx.Conv(3, width, (4, 4), strides=4, rngs=rngs)
        self.blocks = nnx.Dict({"a": MixerBlock(4, width, rngs), "b": MixerBlock(4, width, rngs)})
        self.head = nnx.Linear(width, 5, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), 4, -1)
        return self.head(self.blocks["b"](self.blocks["a"](x)).mean(1))


def images():
    """A batch of four."""
    return (inputs(4, 8, 8, 3),)


LAYERS = ("down1", "down2", "middle", "rise2", "up2", "rise1", "up1")
MODELS = (
    Model("ResNet, keyword-only train", ResNet, images, ("stem", "blocks/*"), kwargs=lambda: {"train": True}),
    Model("ViT", ViT, images, ("patches", "token", "positions", "blocks/*")),
    Model("ConvNeXt", ConvNeXt, images, ("stem_norm", "stage1/layers/*", "reduce", "stage2/layers/*", "norm")),
    Model("EfficientNet", EfficientNet, images, ("stem", "blocks/layers/*")),
    Model("DenseNet", DenseNet, images, ("stem", "norms/*", "layers/*")),
    Model("U-Net", UNet, images, LAYERS),
    Model("MLP-Mixer", Mixer, images, ("patches", "blocks/*")),
)
