"""Contractions that a model makes by itself: found in the traced program, forward as they are, backward by the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jaxfa
import jaxfa.nn
from jaxfa.nn.model.program import Example, method_of
from jaxfa.nn.weights.own import weights_of
from jaxfa.nn.weights.survey import own_of, survey
from jaxfa.rules.shared.lowrank import LowRank
from tests.networks import TRAINED


class Own(nnx.Module):
    """Weights, and a function ``(weights, input) -> output`` of the model's own, above a layer that needs an error."""

    def __init__(self, call, shape, width=4):
        rngs = nnx.Rngs(0)
        self.below = nnx.Linear(width, width, param_dtype=float, rngs=rngs)
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.mask = jnp.asarray(np.tri(4, 6))
        self.call = nnx.static(call)

    def __call__(self, x):
        return self.call(self, jnp.tanh(self.below(x)))


def conv(spec, groups=1):
    return lambda s, x: lax.conv_general_dilated(
        x, s.w[...], (1, 1), "SAME", dimension_numbers=spec, feature_group_count=groups
    )


def chosen(x):
    return jnp.argsort(lax.stop_gradient(x)[:, 0]) % 3


def scanned(s, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, s.w[...].astype(x.dtype))[0]


def recurrent(s, x):
    return lax.scan(lambda h, u: (jnp.tanh((h + u) @ s.w[...]),) * 2, jnp.zeros(x[0].shape), x)[1]


def nested(s, x):
    def outer(x, ws):
        return jnp.tanh(lax.scan(lambda x, w: (x @ w, None), x, ws)[0]), None

    return lax.scan(outer, x, s.w[...])[0]


class Normed(nnx.Module):
    """A layer whose weights are normed before use, and have been once, so that they are what feedback is made of."""

    def __init__(self, kind):
        rngs = nnx.Rngs(0)
        self.below = nnx.Linear(4, 4, param_dtype=float, rngs=rngs)
        self.layer = kind(nnx.Linear(4, 6, param_dtype=float, rngs=rngs), param_dtype=float, rngs=rngs)
        for _ in range(200):  # a power iteration
            self.layer(jnp.ones((1, 4)))

    def __call__(self, x):
        return self.layer(jnp.tanh(self.below(x)))


class Adapted(nnx.Module):
    """LoRA in both of its forms, the adapters under training."""

    def __init__(self):
        rngs, options = nnx.Rngs(0), {"param_dtype": float, "rngs": nnx.Rngs(1)}
        self.below = nnx.Linear(4, 4, param_dtype=float, rngs=rngs)
        self.one = nnx.LoRA(4, 2, 4, base_module=nnx.Linear(4, 4, **options), **options)
        self.two = nnx.LoRALinear(4, 6, lora_rank=2, lora_param_dtype=float, **options)
        for lora in (self.one, self.two.lora):
            lora.lora_b[...] = jax.random.normal(rngs.params(), lora.lora_b.shape)

    def __call__(self, x):
        return self.two(jnp.tanh(self.one(jnp.tanh(self.below(x)))))


class Tied(nnx.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        self.embed = nnx.Embed(11, 4, param_dtype=float, rngs=nnx.Rngs(0))
        self.below = nnx.Linear(4, 4, param_dtype=float, rngs=nnx.Rngs(1))

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.below(self.embed(tokens))))


class Masked(nnx.Module):
    """Masked convolutions."""

    def __init__(self):
        options = {"param_dtype": float, "rngs": nnx.Rngs(0)}
        mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 3, 4, 4)), float)
        self.below = nnx.Conv(4, 4, (3, 3), **options)
        self.conv = nnx.Conv(4, 4, (3, 3), mask=mask, **options)
        self.transposed = nnx.ConvTranspose(4, 4, (3, 3), mask=mask, **options)

    def __call__(self, x):
        return self.transposed(jnp.tanh(self.conv(jnp.tanh(self.below(x)))))


