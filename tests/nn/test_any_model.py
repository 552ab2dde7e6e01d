"""Models as people write them: what they are called with, what they return, hold and write, and how they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxfa
import jaxfa.nn
from jaxfa.nn.taps.tap import taps_of
from tests.networks import inputs

X = inputs(4, 8)
AT = ("a", "b")
dense = nnx.Linear


class Base(nnx.Module):
    """Three layers, two of them tapped."""

    def __init__(self):
        self.a, self.b, self.c = (dense(8, m, rngs=nnx.Rngs(i)) for i, m in enumerate((8, 8, 3)))

    def __call__(self, x):
        return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))


class Buffers(Base):
    """Plain arrays of several kinds as attributes."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift, self.table = jnp.full(8, 2.0), np.ones(8, np.float32), nnx.data([jnp.ones(8)])

    def __call__(self, x):
        return self.c(nnx.relu(self.b(nnx.relu(self.a(x)) * self.scale[None] + self.shift[None] + self.table[0][None])))


class Several(Base):
    """Some outputs that are logits, and some that are none."""

    def __call__(self, x, flag=True):
        h = nnx.relu(self.b(nnx.relu(self.a(x))))
        y = self.c(h)
        return {"logits": y, "step": jnp.arange(3), "cache": None, "value": y.sum(-1), "flag": flag}


class Penalty(nnx.Variable):
    """A variable of the user's own type."""


class Sowing(Base):
    """Writes a penalty of its own type, which the loss reads, and a statistic in a plain array."""

    def __init__(self):
        super().__init__()
        self.mean = jnp.zeros(8)

    def __call__(self, x):
        h = nnx.relu(self.a(x))
        self.penalty = Penalty((h**2).mean())
        self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
        return self.c(nnx.relu(self.b(h)))


class Steps(Base):
    """Called with keywords and objects that have state."""

    def __call__(self, x, *, train, rngs, cache):
        cache.value[...] = x
        x = nnx.Dropout(0.5, deterministic=not train)(x, rngs=rngs)
        return self.c(inputs=nnx.relu(self.b(inputs=nnx.relu(self.a(inputs=x)))))


class Cache(nnx.Module):
    """What a model remembers between calls."""

    def __init__(self):
        self.value = nnx.Variable(jnp.zeros((4, 8)))


class Trees(nnx.Module):
    """Blocks that return a cache, which nothing reads, and a hidden state."""

    def __init__(self):
        self.blocks, self.head = nnx.List([Pair() for _ in range(2)]), dense(8, 3, rngs=nnx.Rngs(9))

    def __call__(self, x):
        caches = []
        for block in self.blocks:
            cache, x = block(x)
            caches.append(cache)
        return self.head(x), caches


class Pair(Base):
    """Returns the inside of its layers, too."""

    def __call__(self, x):
        k = nnx.relu(self.a(x))
        return {"k": k, "length": 3}, nnx.relu(self.b(k))


class Losses(Base):
    """No __call__ is what it is trained by."""

    __call__ = None

    def encode(self, x):
        return nnx.relu(self.b(nnx.relu(self.a(x))))

    def logits(self, x):
        return self.c(self.encode(x))

    def loss(self, x):
        return (self.logits(x) ** 2).sum()


def attach(model, rule, at=None, **kwargs):
    kwargs = {"example": X} | kwargs
    return jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), at=at if jaxfa.base.is_direct(rule) else None, **kwargs)


def learns(gradient):
    return {"/".join(map(str, path[1:])): bool(leaf[...].any()) for path, leaf in nnx.to_flat_state(gradient)}


def square(model, *args, **kwargs):
    return sum((y**2).sum() for y in jax.tree.leaves(model(*args, **kwargs)) if y.dtype == jnp.float32)


both = pytest.mark.parametrize("rule", [jaxfa.fa(), jaxfa.dfa()], ids=["fa", "dfa"])
SCHEDULES = [jaxfa.stacks.stored, jaxfa.stacks.stream]


