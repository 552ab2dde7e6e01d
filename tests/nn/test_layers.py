"""Every Flax layer that contracts with weights: the forward bit for bit, the backward by the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from jaxfa.nn.weights.contraction import sites_of
from jaxfa.rules.shared.lowrank import LowRank
from tests.networks import TRAINED


class Pair(nnx.Module):
    """A dense layer under the layer in question, so that the latter has an error to pass on."""

    def __init__(self, layer, width, rngs):
        self.below = nnx.Linear(width, width, rngs=rngs)
        self.layer = layer

    def __call__(self, x):
        return self.layer(jnp.tanh(self.below(x)))


class OwnDot:
    """A product that a user puts in place of JAX's."""

    def __call__(self, *args, **kwargs):
        return jax.lax.dot_general(*args, **kwargs)


def conv(dims, **kwargs):
    return lambda rngs: nnx.Conv(4, 8, (3,) * dims, rngs=rngs, **kwargs)


def transposed(dims, **kwargs):
    return lambda rngs: nnx.ConvTranspose(4, 8, (3,) * dims, rngs=rngs, **kwargs)


# name: (the layer, the input's shape)
LAYERS = {
    "linear": (lambda rngs: nnx.Linear(4, 8, rngs=rngs), (3, 4)),
    "linear, no bias, extra axes": (lambda rngs: nnx.Linear(4, 8, use_bias=False, rngs=rngs), (3, 2, 5, 4)),
    "linear, bfloat16": (lambda rngs: nnx.Linear(4, 8, dtype=jnp.bfloat16, rngs=rngs), (3, 4)),
    "general": (lambda rngs: nnx.LinearGeneral(4, (2, 3), rngs=rngs), (3, 4)),
    "general, two axes": (lambda rngs: nnx.LinearGeneral((5, 4), (2, 3), axis=(-2, -1), rngs=rngs), (3, 5, 4)),
    "general, batch axis": (lambda rngs: nnx.LinearGeneral(4, 2, batch_axis={0: 3}, rngs=rngs), (3, 5, 4)),
    "general, own class": (lambda rngs: nnx.LinearGeneral(4, 8, dot_general_cls=OwnDot, rngs=rngs), (3, 4)),
    "einsum": (lambda rngs: nnx.Einsum("nta,hab->nthb", (8, 4, 2), (8, 2), rngs=rngs), (3, 5, 4)),
    "einsum, outputs first": (lambda rngs: nnx.Einsum("na,ba->nb", (2, 4), rngs=rngs), (3, 4)),
    "einsum, outputs apart": (lambda rngs: nnx.Einsum("nta,hab->nhtb", (8, 4, 2), rngs=rngs), (3, 5, 4)),
    "einsum, ellipsis": (lambda rngs: nnx.Einsum("...a,ab->...b", (4, 2), rngs=rngs), (3, 5, 4)),
    "einsum, batch axis moved": (lambda rngs: nnx.Einsum("nh...a,hab->nb...h", (5, 4, 2), rngs=rngs), (3, 5, 2, 4)),
    "einsum, batch axis": (lambda rngs: nnx.Einsum("nha,hab->nhb", (5, 4, 2), rngs=rngs), (3, 5, 4)),
    "conv 1-D, causal": (conv(1, padding="CAUSAL"), (3, 7, 4)),
    "conv 2-D": (conv(2), (3, 6, 6, 4)),
    "conv, strided": (conv(2, strides=2), (3, 6, 6, 4)),
    "conv, dilated, valid": (conv(2, kernel_dilation=2, padding="VALID"), (3, 7, 7, 4)),
    "conv, circular": (conv(2, padding="CIRCULAR"), (3, 6, 6, 4)),
    "conv, grouped": (conv(2, feature_group_count=2), (3, 6, 6, 4)),
    "conv, depthwise": (conv(2, feature_group_count=4), (3, 6, 6, 4)),
    "conv 3-D": (conv(3), (2, 4, 4, 4, 4)),
    "conv, extra batch axis": (conv(2), (2, 2, 6, 6, 4)),
    "conv transpose 1-D": (transposed(1), (3, 6, 4)),
    "conv transpose, strided": (transposed(2, strides=(2, 2)), (3, 5, 5, 4)),
    "conv transpose, circular": (transposed(2, padding="CIRCULAR"), (3, 6, 6, 4)),
    "conv transpose, transposed kernel": (
        lambda rngs: nnx.ConvTranspose(4, 4, (3, 3), transpose_kernel=True, use_bias=False, rngs=rngs),
        (3, 5, 5, 4),
    ),
}  # fmt: skip