ROWS, IMAGE, SEQUENCE = (5, 4), (2, 6, 6, 4), (3, 5, 4)
# name: (what the model does, the weights' shape, the input's, how many times an error passes them)
KINDS = {
    "matmul": (lambda s, x: x @ s.w[...], (4, 6), ROWS, 1),
    "transposed": (lambda s, x: x @ s.w[...].T, (6, 4), ROWS, 1),
    "weights on the left": (lambda s, x: (s.w[...] @ x.T).T, (6, 4), ROWS, 1),
    "one output": (lambda s, x: x @ s.w[...], (4,), SEQUENCE, 1),
    "einsum": (lambda s, x: jnp.einsum("btd,ndh->btnh", x, s.w[...]), (2, 4, 3), SEQUENCE, 1),
    "einsum of heads": (lambda s, x: jnp.einsum("bnd,ndh->bhn", x, s.w[...]), (5, 4, 3), SEQUENCE, 1),
    "vectors of heads": (lambda s, x: jnp.einsum("bnd,nd->bn", x, s.w[...]), (5, 4), SEQUENCE, 1),
    "reshaped": (lambda s, x: x @ s.w[...].reshape(4, 6), (4, 2, 3), ROWS, 1),
    "scaled": (lambda s, x: x @ (s.w[...] * 0.5), (4, 6), ROWS, 1),
    "cast": (lambda s, x: x @ s.w[...].astype(jnp.float32).astype(float), (4, 6), ROWS, 1),
    "gate": (lambda s, x: nnx.silu(x @ s.w[0]) * (x @ s.w[1]), (2, 4, 6), ROWS, 1),
    "normed by hand": (lambda s, x: x @ (s.w[...] / jnp.linalg.norm(s.w[...], axis=0, keepdims=True)), (4, 6), ROWS, 1),
    "masked": (lambda s, x: x @ (s.w[...] * s.mask), (4, 6), ROWS, 1),
    "masked by a choice": (lambda s, x: x @ jnp.where(s.mask > 0, s.w[...], 0.0), (4, 6), ROWS, 1),
    "conv": (conv(("NHWC", "HWIO", "NHWC")), (3, 3, 4, 5), IMAGE, 1),
    "conv, channels first": (
        lambda s, x: conv(("NCHW", "OIHW", "NCHW"))(s, x.transpose(0, 3, 1, 2)), (5, 4, 3, 3), IMAGE, 1
    ),
    "conv, in groups": (conv(("NHWC", "HWIO", "NHWC"), 2), (3, 3, 2, 6), IMAGE, 1),
    "experts, all": (lambda s, x: jnp.einsum("bd,edh->beh", x, s.w[...]), (3, 4, 2), ROWS, 1),
    "experts, mapped": (lambda s, x: jax.vmap(lambda w, x: x @ w)(s.w[...], x), (3, 4, 2), SEQUENCE, 1),
    "experts by index": (lambda s, x: jnp.einsum("bd,bdh->bh", x, s.w[chosen(x)]), (3, 4, 2), ROWS, 1),
    "experts by one-hot": (
        lambda s, x: jnp.einsum("bd,bdh->bh", x, jnp.einsum("be,edh->bdh", jax.nn.one_hot(chosen(x), 3), s.w[...])),
        (3, 4, 2), ROWS, 1,
    ),
    "one of a stack": (lambda s, x: x @ s.w[jnp.int32(x[0, 0] > 9)], (3, 4, 2), ROWS, 1),
    "jit": (lambda s, x: jax.jit(lambda w, x: jnp.tanh(x @ w))(s.w[...], x), (4, 6), ROWS, 1),
    "remat": (lambda s, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(s.w[...], x), (4, 6), ROWS, 1),
    "remat, closed over": (lambda s, x: jax.checkpoint(lambda x: jnp.tanh(x @ s.w[...]))(x), (4, 6), ROWS, 1),
    "cond": (lambda s, x: lax.cond(x[0, 0] < 9, jnp.dot, lambda x, w: 2 * x @ w, x, s.w[...]), (4, 6), ROWS, 1),
    "scan over a stack": (scanned, (3, 4, 4), ROWS, 3),
    "scan in a scan": (nested, (2, 3, 4, 4), ROWS, 6),
    "scan over time": (recurrent, (4, 4), SEQUENCE, None),
}  # fmt: skip


# name: (the model, what goes in, the layers whose error arrives through feedback alone)
LAYERS = {
    "tied head": (Tied, jax.random.randint(jax.random.key(3), (5, 3), 0, 11), {"below": 1, "embed/embedding": 0}),
    "LoRA": (
        Adapted,
        ROWS,
        dict.fromkeys(("below", "one/lora_a", "one/lora_b", "one/base_module"), 0) | {"two/lora/lora_a": 1},
    ),
    "weight norm": (lambda: Normed(nnx.WeightNorm), ROWS, {"below": 1}),
    "spectral norm": (lambda: Normed(nnx.SpectralNorm), ROWS, {"below": 1}),
    "masked convolutions": (Masked, IMAGE, {"below": 2, "conv": 1}),
}


