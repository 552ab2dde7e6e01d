"""Losses of a layer's own in NumPy: the error at ``h`` and what its heads learn, for one-hot targets ``y``."""

import numpy as np

from tests.oracles.networks import Conv, Dense


def softmax_error(logits, y):
    likely = np.exp(logits - logits.max(-1, keepdims=True))
    return (likely / likely.sum(-1, keepdims=True) - y) / len(y)


def averaged(h, sides):
    """Means over windows that divide the map, an activation without pixels as it is; and the way back."""
    if h.ndim == 2:
        return h, lambda d: d
    n, height, width, channels = h.shape
    a, b = height // sides[0], width // sides[1]
    means = h.reshape(n, sides[0], a, sides[1], b, channels).mean((2, 4))
    return means, lambda d: np.repeat(np.repeat(d.reshape(means.shape), a, 1), b, 2) / (a * b)


def classify(h, sides, f, y, weight=1.0):
    """Cross-entropy of a linear classifier."""
    means, spread = averaged(h, sides)
    flat = means.reshape(len(h), -1)
    d = weight * softmax_error(flat @ f.w + f.b, y)
    return spread(d @ f.w.T), {"w": flat.T @ d, "b": d.sum(0)}


def centred(z):
    off = z - z.mean(1, keepdims=True)
    norms = np.sqrt((off**2).sum(1, keepdims=True))
    return off / (norms + 1e-8), off, norms


def deviations(z):
    """The standard deviations over pixels, and the way back."""
    pixels = z.reshape(len(z), -1, z.shape[-1])
    off = pixels - pixels.mean(1, keepdims=True)
    found = np.sqrt((off**2).sum(1) / (off.shape[1] - 1))
    return found, lambda d: ((d / found)[:, None] * off / (off.shape[1] - 1)).reshape(z.shape)


def match(h, f, y, weight):
    """The mean square of what similarities differ from those of the targets."""
    layer = Conv(1) if h.ndim == 4 else Dense()
    z = layer(h, f.s)
    flat, spread = deviations(z) if h.ndim == 4 else (z, lambda d: d)
    (unit, off, norms), (wanted, _, _) = centred(flat), centred(y)
    d = 4 * weight * (unit @ unit.T - wanted @ wanted.T) @ unit / len(y) ** 2
    d = d / (norms + 1e-8) - off * (off * d).sum(1, keepdims=True) / norms / (norms + 1e-8) ** 2
    d = spread(d - d.mean(1, keepdims=True))
    return layer.to_input(h, f.s, d), {"s": layer.to_weights(h, f.s, d)}


def predsim(h, f, y):
    (dh, one), (dm, other) = classify(h, f.sides, f, y, 1 - f.beta), match(h, f, y, f.beta)
    return dh + dm, one | other


def augmented(h, f, y, layers):
    """Layers with tanh, each behind means and a map of channels; the mean over pixels; a linear classifier."""
    chain = []
    params = [{name: np.asarray(value) for name, value in p.items()} for p in f.params]
    for layer, p, adapter, sides in zip(layers, params, f.adapters, f.sides, strict=True):
        means, spread = averaged(h, sides or (1, 1))
        means = means if sides else means.reshape(len(h), -1)
        x = means if adapter is None else means @ np.asarray(adapter)
        chain.append((layer, p, adapter, means, x, spread))
        h = np.tanh(layer(x, p["w"]) + p.get("b", 0))
        chain[-1] += (1 - h**2,)
    d, signal = classify(h, (1, 1), f, y)
    signal |= {"params": [], "adapters": []}
    for layer, p, adapter, means, x, spread, slope in reversed(chain):
        d = d * slope
        learned = {"w": layer.to_weights(x, p["w"], d), "b": d.reshape(-1, d.shape[-1]).sum(0)}
        signal["params"].insert(0, {name: learned[name] for name in p})
        d, own = layer.to_input(x, p["w"], d), None
        if adapter is not None:
            own = means.reshape(-1, means.shape[-1]).T @ d.reshape(-1, d.shape[-1])
            d = d @ np.asarray(adapter).T
        signal["adapters"].insert(0, own)
        d = spread(d)
    return d, signal