@both
def test_plain_arrays_are_state(rule):
    aligned = attach(Buffers(), rule, AT)
    np.testing.assert_array_equal(aligned(X), Buffers()(X))
    assert all(learns(nnx.grad(square)(aligned, X)).values())
    assert [row.layer for row in aligned.coverage().rows] == ["a", "b", "c"]


@both
def test_what_is_no_array_of_floats_is_no_output(rule):
    aligned = attach(Several(), rule, AT)
    out, want = aligned(X), Several()(X)
    assert out.keys() == want.keys()
    assert (out["cache"], out["flag"]) == (None, True)
    grads = nnx.jit(nnx.grad(lambda model: square(lambda x: {**model(x), "flag": None}, X)))(aligned)
    assert all(learns(grads).values())


def test_several_outputs_are_one_error_side_by_side_or_those_that_are_picked():
    all_of_them = attach(Several(), jaxfa.dfa(), AT)
    assert all_of_them.model.a.feedback_tap.feedback.get_value().b.shape == (8, 4)  # three logits and a value
    one = attach(Several(), jaxfa.dfa(), AT, logits=lambda out: out["logits"])
    b = one.model.b.feedback_tap.feedback.get_value().b
    assert b.shape == (8, 3)
    e = inputs(4, 3)
    delta = nnx.grad(lambda model: (model(X)["logits"] * e).sum())(one)["model"]["b"]["bias"][...]
    np.testing.assert_allclose(delta, (e @ b.T).sum(0), rtol=1e-5)  # the tap is before the ReLU
    with pytest.raises(ValueError, match=r"needs the model's logits, .* Say with logits="):
        attach(Several(), jaxfa.dfa(), AT, logits=lambda out: out["cache"])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_of_a_block_that_returns_a_tree_what_is_read_is_tapped(schedule):
    aligned = attach(Trees(), jaxfa.dfa(), "blocks/*", schedule=schedule, logits=lambda out: out[0])
    assert {tap.leaves for tap in taps_of(aligned.model).values()} == {("1",)}
    assert aligned.coverage().rows[0].arrives == "direct, output 1 of blocks/0, then exact inside blocks/0"
    grads = nnx.grad(lambda model: (model(X)[0] ** 2).sum())(aligned)
    assert all(value for path, value in learns(grads).items() if "/c/" not in path)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_nothing_that_a_forward_pass_writes_is_lost(schedule, wrap):
    def loss(state):
        model = nnx.merge(graph, state, copy=True)
        y = model(X)
        penalties = nnx.pop(model, Penalty)
        return (y**2).sum() + sum(jax.tree.leaves(penalties)), nnx.state(model)

    def gradient(model):
        nonlocal graph
        graph, state = nnx.split(model)
        return wrap(jax.value_and_grad(loss, has_aux=True, allow_int=True))(state)

    graph = None
    (want, after), _ = gradient(Sowing())
    at = None if schedule is jaxfa.stacks.stored else AT
    (value, state), grads = gradient(attach(Sowing(), jaxfa.dfa(), at, schedule=schedule))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(state["model"]["mean"], after["mean"], rtol=1e-6)
    if schedule is jaxfa.stacks.stored:  # the penalty has its own gradient, up to the next tap
        (_, _), bare = gradient(attach(Base(), jaxfa.dfa()))
        extra = grads["model"]["a"]["bias"][...] - bare["model"]["a"]["bias"][...]
        h = X @ Base().a.kernel[...]
        own = jax.grad(lambda b: (nnx.relu(h + b[None]) ** 2).mean())(jnp.zeros(8))
        np.testing.assert_allclose(extra, own, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("at", [None, AT])
def test_keywords_and_arguments_with_state(rule, at):
    def given():
        return {"train": True, "rngs": nnx.Rngs(7), "cache": Cache()}

    aligned = attach(Steps(), rule, at, example_kwargs=given())
    plain, ours, learned = given(), given(), given()
    np.testing.assert_array_equal(aligned(X, **ours), Steps()(X, **plain))
    grads = nnx.grad(lambda model, kwargs: square(model, X, **kwargs), argnums=0)(aligned, learned)
    assert all(learns(grads).values())
    for after in (ours, learned):
        np.testing.assert_array_equal(after["cache"].value[...], X)
        assert after["rngs"].default.count[...] == plain["rngs"].default.count[...] == 1
    assert len(aligned.coverage(X, **given()).rows) == 3


@both
def test_any_method_may_be_trained_by(rule):
    aligned = attach(Losses(), rule, AT, method="logits")
    np.testing.assert_array_equal(aligned(X), Losses().logits(X))
    assert all(learns(nnx.grad(square)(aligned, X)).values())
    with pytest.raises(TypeError, match=r"Losses has no method '__call__'; its own are \['encode', 'logits', 'loss'\]"):
        attach(Losses(), rule, AT)


@both
def test_a_gradient_past_the_attached_model_is_refused(rule):
    aligned = attach(Losses(), rule, AT, method="logits")
    np.testing.assert_allclose(jax.jit(aligned.model.loss)(X), Losses().loss(X), rtol=1e-6)
    with pytest.raises(RuntimeError, match=r"past .*'[abc]'.*: call the attached model, attach with method="):
        nnx.grad(lambda aligned: aligned.model.loss(X))(aligned)


def test_a_method_that_returns_a_loss_has_no_logits():
    with pytest.raises(ValueError, match="or with method= which method returns them"):
        attach(Losses(), jaxfa.dfa(), AT, method="loss")


def test_a_layer_wise_rule_is_audited_for_the_method_that_is_called():
    aligned = attach(Losses(), jaxfa.fa(), method="loss")
    assert all(learns(nnx.grad(lambda aligned: aligned(X))(aligned)).values())


class Gated(nnx.Module):
    """Two layers that read one activation, and a head that is used in another method."""

    def __init__(self):
        def make(i, n, m):
            return dense(n, m, rngs=nnx.Rngs(i))

        self.below, self.up, self.gate = make(0, 8, 6), make(1, 6, 5), make(2, 6, 5)
        self.head, self.other = make(3, 5, 3), make(4, 5, 3)

    def __call__(self, x):
        h = nnx.relu(self.below(x))
        return self.head(nnx.silu(self.gate(h)) * self.up(h))


def test_one_activation_is_one_tap_and_a_layer_without_a_call_has_none():
    aligned, e = attach(Gated(), jaxfa.dfa()), inputs(4, 3)
    taps = taps_of(aligned.model)
    assert {path: tap.follows for path, tap in taps.items()} == {"gate": None, "up": "gate", "head": None}
    grads = nnx.grad(lambda model: (model(X) * e).sum())(aligned)["model"]
    mask = Gated().below(X) > 0
    want = (e @ taps["gate"].feedback.get_value().b.T * mask).sum(0)
    np.testing.assert_allclose(grads["below"]["bias"][...], want, rtol=1e-4, atol=1e-6)
    assert not grads["other"]["kernel"][...].any()


def test_the_jacobian_at_an_activation_is_that_of_all_that_read_it():
    aligned = attach(Gated(), jaxfa.fdfa(learning_rate=0.02, scaling=0.1))
    refine = nnx.jit(lambda aligned, key: aligned.refine(key, X))
    for key in jax.random.split(jax.random.key(0), 600):
        refine(aligned, key)
    model = Gated()

    def tail(h):
        return model.head(nnx.silu(model.gate(h)) * model.up(h)).sum(0)

    true = jax.jacrev(tail)(nnx.relu(model.below(X))).mean(1).T
    b = taps_of(aligned.model)["gate"].feedback.get_value().b
    assert jaxfa.diagnostics.angle(b, true) < 20


class Hidden(Base):
    """Nothing differentiable between the first layer and the output."""

    def __call__(self, x):
        return self.c(nnx.relu(self.b(jnp.sign(self.a(x)))))


def test_a_tap_that_no_error_can_reach_is_refused():
    with pytest.raises(ValueError, match=r"the tap 'a' gets no error: nothing differentiable is between"):
        attach(Hidden(), jaxfa.dfa(), AT)
    aligned = attach(Hidden(), jaxfa.dfa(), AT, allow="a")
    assert aligned.coverage().rows[0].arrives == "none: does not learn"


class Frozen(Base):
    """A layer whose weights are held fixed by the model itself."""

    def __call__(self, x):
        return self.c(nnx.relu(self.b(nnx.relu(jax.lax.stop_gradient(self.a(x))))))


@both
def test_what_the_model_itself_holds_fixed_may_stay_so(rule):
    table = attach(Frozen(), rule, "b").coverage()
    assert table.violations == ()
    assert {row.layer: row.arrives for row in table.rows}["a"] == "none: does not learn"


class Majored(Base):
    """Time before batch inside."""

    def __call__(self, x):
        h = self.a(x.swapaxes(0, 1)).swapaxes(0, 1)
        return self.c(nnx.relu(self.b(h)))


def test_the_batch_axis_is_known_and_not_guessed():
    for steps in (4, 5):
        with pytest.raises(ValueError, match=rf"batch axis first: .* at the tap 'a' .* got \[\({steps}, 4, 8\)\]"):
            attach(Majored(), jaxfa.dfa(), AT, example=inputs(4, steps, 8))


def test_what_a_model_closes_over_is_refused_in_words():
    def loss(scale):
        class Scaled(Base):
            def __call__(self, x):
                return scale * super().__call__(x)

        return attach(Scaled(), jaxfa.dfa(), AT)(X).sum()

    with pytest.raises(ValueError, match="Hand the model what it closes over as an argument"):
        jax.grad(loss)(2.0)


class Bridge(Base):
    """A layer of Flax's other API, by itself or held by a module."""

    def __init__(self, held):
        super().__init__()
        layer = nnx.bridge.ToNNX(linen.Dense(8), rngs=nnx.Rngs(0)).lazy_init(X)
        self.a = nnx.Sequential(layer) if held else layer


def test_a_linen_layer_is_tapped_by_what_holds_it():
    grads = nnx.grad(square)(attach(Bridge(held=True), jaxfa.dfa(), AT), X)
    assert all(learns(grads).values())
    with pytest.raises(TypeError, match=r"'a' is a Linen module \(nnx.bridge.ToNNX\)"):
        attach(Bridge(held=False), jaxfa.dfa(), AT)


def test_an_angle_is_none_where_nothing_learns():
    found = jaxfa.nn.alignment(attach(Frozen(), jaxfa.fa()), lambda model: square(model, X))
    assert {path for path, one in found.items() if np.isnan(one.angle)} == {"a/kernel", "a/bias"}


class Normed(Base):
    """A norm after the last tap."""

    def __init__(self):
        super().__init__()
        self.norm = nnx.LayerNorm(8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.c(self.norm(nnx.relu(self.b(nnx.relu(self.a(x))))))


def test_a_norm_between_the_last_tap_and_the_output_learns_exactly():
    aligned = attach(Normed(), jaxfa.dfa(), AT)
    ours, true = nnx.grad(square)(aligned, X)["model"], nnx.grad(square)(Normed(), X)
    np.testing.assert_allclose(ours["norm"]["scale"][...], true["norm"]["scale"][...], rtol=1e-5)
    with pytest.raises(ValueError, match="'c' sends the error on to 'b/bias', 'b/kernel'"):
        attach(Normed(), jaxfa.dfa(), "a")


def test_what_flax_captures_is_captured():
    def run(model):
        out, found = nnx.capture(model, Penalty)(X)
        return out, nnx.to_flat_state(found)

    aligned = attach(Sowing(), jaxfa.dfa(), AT)
    np.testing.assert_array_equal(run(aligned)[0], run(Sowing())[0])