def drawn(size):
    return jax.random.normal(jax.random.key(2), size) if isinstance(size, tuple) else size


@pytest.fixture(params=KINDS, name="case")
def make_case(request, x64):
    call, shape, size, passes = KINDS[request.param]
    return Own(call, shape), drawn(size), passes


@pytest.fixture(params=LAYERS, name="layer")
def make_layer(request, x64):
    make, size, arrivals = LAYERS[request.param]
    return make(), drawn(size), arrivals


def gradient(model, x, **argnums):
    def loss(model):
        y = model(x)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=float).reshape(y.shape)))

    return nnx.grad(loss, **argnums)(nnx.clone(model))


def by_path(gradient):
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(gradient)}


def as_feedback(factor):
    return jaxfa.LayerRule(lambda key, kernel: jaxfa.FixedFeedback(kernel * factor))


def attach(model, rule, x, **options):
    return jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(3), example=x, **options)


def close(a, b, tolerance=1e-10):
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_forward_is_the_models_own_and_the_error_goes_through_the_feedback_alone(case):
    model, x, passes = case
    aligned, scaled = (attach(model, as_feedback(factor), x) for factor in (1.0, -2.0))
    np.testing.assert_array_equal(aligned(x), model(x))
    np.testing.assert_array_equal(nnx.jit(lambda m: m(x))(aligned), nnx.jit(lambda m: m(x))(model))
    true, ours, theirs = (
        by_path(found) for found in (gradient(model, x), *(gradient(a, x)["model"] for a in (aligned, scaled)))
    )
    for path, expected in true.items():
        close(ours[path], expected)  # by the weights themselves
    if passes == 1:
        close(theirs["w"], true["w"])
    if passes is not None:
        close(theirs["below/kernel"], (-2.0) ** passes * true["below/kernel"])
    assert np.linalg.norm(theirs["below/kernel"] - true["below/kernel"]) > 1e-2
    assert [row[:4] for row in aligned.coverage().rows] == [
        ("below", (4, 4), "through feedback", "not needed: first"),
        ("w", model.w.shape, "exact: last" if passes == 1 else "through feedback", "through its feedback"),
    ]


def test_flaxs_layers_that_contract_by_themselves(layer):
    model, x, arrivals = layer
    aligned, scaled, drawn = (attach(model, rule, x) for rule in (as_feedback(1.0), as_feedback(-2.0), jaxfa.fa()))
    np.testing.assert_array_equal(nnx.clone(aligned)(x), nnx.clone(model)(x))
    found = (gradient(model, x), *(gradient(a, x)["model"] for a in (aligned, scaled, drawn)))
    true, ours, theirs, random = map(by_path, found)
    for path, expected in true.items():
        close(ours[path], expected, 1e-8)
    rows = {row.layer: row for row in drawn.coverage().rows}
    for name, passes in arrivals.items():
        path = name if name in true else f"{name}/kernel"
        assert rows[name].arrives == "through feedback"
        assert np.linalg.norm(random[path] - true[path]) > 1e-2
        if passes:
            close(theirs[path], (-2.0) ** passes * true[path], 1e-8)
    assert all(row.feedback for row in rows.values() if row.leaves == "through its feedback")


def contracted(aligned, x):
    """What a model contracts by itself: weights as matrices, and their feedback."""
    seen = survey(aligned.model, method_of("__call__"), Example.of((x,), {})).sites
    return [(weights_of(seen[one.site], one.site), one.feedback.get_value()) for one in own_of(aligned)]


def step(aligned, rule, x):
    optimizer = nnx.Optimizer(aligned, jaxfa.optimizer(optax.sgd(0.01), rule), wrt=TRAINED)
    optimizer.update(aligned, gradient(aligned, x, argnums=nnx.DiffState(0, TRAINED)))


# Where the weights are a function of a parameter that is not linear, no law of the parameter is one of theirs.
EVERY = sorted(KINDS.keys() - {"normed by hand"})
CHOSEN = ("masked", "masked by a choice", "experts by index", "experts by one-hot", "one of a stack")


