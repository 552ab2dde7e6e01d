"""Local losses: closed forms in a dense and a convolutional network, by NumPy alone; what crosses no tap; refusals."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfa
from jaxfa.rules.auglocal import redrawn, sampled
from jaxfa.rules.predsim import halved
from jaxfa.rules.shared.local import pool
from jaxfa.rules.shared.targets import targets

RULES = {
    "local_classifier": jaxfa.local_classifier(pool=2),
    "predsim": jaxfa.predsim(pooled=20),
    "auglocal": jaxfa.auglocal(depth=1),
}
N, C = 6, 3
every_case = pytest.mark.parametrize(("name", "kind"), list(itertools.product(RULES, ("dense", "conv"))))


# --- by NumPy ---------------------------------------------------------------------------------------------------------


def softmax_error(logits, y):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True) - y) / len(y)


def convolve(x, w):
    """3 x 3, padded with zeros; and the function that sends an error back: to ``x`` and to ``w``."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = {(a, b): np.s_[:, a : a + height, b : b + width] for a in range(3) for b in range(3)}

    def back(d):
        dx, dw = np.zeros_like(padded), np.zeros_like(w)
        for (a, b), window in windows.items():
            dx[window] += d @ w[a, b].T
            dw[a, b] = np.einsum("nhwi,nhwo->io", padded[window], d)
        return dx[:, 1:-1, 1:-1], dw

    return sum(padded[window] @ w[ab] for ab, window in windows.items()), back


def linear(x, w):
    return x @ w, lambda d: (d @ w.T, x.T @ d)


def averaged(h, sides):
    """Means over windows that divide the map; an activation without pixels as it is."""
    if h.ndim == 2:
        return h, lambda d: d
    n, height, width, channels = h.shape
    a, b = height // sides[0], width // sides[1]
    means = h.reshape(n, sides[0], a, sides[1], b, channels).mean((2, 4))
    return means, lambda d: np.repeat(np.repeat(d, a, 1), b, 2) / (a * b)


def classify(h, sides, f, y, weight=1.0):
    """The error and what a classifier learns."""
    means, spread = averaged(h, sides)
    flat = means.reshape(len(h), -1)
    d = weight * softmax_error(flat @ f.w + f.b, y)
    return spread((d @ f.w.T).reshape(means.shape)), {"w": flat.T @ d, "b": d.sum(0)}


def similarities(z):
    centred = z - z.mean(1, keepdims=True)
    norms = np.sqrt((centred**2).sum(1, keepdims=True))
    return centred / (norms + 1e-8), centred, norms


def deviations(z):
    pixels = z.reshape(len(z), -1, z.shape[-1])
    off = pixels - pixels.mean(1, keepdims=True)
    found = np.sqrt((off**2).sum(1) / (off.shape[1] - 1))
    return found, lambda d: ((d / found)[:, None] * off / (off.shape[1] - 1)).reshape(z.shape)


def match(h, f, y, weight):
    z, back = (convolve if h.ndim == 4 else linear)(h, np.asarray(f.s))
    flat, spread = deviations(z) if h.ndim == 4 else (z, lambda d: d)
    (unit, centred, norms), (wanted, _, _) = similarities(flat), similarities(y)
    d = 4 * weight * (unit @ unit.T - wanted @ wanted.T) @ unit / len(y) ** 2
    d = d / (norms + 1e-8) - centred * (centred * d).sum(1, keepdims=True) / norms / (norms + 1e-8) ** 2
    dh, ds = back(spread(d - d.mean(1, keepdims=True)))
    return dh, {"s": ds}


def augmented(h, f, y):
    """One block, if there is one above, behind means and a map of channels; then the mean over pixels."""
    chain = []
    for params, adapter, sides in zip(f.params, f.adapters, f.sides, strict=True):
        h, back = averaged(h, sides)
        chain.append(back)
        h, back = (h, None) if adapter is None else mapped(h, np.asarray(adapter))
        chain.append(back)
        a, back = (convolve if h.ndim == 4 else linear)(h, np.asarray(params["w"]))
        h = np.tanh(a)
        chain.append((back, 1 - h**2))
    d, signal = classify(h, (1, 1), f, y)
    for (back, slope), adapt, spread in zip(*[iter(chain[::-1])] * 3, strict=True):
        d, signal["params"] = back(d * slope)
        if adapt is not None:
            d, signal["adapters"] = adapt(d)
        d = spread(d)
    return d, signal


