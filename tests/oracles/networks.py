"""Networks in NumPy alone, with forward, backward and forward-mode passes by hand."""

from types import SimpleNamespace

import numpy as np


class Dense:
    """``y = x w``."""

    def __call__(self, x, w):
        return x @ w

    def to_input(self, x, w, delta):
        return delta @ w.T

    def to_weights(self, x, w, delta):
        return x.T @ delta


class Conv:
    """A convolution NHWC, HWIO, padded as SAME, as a sum over the window's pixels."""

    def __init__(self, stride):
        self.stride = stride

    def _window(self, x, w):
        """The padded input, and which of its pixels each of the window's sees."""
        sides = [(-(-size // self.stride), size, side) for size, side in zip(x.shape[1:3], w.shape[:2], strict=True)]
        pads = [max((out - 1) * self.stride + side - size, 0) for out, size, side in sides]
        padded = np.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))
        rows, columns = (
            [slice(k, k + (out - 1) * self.stride + 1, self.stride) for k in range(side)] for out, _, side in sides
        )
        seen = {(i, j): (slice(None), a, b) for i, a in enumerate(rows) for j, b in enumerate(columns)}
        inside = (slice(None), *(slice(p // 2, p // 2 + size) for p, (_, size, _) in zip(pads, sides, strict=True)))
        return padded, seen, inside

    def __call__(self, x, w):
        padded, seen, _ = self._window(x, w)
        return sum(padded[pixels] @ w[k] for k, pixels in seen.items())

    def to_input(self, x, w, delta):
        padded, seen, inside = self._window(x, w)
        dx = np.zeros_like(padded)
        for k, pixels in seen.items():
            dx[pixels] += delta @ w[k].T
        return dx[inside]

    def to_weights(self, x, w, delta):
        padded, seen, _ = self._window(x, w)
        dw = np.zeros((*w.shape[:2], x.shape[-1], delta.shape[-1]))
        for k, pixels in seen.items():
            dw[k] = np.tensordot(padded[pixels], delta, ((0, 1, 2), (0, 1, 2)))
        return dw


class Network:
    """Layers with tanh between them, run on one batch, under the mean softmax cross-entropy."""

    def __init__(self, layers, params, x, labels):
        self.layers, self.params, self.labels = layers, params, labels
        self.w = [dense(p["w"]) for p in params]
        self.xs, self.hs = [x], []
        for layer, w, p in zip(layers, self.w, params, strict=True):
            self.xs[-1] = self._shaped(layer, self.xs[-1])
            self.hs.append(layer(self.xs[-1], w) + p["b"])
            self.xs.append(np.tanh(self.hs[-1]))
        logits = self.hs[-1]
        likely = np.exp(logits - logits.max(-1, keepdims=True))
        self.targets = np.eye(logits.shape[-1])[labels]
        self.e = (likely / likely.sum(-1, keepdims=True) - self.targets) / len(x)

    @staticmethod
    def _shaped(layer, x):
        return x.reshape(len(x), -1) if isinstance(layer, Dense) else x

    def slope(self, i):
        return 1 - np.tanh(self.hs[i]) ** 2

    def back(self, i, w, delta):
        """An error at layer i's output, at its input, with ``w`` in its weights' place."""
        return self.layers[i].to_input(self.xs[i], w, delta)

    def derivative(self, tangents):
        """The logits' derivative along perturbations of the inputs of the last layers, as many as there are."""
        first = len(self.layers) - len(tangents)
        moved = self.layers[first](tangents[0], self.w[first])
        for i, tangent in enumerate(tangents[1:], first + 1):
            x = tangent + self._shaped(self.layers[i], self.slope(i - 1) * moved)
            moved = self.layers[i](x, self.w[i])
        return moved

    def learn(self, reference, feedback):
        """Gradients of weights and biases, and learning signals, of all layers; ``feedback[i]`` is at ``xs[i]``."""
        grads, signals, delta = [], [], self.e
        for i in reversed(range(len(self.layers))):
            dw = self.layers[i].to_weights(self.xs[i], self.w[i], delta)
            grads.insert(0, {"w": factored(self.params[i]["w"], dw), "b": delta.reshape(-1, delta.shape[-1]).sum(0)})
            if i:
                error, signal = reference(self, i, feedback[i], delta, self.e)
                signals.insert(0, signal)
                delta = error.reshape(self.hs[i - 1].shape) * self.slope(i - 1)
        return grads, signals


def four(shape):
    """A dense layer's weights are a convolution's with a window of one pixel."""
    return shape if len(shape) == 4 else (1, 1, *shape)


def dense(w):
    """``w_ijnm = sum_r u_inr s_r v_jmr``, of weights that are factors."""
    if not hasattr(w, "u"):
        return w
    i, j, n, m = four(w.shape)
    return np.einsum("inr,r,jmr->ijnm", w.u.reshape(i, n, -1), w.s, w.v.reshape(j, m, -1)).reshape(w.shape)


def factored(w, dw):
    """The gradient of each factor, by the chain rule from that of the product."""
    if not hasattr(w, "u"):
        return dw
    i, j, n, m = four(w.shape)
    u, v, dw = w.u.reshape(i, n, -1), w.v.reshape(j, m, -1), dw.reshape(i, j, n, m)
    return {
        "u": np.einsum("ijnm,r,jmr->inr", dw, w.s, v).reshape(w.u.shape),
        "s": np.einsum("ijnm,inr,jmr->r", dw, u, v),
        "v": np.einsum("ijnm,inr,r->jmr", dw, u, w.s).reshape(w.v.shape),
    }


def plain(tree):
    """A feedback or factors as a namespace of NumPy arrays; lists and dictionaries of these."""
    if hasattr(tree, "__dataclass_fields__"):
        return SimpleNamespace(**{name: plain(getattr(tree, name)) for name in tree.__dataclass_fields__})
    if isinstance(tree, dict):
        return {name: plain(one) for name, one in tree.items()}
    if isinstance(tree, list):
        return [plain(one) for one in tree]
    return np.asarray(tree) if hasattr(tree, "dtype") else tree