@pytest.mark.parametrize("name", EVERY)
def test_kolen_pollack_brings_weights_and_feedback_together(name, x64):
    call, shape, size, _ = KINDS[name]
    aligned, x = attach(Own(call, shape), rule := jaxfa.kolen_pollack(weight_decay=0.1), drawn(size)), drawn(size)
    assert len(own_of(aligned)) == (2 if name == "gate" else 1)
    if name == "scaled":  # what the rule sees is the parameter
        np.testing.assert_array_equal(contracted(aligned, x)[0][0], aligned.model.w[...])
    before = [np.asarray(w - feedback.b) for w, feedback in contracted(aligned, x)]
    step(aligned, rule, x)
    decay = 0.9 if len(shape) > 1 else None  # a vector decays no more than a bias does
    for old, (w, feedback) in zip(before, contracted(aligned, x), strict=True):
        if decay:
            np.testing.assert_allclose(w - feedback.b, decay * old, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in CHOSEN and name != "one output"])
def test_low_rank_feedback_follows_the_weights(name, x64):
    call, shape, size, _ = KINDS[name]
    rule = jaxfa.ldfa(2, learning_rate=0.0, weight_decay=0.1)
    aligned, x = attach(Own(call, shape), rule, drawn(size)), drawn(size)

    def gaps():
        return [
            np.linalg.norm(_times(w, one.p) - one.q.reshape(_times(w, one.p).shape))
            for w, one in contracted(aligned, x)
        ]

    before = gaps()
    step(aligned, rule, x)
    np.testing.assert_allclose(np.divide(gaps(), before), 0.9, rtol=1e-9)


def _times(w, p):
    return np.einsum("...nm,...mr->...nr", w.reshape(*p.shape[:-2], -1, w.shape[-1]), p)


def thin_and_wide():
    def factors(key, w):
        p, q = (
            jax.random.normal(k, (*s, 2))
            for k, s in zip(jax.random.split(key), (w.shape[-1:], w.shape[:-1]), strict=True)
        )
        return LowRank(p, q)

    return jaxfa.LayerRule(factors), jaxfa.LayerRule(lambda key, w: jaxfa.FixedFeedback(factors(key, w).matrix(w)))


@pytest.mark.parametrize(
    "name", ["weights on the left", "one output", "einsum of heads", "conv, channels first", "scan over a stack"]
)
def test_a_thin_feedback_sends_back_what_its_product_does(name, x64):
    call, shape, size, _ = KINDS[name]
    found = [gradient(attach(Own(call, shape), rule, drawn(size)), drawn(size)) for rule in thin_and_wide()]
    thin, wide = (by_path(one["model"])["below/kernel"] for one in found)
    close(thin, wide)
    assert np.linalg.norm(thin) > 0.1


@pytest.mark.parametrize("name", CHOSEN)
def test_masked_and_chosen_weights_need_a_matrix(name, x64):
    call, shape, size, _ = KINDS[name]
    with pytest.raises(
        ValueError,
        match=r"'w' .*(masked or chosen by data need a rule whose feedback is a whole matrix|cannot be followed)",
    ):
        attach(Own(call, shape), jaxfa.ldfa(2), drawn(size))


def modulated(s, x):
    return jnp.einsum("bi,bio->bo", x, jnp.expand_dims(s.w[...], 0) * jnp.expand_dims(x, -1))


def spelled_out(s, x):
    return (jnp.expand_dims(x, -1) * jnp.expand_dims(s.w[...], 0)).sum(1)


@pytest.mark.parametrize("call", [modulated, spelled_out])
def test_weights_that_cannot_be_followed_have_a_row_and_are_refused(call, x64):
    model, x = Own(call, (4, 6)), drawn(ROWS)
    with pytest.raises(ValueError, match="'w' is contracted with an activation in a way that cannot be followed"):
        attach(model, jaxfa.fa(), x)
    rows = {row.layer: row for row in attach(model, jaxfa.fa(), x, allow="w").coverage().rows}
    assert rows["w"].leaves == "not followed, allowed"


def test_direct_rules_know_what_they_cannot_follow_and_what_is_inside_a_block(x64):
    call, shape, size, _ = KINDS["experts by index"]
    model = Own(call, shape)
    with pytest.raises(ValueError, match=r"'w' is contracted .* cannot be followed"):
        attach(model, jaxfa.dfa(), drawn(size), at="below", allow="below")
    blocks = nnx.Sequential(
        nnx.Linear(4, 4, param_dtype=float, rngs=nnx.Rngs(0)), model, nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    )
    rows = attach(blocks, jaxfa.dfa(), drawn(size), at=("layers/0", "layers/1")).coverage().rows
    assert {row.layer: row.leaves for row in rows}["layers/1/w"] == "exact inside layers/1"