def mapped(h, w):
    return h @ w, lambda d: (d @ w.T, h.reshape(-1, h.shape[-1]).T @ d.reshape(-1, d.shape[-1]))


def by_hand(name, f, h, y):
    if name == "predsim":
        (dh, one), (dm, other) = classify(h, f.sides, f, y, 1 - f.beta), match(h, f, y, f.beta)
        return dh + dm, one | other
    return classify(h, f.sides, f, y) if name == "local_classifier" else augmented(h, f, y)


# --- the networks -----------------------------------------------------------------------------------------------------


def operation(kind):
    return (lambda x, w: x @ w) if kind == "dense" else jaxfa.conv


def block(x, w):
    """As a rule is told of it."""
    return jnp.tanh((jaxfa.conv if x.ndim == 4 else jnp.matmul)(x, w[0]["w"]))


def network(name, kind):
    """Inputs, labels, the weights of two tapped layers and a head, and the feedback."""
    rng = np.random.default_rng(0)
    sizes = (5, 4, 6, C) if kind == "dense" else (2, 5, 4, C)
    window = () if kind == "dense" else (3, 3)
    weights = [jnp.asarray(rng.normal(size=(*window, n, m)) / np.sqrt(n)) for n, m in itertools.pairwise(sizes[:-1])]
    weights.append(jnp.asarray(rng.normal(size=sizes[-2:])))
    x = jnp.asarray(rng.normal(size=(N, 4, 4, sizes[0])[: 4 if window else 1] + (() if window else sizes[:1])))
    labels = jnp.asarray([0, 1, 2, 1, 0, 1])
    logits = jnp.zeros((N, C))
    hs = hidden(kind, weights, x)
    # The block above sees a smaller map of fewer channels: the tapped one is averaged, and mapped.
    seen = jax.ShapeDtypeStruct((*((N, 2, 2) if window else (N,)), 3), x.dtype)
    above = (jaxfa.Layer(block, seen, ({"w": jnp.asarray(rng.normal(size=(*window, 3, 4)))}, {})),)
    known = [{"above": above, "below": 0}, {"above": (), "below": 1}] if name == "auglocal" else [{}, {}]
    keys = jax.random.split(jax.random.PRNGKey(0))
    feedback = [RULES[name].init(k, h, logits, **own) for k, h, own in zip(keys, hs, known, strict=True)]
    nudged = [jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape), f) for f in feedback]  # some start at zero
    return x, labels, weights, nudged


def hidden(kind, weights, x):
    first = jnp.tanh(operation(kind)(x, weights[0]))
    return first, jnp.tanh(operation(kind)(first, weights[1]))


def loss(weights, feedback, kind, x, labels):
    wire = jaxfa.error_wire(jnp.zeros((N, C)))
    h = x
    for w, f in zip(weights, feedback, strict=False):
        h, wire = jaxfa.direct(jnp.tanh(operation(kind)(h, w)), wire, f)
    logits = (h.mean((1, 2)) if kind == "conv" else h) @ weights[-1] + wire
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)


def expected(name, kind, data, weights, feedback):
    """Gradients and signals; what a layer hands on to the one below is dropped."""
    x, labels = data
    y, forward = np.eye(C)[np.asarray(labels)], linear if kind == "dense" else convolve
    h, grads, signals = np.asarray(x), [], []
    for w, f in zip(weights, jax.tree.map(np.asarray, feedback), strict=False):
        a, back = forward(h, np.asarray(w))
        h = np.tanh(a)
        dh, signal = by_hand(name, f, h, y)
        grads.append(back(dh * (1 - h**2))[1])
        signals.append(signal)
    means = h.mean((1, 2)) if kind == "conv" else h
    return [*grads, means.T @ softmax_error(means @ np.asarray(weights[-1]), y)], signals


def leaves(signal):
    """A signal by the names of NumPy's."""
    found = {name: value for name, value in vars(signal).items() if name in ("w", "b", "s")}
    if getattr(signal, "params", ()):
        found |= {"params": signal.params[0]["w"], "adapters": signal.adapters[0]}
    return found


