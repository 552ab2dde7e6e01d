"""Local losses: closed forms in a dense and a convolutional network, by NumPy alone; what crosses no tap; refusals."""

import itertools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfa
from jaxfa.rules.auglocal import redrawn, sampled
from jaxfa.rules.predsim import halved
from jaxfa.rules.shared.local import pool
from jaxfa.rules.shared.targets import check_classes, sigmoid_targets, softmax_targets
from tests.oracles import backwards, local
from tests.oracles.networks import Conv, Dense

RULES = {
    "local_classifier": jaxfa.local_classifier(pool=2),
    "predsim": jaxfa.predsim(pooled=20),
    "auglocal": jaxfa.auglocal(depth=1),
}
N, C = 6, 3
every_case = pytest.mark.parametrize(("name", "kind"), list(itertools.product(RULES, ("dense", "conv"))))


def by_hand(name, f, h, y):
    match name:
        case "local_classifier":
            return local.classify(h, f.sides, f, y)
        case "predsim":
            return local.predsim(h, f, y)
        case "auglocal":
            return local.augmented(h, f, y, [Conv(1) if h.ndim == 4 else Dense()] * len(f.params))


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
    logits = jaxfa.with_wire((h.mean((1, 2)) if kind == "conv" else h) @ weights[-1], wire, feedback)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)


def expected(name, kind, data, weights, feedback):
    """Gradients and signals; what a layer hands on to the one below is dropped."""
    x, labels = data
    y, layer = np.eye(C)[np.asarray(labels)], Dense() if kind == "dense" else Conv(1)
    h, grads, signals = np.asarray(x), [], []
    for w, f in zip(weights, jax.tree.map(np.asarray, feedback), strict=False):
        below, h = h, np.tanh(layer(h, np.asarray(w)))
        dh, signal = by_hand(name, f, h, y)
        grads.append(layer.to_weights(below, np.asarray(w), dh * (1 - h**2)))
        signals.append(signal)
    means = h.mean((1, 2)) if kind == "conv" else h
    return [*grads, means.T @ local.softmax_error(means @ np.asarray(weights[-1]), y)], signals


@every_case
def test_in_a_network_it_is_the_closed_form(name, kind, x64):
    x, labels, weights, feedback = network(name, kind)
    got, signals = gradient(weights, feedback, kind, x, labels)
    want, wanted = expected(name, kind, (x, labels), weights, feedback)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)
    for signal, one in zip(signals, wanted, strict=True):
        for path, leaf in jax.tree.leaves_with_path(signal):
            np.testing.assert_allclose(leaf, backwards.at(one, path), rtol=1e-9, atol=1e-12)
            assert np.abs(leaf).max() > 1e-4
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
    # But for the rounding of what an example weighs, which the logits tell.
    chex.assert_trees_all_close((first, signal), (again, same), rtol=1e-12, atol=1e-15)
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
    t = jnp.asarray(-np.eye(C)[np.arange(N) % C] / N)
    found = rule.init(jax.random.PRNGKey(0), h, t).learn(h, t)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


# --- targets ----------------------------------------------------------------------------------------------------------

LABELS = np.array([0, 1, 2, 1, 0, 1])
LOGITS = 2 * np.random.default_rng(1).normal(size=(N, C))
WEIGHTS = np.array([1.0, 0, 2, 0.1, 0, 3])


def error(objective, logits=LOGITS, dtype=float):
    """Logits and their error."""
    logits = jnp.asarray(logits, dtype)
    return logits, jax.grad(lambda z: objective(z, jnp.asarray(np.eye(C)[LABELS], z.dtype)))(logits)


def mean_cross_entropy(logits, y):
    return optax.softmax_cross_entropy(logits, y).mean()


def weighted_cross_entropy(logits, y):
    return optax.softmax_cross_entropy(logits, y) @ jnp.asarray(WEIGHTS, logits.dtype) / WEIGHTS.sum()


def focal(logits, y):
    """Any function of the target's probability gives an example a weight, too."""
    p = jnp.sum(y * jax.nn.softmax(logits), -1)
    return -jnp.mean((1 - p) ** 2 * jnp.log(p))


LIKELY = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
P = LIKELY[np.arange(N), LABELS]
TOLD = {
    "a mean": (mean_cross_entropy, np.full(N, 1 / N)),
    "a sum": (lambda z, y: optax.softmax_cross_entropy(z, y).sum(), np.ones(N)),
    "weights, some of them zero": (weighted_cross_entropy, WEIGHTS / WEIGHTS.sum()),
    "labels as numbers": (
        lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y.argmax(-1)).mean(), np.full(N, 1 / N),
    ),
    "a probability's logarithm": (lambda z, y: -jnp.log((jax.nn.softmax(z) * y).sum(-1)).mean(), np.full(N, 1 / N)),
    "a focal loss": (focal, ((1 - P) ** 2 - 2 * P * (1 - P) * np.log(P)) / N),
}  # fmt: skip
UNTOLD = {
    "smoothed": (lambda z, y: mean_cross_entropy(z, 0.7 * y + 0.1), "does not tell the targets"),
    "smoothed by little": (lambda z, y: mean_cross_entropy(z, 0.997 * y + 0.001), "does not tell the targets"),
    "mixed": (lambda z, y: mean_cross_entropy(z / 20, 0.6 * y + 0.4 * y[::-1]), "does not tell the targets"),
    "squared": (lambda z, y: jnp.mean((z - y) ** 2), "does not tell the targets"),
    "sigmoid": (lambda z, y: optax.sigmoid_binary_cross_entropy(z, y).mean(), "does not tell the targets"),
    "a temperature": (lambda z, y: mean_cross_entropy(z / 2, y), "does not tell the targets"),
    "a penalty on logits": (
        lambda z, y: mean_cross_entropy(z, y) + 0.1 * jnp.mean(jax.nn.logsumexp(z, -1) ** 2),
        "does not tell the targets",
    ),
    "raised": (lambda z, y: -mean_cross_entropy(z, y), "does not tell the targets"),
    "not a number": (lambda z, y: mean_cross_entropy(z.at[0, 0].set(jnp.nan), y), "error is not finite"),
}