def test_what_is_looked_up_or_added_learns_exactly_and_says_so(x64):
    class Positions(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(11, 4, param_dtype=float, rngs=nnx.Rngs(0))
            self.positions = nnx.Param(jax.random.normal(jax.random.key(1), (1, 3, 4)))
            self.fc, self.head = (nnx.Linear(4, 4, param_dtype=float, rngs=nnx.Rngs(i)) for i in (1, 2))

        def __call__(self, tokens):
            return self.head(jnp.tanh(self.fc(self.embed(tokens) + self.positions[...])))

    rows = attach(Positions(), jaxfa.fa(), LAYERS["tied head"][1]).coverage().rows
    assert {row.layer: row[2:4] for row in rows if not row.feedback} == {
        "embed/embedding": ("through feedback", "not needed: looked up"),
        "positions": ("through feedback", "exact, entry by entry"),
    }


class Stateful(nnx.Module):
    """Own weights among statistics and dropout."""

    def __init__(self):
        self.fc = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.calls = nnx.Variable(jnp.zeros(()))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(2))
        self.w = nnx.Param(jax.random.normal(jax.random.key(0), (4, 3)))

    def __call__(self, x, *, twice=False):
        y = self.drop(nnx.relu(self.norm(self.fc(x)))) @ self.w[...]
        self.calls[...] += 1
        return (2 * y if twice else y), None


def test_what_a_forward_pass_writes_and_returns_is_kept():
    x = drawn(ROWS)
    models = Stateful(), attach(Stateful(), jaxfa.fa(), x)

    @nnx.jit
    def run(model):
        value = nnx.value_and_grad(lambda m: (m(x, twice=True)[0] ** 2).sum())(model)[0]
        return value, model(x)[0]

    for a, b in zip(*map(run, models), strict=True):
        np.testing.assert_array_equal(a, b)
    states = (
        nnx.state(model, nnx.Not(nnx.Any(jaxfa.nn.Feedback, nnx.RngKey))) for model in (models[0], models[1].model)
    )
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_it_trains_at_chosen_places_by_name():
    x = drawn(ROWS)
    model = Own(*KINDS["gate"][:2])
    aligned = attach(model, rule := jaxfa.ldfa({"w": 2, "*": 1}), x)
    optimizer = nnx.Optimizer(aligned, jaxfa.optimizer(optax.sgd(0.05), rule), wrt=TRAINED)

    @nnx.jit
    def train(aligned, optimizer):
        value, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, TRAINED))(aligned)
        optimizer.update(aligned, grads)
        return value

    values = [train(aligned, optimizer) for _ in range(10)]
    assert values[-1] < values[0]
    np.testing.assert_allclose(jax.vmap(lambda x: aligned(x[None])[0])(x), aligned(x), rtol=1e-5)  # closed over
    with pytest.raises(ValueError, match=r"at=\['v'\] matches nothing; the paths here are \['below', 'w'\]"):
        attach(model, jaxfa.fa(), x, at="v")
    assert len(attach(model, jaxfa.fa(), x, at="w").own["w"]) == 2
    assert [row.leaves for row in attach(model, jaxfa.fa(), x, allow="w").coverage().rows][
        1
    ] == "backpropagation, allowed"


def test_weight_mirrors_find_own_weights(x64):
    call, shape, size, _ = KINDS["scan over a stack"]
    aligned = attach(Own(call, shape), jaxfa.weight_mirror(), x := drawn(size))
    before = jaxfa.nn.weight_angles(aligned)["w"]
    for i in range(10):
        aligned.refine(jax.random.key(i), x)
    after = jaxfa.nn.weight_angles(aligned)["w"]
    assert before.min() > 35 > after.max()


def test_a_call_that_contracts_otherwise_than_the_example_is_refused():
    def either(s, x):
        return x @ (s.w[...] if x.shape[0] == 5 else s.w[...].T)

    aligned = attach(Own(either, (4, 4)), jaxfa.fa(), drawn(ROWS))
    with pytest.raises(ValueError, match="contracts 'w' as the example did not"):
        gradient(aligned, drawn((3, 4)))