@every_case
def test_in_a_network_it_is_the_closed_form(name, kind, x64):
    x, labels, weights, feedback = network(name, kind)
    got, signals = gradient(weights, feedback, kind, x, labels)
    want, wanted = expected(name, kind, (x, labels), weights, feedback)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)
    for signal, one in zip(signals, wanted, strict=True):
        assert leaves(signal).keys() == one.keys()
        for leaf, value in leaves(signal).items():
            np.testing.assert_allclose(value, one[leaf], rtol=1e-9, atol=1e-12)
            assert np.abs(value).max() > 1e-4
    # The control: other targets, or what backpropagation brings, is something else.
    other, _ = expected(name, kind, (x, labels[::-1]), weights, feedback)
    true, _ = gradient(weights, [None, None], kind, x, labels)
    for wrong in (other, true):
        assert all(np.linalg.norm(a - b) > 0.02 * np.linalg.norm(b) for a, b in zip(got[:2], wrong[:2], strict=True))


@every_case
def test_nothing_comes_down_through_a_tap(name, kind, x64):
    x, labels, weights, feedback = network(name, kind)
    moved = [weights[0], 1.1 * weights[1], weights[2]]
    other = [feedback[0], jax.tree.map(lambda a: 2 * a, feedback[1])]
    (first, *_), (signal, _) = gradient(weights, feedback, kind, x, labels)
    (again, *_), (same, _) = gradient(moved, other, kind, x, labels)
    jax.tree.map(np.testing.assert_array_equal, (first, signal), (again, same))
    dfa = [jaxfa.dfa().init(jax.random.PRNGKey(0), h, jnp.zeros((N, C))) for h in hidden(kind, weights, x)]
    control = gradient(weights, dfa, kind, x, labels)[0][0] - gradient(moved, dfa, kind, x, labels)[0][0]
    assert np.abs(control).max() > 1e-4


# --- parts ------------------------------------------------------------------------------------------------------------


def test_windows_are_those_of_adaptive_pooling(x64):
    h = np.arange(2 * 5 * 4 * 3, dtype=float).reshape(2, 5, 4, 3)
    rows = [h[:, :3].mean(1), h[:, 3:].mean(1)]  # 5 rows into 2: each belongs to one window
    np.testing.assert_allclose(pool(jnp.asarray(h), (2, 4)), np.stack(rows, 1), rtol=1e-14)
    np.testing.assert_allclose(pool(jnp.asarray(h), (1, 1))[:, 0, 0], h.mean((1, 2)), rtol=1e-14)


def test_a_map_is_halved_axis_after_axis_as_in_the_papers_code():
    # dim_in_decoder of 4096: 128 channels of 32 x 32 are 8 x 4, one halving of the height first.
    assert halved((32, 32), 128, 4096) == (4, 8)
    assert halved((32, 32), 4, 4096) == (32, 32)
    assert halved((7, 7), 512, 4096) == (2, 4)
    assert halved((), 9000, 4096) == ()


def test_auxiliary_networks_have_the_layers_and_depths_of_the_papers_code():
    # ResNet-32, 16 modules of which 15 are taught locally, by networks/resnet.py and networks/auxiliary_nets.py.
    for depth, pyramid in itertools.product((1, 2, 3, 5), (0.0, 0.5, 1.0)):
        modules = 16
        depths = [
            max(1, round(depth * (1 - i * pyramid / (modules - 2)) + i * pyramid / (modules - 2) * 1))
            for i in range(modules - 1)
        ]
        for layer, own in enumerate(depths):
            deeper = list(range(layer + 1, modules))
            want = deeper if own >= len(deeper) else [
                round(layer + (modules - layer - 1) / own * i) for i in range(1, own + 1)
            ]  # fmt: skip
            found = sampled(len(deeper), layer, depth, pyramid)
            assert [layer + 1 + i for i in found] == want
    assert sampled(0, 15, 3, 0.5) == []


def test_weights_drawn_anew_are_the_same_numbers_elsewhere():
    params = {"w": jnp.arange(20.0).reshape(4, 5), "b": jnp.zeros(5)}
    one, other = (redrawn(jax.random.key(seed), params) for seed in range(2))
    np.testing.assert_array_equal(np.sort(one["w"], None), np.arange(20.0))
    assert not np.array_equal(one["w"], params["w"])
    assert not np.array_equal(one["w"], other["w"])


def test_similarity_has_a_gradient_where_a_unit_or_an_example_is_dead(x64):
    rule = jaxfa.predsim()
    h = jnp.zeros((N, 4, 4, 5)).at[1:].set(1.0).at[2:, 0, 0].set(2.0)
    e = jnp.asarray(softmax_error(np.zeros((N, C)), np.eye(C)[np.arange(N) % C]))
    found = rule.init(jax.random.PRNGKey(0), h, e).learn(h, e)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