@pytest.fixture(params=LAYERS, name="case")
def make_case(request):
    make, shape = LAYERS[request.param]
    model = Pair(make(nnx.Rngs(0)), 4, nnx.Rngs(1))
    return model, jax.random.normal(jax.random.key(2), shape)


def gradient(model, x):
    """The gradient of a loss whose error differs everywhere."""

    def loss(model):
        y = model(x).astype(jnp.float32)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape)))

    return nnx.grad(loss)(model)


def as_feedback(w):
    return jaxfa.LayerRule(lambda key, kernel: jaxfa.FixedFeedback(kernel * w))


def test_forward_is_bit_identical_and_w_as_feedback_is_backprop(case):
    model, x = case
    aligned = jaxfa.nn.attach(model, as_feedback(1.0), rngs=nnx.Rngs(3), example=x)
    np.testing.assert_array_equal(aligned(x), model(x))
    ours, true = gradient(aligned, x)["model"], gradient(model, x)
    assert jax.tree.structure(ours) == jax.tree.structure(true)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, true)


def test_error_goes_through_the_feedback_and_nothing_else(case):
    model, x = case
    aligned = jaxfa.nn.attach(model, as_feedback(-2.0), rngs=nnx.Rngs(3), example=x)
    ours, true = gradient(aligned, x)["model"], gradient(model, x)
    # The layer's own gradient is true; what is below has received -2 times the true error.
    kernel = ours["layer"]["kernel"][...], true["layer"]["kernel"][...]
    np.testing.assert_allclose(*kernel, rtol=2e-5, atol=2e-5)
    below = ours["below"]["kernel"][...], -2 * true["below"]["kernel"][...]
    np.testing.assert_allclose(*below, rtol=2e-4, atol=2e-4)


def thin_and_wide():
    """Two rules with the same matrix ``q p^T`` of rank 2: one keeps the factors, the other the product."""

    def factors(key, w):
        sides = (w.shape[-1:], w.shape[:-1])
        p, q = (jax.random.normal(k, shape) for k, shape in zip(jax.random.split(key), sides, strict=True))
        p, q = (jnp.stack([a, a**2 - 1], -1) for a in (p, q))
        return LowRank(p, q)

    return jaxfa.LayerRule(factors), jaxfa.LayerRule(lambda key, w: jaxfa.FixedFeedback(factors(key, w).matrix(w)))


def test_a_thin_feedback_sends_back_what_its_product_does(case):
    model, x = case
    thin, wide = (
        gradient(jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(3), example=x), x)["model"] for rule in thin_and_wide()
    )
    tolerance = 0.02 if getattr(model.layer, "dtype", None) == jnp.bfloat16 else 1e-5
    for a, b in zip(jax.tree.leaves(thin), jax.tree.leaves(wide), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
    assert np.linalg.norm(thin["below"]["kernel"][...]) > 0.1


def test_low_rank_feedback_follows_the_weights_of_every_layer(case):
    model, x = case
    rule = jaxfa.ldfa(2, learning_rate=0.0, weight_decay=0.1)
    aligned = jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(3), example=x)
    optimizer = nnx.Optimizer(aligned, jaxfa.optimizer(optax.sgd(0.01), rule), wrt=TRAINED)
    module, site = sites_of(jaxfa.nn.plain(aligned))["layer"]
    feedback = next(m for _, m in nnx.iter_modules(aligned) if getattr(m, "path", "") == "layer").feedback

    def gap():
        factors = feedback.get_value()
        target = np.einsum("b...m,bmr->b...r", *lead(site, site.matrices(module.kernel[...]), factors.p))
        return np.linalg.norm(target - factors.q.reshape(target.shape))

    before = gap()
    gradients = nnx.grad(lambda m: jnp.sum(m(x) ** 2), argnums=nnx.DiffState(0, TRAINED))(aligned)
    optimizer.update(aligned, gradients)
    # In half precision the two products of a step are rounded apart.
    tolerance = 1e-3 if getattr(model.layer, "dtype", None) == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(gap() / before, 0.9, rtol=tolerance)