@pytest.mark.parametrize("name", TOLD)
def test_an_error_tells_targets_and_what_each_example_weighs(name, x64):
    objective, c = TOLD[name]
    want = -c[:, None] * np.eye(C)[LABELS]
    np.testing.assert_allclose(softmax_targets(*error(objective)), want, rtol=1e-9)
    for dtype, rtol in ((jnp.float32, 1e-4), (jnp.bfloat16, 0.05), (jnp.float16, 0.02)):
        t = softmax_targets(*error(objective, dtype=dtype))
        assert t.dtype == dtype
        np.testing.assert_allclose(t.astype(float), want, rtol=rtol)
        # The loss in single precision, the logits not.
        z, e = error(lambda z, y: objective(z.astype(jnp.float32), y.astype(jnp.float32)), dtype=dtype)
        np.testing.assert_allclose(softmax_targets(z, e).astype(float), want, rtol=rtol)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("scale", [0.01, 1, 6, 30, 200])
@pytest.mark.parametrize(
    ("dtype", "own", "atol"),
    [("float32", "float32", 1e-3), ("bfloat16", "float32", 0.01), ("bfloat16", "bfloat16", 0.2)],
)
def test_no_rounding_hides_a_target_or_changes_its_weight(dtype, own, atol, scale, classes):
    draw, key = jax.random.split(jax.random.key(classes))
    z = (scale * jax.random.normal(draw, (64, classes))).astype(dtype)
    # Half of the examples are right, and are fitted the better the larger the scale.
    one = jnp.where(jnp.arange(64) % 2, z.argmax(-1), jax.random.randint(key, 64, 0, classes))
    several = jax.random.bernoulli(key, 0.3, z.shape).astype(own)

    def softmax(z):
        return optax.softmax_cross_entropy_with_integer_labels(z.astype(own), one).sum()

    def sigmoids(z):
        return optax.sigmoid_binary_cross_entropy(z.astype(own), several).sum()

    def check(loss, reads, y):
        e = jax.grad(loss)(z)
        t = np.asarray(jax.jit(reads)(z, e), float)
        assert np.isfinite(t).all()
        learns = t.any(-1)
        # A sigmoid that is fitted has no error, and no target.
        want = -np.where((e != 0) | (loss is softmax), y, 0)
        np.testing.assert_allclose(t[learns], want[learns], atol=atol)
        return learns

    assert check(softmax, softmax_targets, jax.nn.one_hot(one, classes))[::2].mean() > (0.9 if scale < 30 else 0.4)
    assert check(sigmoids, sigmoid_targets, several).mean() > 0.2


@pytest.mark.parametrize("name", UNTOLD)
def test_targets_that_an_error_does_not_tell_are_refused(name, x64):
    objective, reason = UNTOLD[name]
    h, (z, e) = jnp.ones((N, 4)), error(objective)
    with pytest.raises(ValueError, match=reason):
        softmax_targets(z, e)
    feedback = jaxfa.local_classifier().init(jax.random.PRNGKey(0), h, e)
    for leaf in jax.tree.leaves(jax.jit(lambda f, h, z, e: f.learn(h, softmax_targets(z, e)))(feedback, h, z, e)):
        assert np.isnan(leaf).any()


def test_an_error_that_was_not_read_is_refused(x64):
    h, (z, e) = jnp.ones((N, 4)), error(mean_cross_entropy)
    for rule in (jaxfa.drtp(), jaxfa.local_classifier(), jaxfa.predsim()):
        feedback = rule.init(jax.random.PRNGKey(0), h, e)
        with pytest.raises(ValueError, match=r"given the output error: .* jaxfa.with_wire\(logits, wire, feedback\)"):
            feedback.deliver(h, e)
        assert np.isnan(jax.jit(feedback.deliver)(h, e)).any()
        assert np.isfinite(jax.jit(feedback.deliver)(h, softmax_targets(z, e))).all()
    both = [jaxfa.dfa().init(jax.random.PRNGKey(0), h, e), jaxfa.drtp().init(jax.random.PRNGKey(0), h, e)]
    with pytest.raises(ValueError, match="of DirectMatrix, TargetProjection some need the output error"):
        jaxfa.with_wire(z, jnp.zeros_like(z), both)


@pytest.mark.parametrize(("h", "e"), [((N, 4), (N, 1)), ((N, 4), (N, 7, C)), ((N, 4), (N, 2, 2, C))])
def test_an_error_of_no_classes_or_of_tokens_that_are_gone_is_refused(h, e):
    with pytest.raises(ValueError, match=r"logits \(N, ..., C\) of two classes or more"):
        check_classes(jnp.ones(h), jnp.ones(e))


def test_arguments_out_of_range_are_refused():
    for make, words in (
        (lambda: jaxfa.local_classifier(pool=0), "pool >= 1"),
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