# --- targets ----------------------------------------------------------------------------------------------------------

LABELS = np.array([0, 1, 2, 1, 0, 1])
LOGITS = 2 * np.random.default_rng(1).normal(size=(N, C))


def error(objective, logits=LOGITS):
    return jax.grad(lambda z: objective(z, np.eye(C)[LABELS]))(jnp.asarray(logits))


def mean_cross_entropy(logits, y):
    return optax.softmax_cross_entropy(logits, y).mean()


UNTOLD = {
    "smoothed": (lambda z, y: mean_cross_entropy(z, 0.7 * y + 0.1), "does not tell the targets"),
    "mixed": (lambda z, y: mean_cross_entropy(z / 20, 0.6 * y + 0.4 * y[::-1]), "does not tell the targets"),
    "squared": (lambda z, y: jnp.mean((z - y) ** 2), "does not tell the targets"),
    "sigmoid": (lambda z, y: optax.sigmoid_binary_cross_entropy(z, y).mean(), "does not tell the targets"),
    "summed": (lambda z, y: N * mean_cross_entropy(z, y), "say with examples= by what it is divided"),
}


def test_targets_are_told_from_the_error_of_a_mean_cross_entropy(x64):
    h = jnp.ones((N, 4))
    want = np.eye(C)[LABELS]
    for scale in (1, 1e-3, 5):
        np.testing.assert_array_equal(targets(h, error(mean_cross_entropy, scale * LOGITS), N), want)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        np.testing.assert_array_equal(targets(h, error(mean_cross_entropy).astype(dtype), N), want)
    # Summed, if it is said; of what is fitted to the last bit there is nothing to tell.
    np.testing.assert_array_equal(targets(h, error(UNTOLD["summed"][0]), 1), want)
    fitted = error(mean_cross_entropy, 1e3 * np.eye(C)[LABELS])
    np.testing.assert_array_equal(targets(h, fitted, N), np.zeros((N, C)))


@pytest.mark.parametrize("name", UNTOLD)
def test_targets_that_an_error_does_not_tell_are_refused(name, x64):
    objective, reason = UNTOLD[name]
    h, e = jnp.ones((N, 4)), error(objective)
    with pytest.raises(ValueError, match=reason):
        targets(h, e, N)
    feedback = jaxfa.local_classifier().init(jax.random.PRNGKey(0), h, e)
    for leaf in jax.tree.leaves(jax.jit(lambda f, h, e: f.learn(h, e))(feedback, h, e)):
        assert np.isnan(leaf).any()


@pytest.mark.parametrize(("h", "e"), [((N, 4), (N, 1)), ((N, 4), (N, 7, C)), ((N, 4), (N, 2, 2, C))])
def test_an_error_of_no_classes_or_of_tokens_that_are_gone_is_refused(h, e):
    with pytest.raises(ValueError, match=r"logits \(N, ..., C\) of two classes or more"):
        targets(jnp.ones(h), jnp.ones(e), N)


def test_arguments_out_of_range_are_refused():
    for make, words in (
        (lambda: jaxfa.local_classifier(pool=0), "pool >= 1"),
        (lambda: jaxfa.local_classifier(examples=0), "examples > 0"),
        (lambda: jaxfa.predsim(beta=1.5), r"beta in \[0, 1\]"),
        (lambda: jaxfa.auglocal(depth=0), "depth >= 1"),
        (lambda: jaxfa.auglocal(pyramid=-1), r"pyramid in \[0, 1\]"),
        (lambda: jaxfa.auglocal().init(jax.random.key(0), jnp.ones((2, 3)), jnp.ones((2, 3))), "by jaxfa.nn.attach"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    layer = jaxfa.Layer(block, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), ({"w": jnp.ones((3, 3, 3, 3))}, {}))
    with pytest.raises(ValueError, match="blocks whose maps do not grow"):
        jaxfa.auglocal().init(jax.random.key(0), jnp.ones((2, 4, 4, 3)), jnp.ones((2, 3)), above=(layer,), below=0)
    one = replace(jaxfa.predsim().init(jax.random.key(0), jnp.ones((2, 3)), jnp.ones((2, 3))), beta=0.5)
    with pytest.raises(ValueError, match="one error alone"):
        one.learn(jnp.ones((1, 3)), jnp.ones((1, 3)))