def lead(site, kernel, p):
    return (kernel, p) if site.view.batch else (kernel[None], p[None])


def test_coverage_lists_both_layers(case):
    model, x = case
    rows = jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(3), example=x).coverage().rows
    assert [(row.layer, row.arrives, row.leaves) for row in rows] == [
        ("below", "through feedback", "not needed: first"),
        ("layer", "exact: last", "through its feedback"),
    ]


def test_plain_is_the_users_model_with_true_gradients_and_forward_mode(case):
    model, x = case
    aligned = jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(3), example=x)
    twin = jaxfa.nn.plain(aligned)
    assert type(twin) is type(model)
    assert type(twin.layer) is type(model.layer)
    jax.tree.map(np.testing.assert_array_equal, gradient(twin, x), gradient(model, x))
    _, tangent = jax.jvp(twin, (x,), (x,))
    assert np.isfinite(tangent.astype(jnp.float32)).all()
    with pytest.raises(TypeError, match=r"no forward mode .* jaxfa\.nn\.plain\(model\)"):
        jax.jvp(aligned, (x,), (x,))


class Einsums(nnx.Module):
    """An einsum that is called with subscripts of its own."""

    def __init__(self, made, called, shape):
        self.below = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.layer = nnx.Einsum(made, shape, rngs=nnx.Rngs(1))
        self.called = called

    def __call__(self, x):
        return self.layer(jnp.tanh(self.below(x)), self.called)


@pytest.mark.parametrize(
    ("made", "called", "shape", "x"),
    [("na,ab->nb", "nta,ab->ntb", (4, 2), (3, 5, 4)), ("nha,hab->nhb", "nha,hab->nbh", (5, 4, 2), (3, 5, 4))],
)
def test_an_einsum_may_be_called_with_other_subscripts_of_the_same_roles(made, called, shape, x):
    model, x = Einsums(made, called, shape), jax.random.normal(jax.random.key(2), x)
    for factor in (1.0, -2.0):
        aligned = jaxfa.nn.attach(model, as_feedback(factor), rngs=nnx.Rngs(3), example=x)
        np.testing.assert_array_equal(aligned(x), model(x))
        below = gradient(aligned, x)["model"]["below"]["kernel"][...], gradient(model, x)["below"]["kernel"][...]
        np.testing.assert_allclose(below[0], factor * below[1], rtol=2e-5, atol=2e-5)


def test_an_einsum_called_with_other_roles_is_refused():
    model, x = Einsums("nha,hab->nhb", "nha,hab->nb", (5, 4, 2)), jnp.ones((3, 5, 4))
    with pytest.raises(ValueError, match="'layer' is called with 'nha,hab->nb'"):
        jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(3), example=x)


@pytest.mark.parametrize("rule", [jaxfa.ldfa({"haed": 1, "*": 2}), jaxfa.ldfa(2, labels="haed")])
def test_a_glob_of_a_rule_that_matches_nothing_is_refused(rule):
    model = Pair(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), 4, nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"the rule's globs=\['haed'\] matches nothing"):
        jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(3), example=jnp.ones((3, 4)))
