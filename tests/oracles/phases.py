"""What some rules do before a step, in NumPy alone, from the papers' equations."""

import math

import numpy as np


def weight_mirror(b, w, layer, x, *, learning_rate, decay):
    """``b <- (1 - decay) b + eta <x y^T>`` with noise ``x`` and its answer ``y``: a mean over a weight's uses."""
    y = layer(x, w)
    return (1 - decay) * b + learning_rate * layer.to_weights(x, w, y) / layer.to_weights(0 * x + 1, w, 0 * y + 1)


def alternating_least_squares(p, q, w):
    """``q``, then ``p``, that bring ``q p^T`` nearest to ``w``, the other held."""
    flat = w.reshape(-1, w.shape[-1])
    q = np.linalg.lstsq(p, flat.T, rcond=None)[0].T
    return np.linalg.lstsq(q, flat, rcond=None)[0].T, q.reshape(*w.shape[:-1], -1)


def jacobian(tangents, moved, tile, scale):
    """Each example's estimate ``p y'^T`` of the Jacobian's mean over the map's tiles; ``tangents`` are ``s p``."""
    shape = tangents.shape[1:]
    counts = [size // side for size, side in zip(shape, tile, strict=True)]
    split = tangents.reshape(len(moved), *(n for pair in zip(counts, tile, strict=True) for n in pair))
    mean = split.mean(tuple(range(1, split.ndim, 2))) / scale
    return np.einsum("bi,bk->bik", mean.reshape(len(moved), -1), moved) / (scale * math.prod(counts))


def moved_by(net, i, dw, db):
    """``tanh'(h) (dW x + db)``: how the activation after layer ``i`` moves with its own weights, ``x`` held."""
    return net.slope(i) * (net.layers[i](net.xs[i], dw) + db)


def kalman(mean, variance, estimates, drift):
    """The textbook's filter of a random walk; ``variance`` is None before the first batch."""
    new, count = estimates.mean(0), len(estimates)
    noise = ((estimates - new) ** 2).sum() / (count * (count - 1))
    if variance is None:
        return new, noise
    prior = variance + drift**2 * max((mean**2).sum() - variance, 0)
    gain = prior / (prior + noise)
    return mean + gain * (new - mean), (1 - gain) * prior


def watch(watched, b, estimates):
    """Means, in which a batch weighs 0.05, of ``<b, J> / |b|`` and of ``|J|^2``, of which the noise's is taken off."""
    new, count = estimates.mean(0), len(estimates)
    noise = ((estimates - new) ** 2).sum() / (count * (count - 1))
    found = (b.ravel() @ new.ravel()) / np.linalg.norm(b), (new**2).sum() - noise
    return 0.95 * watched + 0.05 * np.array(found)


def turn(b, estimate, shape, learning_rate, axis=0, *, normed=True):
    """One step up the sum of the columns' cosines, all of the map counted; then norm 1. The result is a tile again.

    A column belongs to one output; with ``axis`` 1, to one unit. What is not ``normed`` keeps the step's norm.
    """
    columns, goal = (whole(one, shape).reshape(-1, b.shape[-1]) for one in (b, estimate))
    norm, size = (np.linalg.norm(one, axis=axis, keepdims=True) for one in (columns, goal))
    unit = goal / size
    cosines = (columns * unit).sum(axis, keepdims=True) / norm
    columns = columns + learning_rate * (unit - cosines * columns / norm) / norm
    columns = columns / np.linalg.norm(columns, axis=axis, keepdims=True) if normed else columns
    return columns.reshape(*shape, -1)[tuple(slice(side) for side in b.shape[:-1])]


def scales(log_scales, tangents, moved, tiles, rate):
    """Towards the perturbations' scales of least variance; a tangent's squares are its example's power times s^2."""
    square = (moved**2).sum(-1)
    shares = []
    for log_scale, tangent in zip(log_scales, tangents, strict=True):
        power = tangent.reshape(len(moved), -1)[:, 0] ** 2 / math.exp(2 * log_scale) - 1
        shares.append(np.clip((power * square).mean() / (power**2).mean() / square.mean(), -1, 1))
    roots = [math.sqrt(math.prod(tile)) for tile in tiles]
    return [
        log_scale - rate * (share - root / sum(roots) * sum(shares))
        for log_scale, share, root in zip(log_scales, shares, roots, strict=True)
    ]


def whole(tile, shape):
    """A tile, and its outputs, over all of a layer's map."""
    return np.tile(tile, [*(size // side for size, side in zip(shape, tile.shape[:-1], strict=True)), 1])


def mirror(b, noise, moved, rate):
    """``F`` turns by ``rate`` towards ``-<x y^T>``, made as long as itself, with noise ``x`` and its answer ``y``."""
    seen, length = np.einsum("n...,nc->...c", noise, moved) / len(noise), np.linalg.norm(b)
    turned = (1 - rate) * b - rate * length * seen / np.linalg.norm(seen)
    return length * turned / np.linalg.norm(turned)
