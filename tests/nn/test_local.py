"""Local losses on Flax models: heads in the state, AugLocal's networks made of the model itself, memory, refusals."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.models.networks import MLP
from tests.networks import LOOKS, TRAINED, Scanned, inputs

RULES = {
    "local_classifier": jaxfa.local_classifier(),
    "predsim": jaxfa.predsim(),
    "auglocal": jaxfa.auglocal(depth=2),
}


class Block(nnx.Module):
    """Convolution, BatchNorm and dropout, in a mode that the call names."""

    def __init__(self, fan_in, width, strides, rngs):
        self.conv = nnx.Conv(fan_in, width, (3, 3), strides=strides, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x, *, train):
        h = self.norm(self.conv(x), use_running_average=not train)
        return jnp.tanh(self.dropout(h, deterministic=not train))


class Stages(nnx.Module):
    """Blocks whose map shrinks as channels grow."""

    def __init__(self, rngs, widths=(4, 4, 6)):
        ins = (3, *widths[:-1])
        self.blocks = nnx.List(
            [Block(n, m, 1 + (i > 0), rngs) for i, (n, m) in enumerate(zip(ins, widths, strict=True))]
        )
        self.head = nnx.Linear(widths[-1], 3, rngs=rngs)

    def __call__(self, x, train=True):
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(x.mean((1, 2)))


X, LABELS = inputs(6, 8, 8, 3), jnp.arange(6) % 3


def attach(rule, **options):
    options = {"at": "blocks/*", "example": X} | options
    return jaxfa.nn.attach(Stages(nnx.Rngs(0)), rule, rngs=nnx.Rngs(1), **options)


@nnx.jit
def gradient(model, x):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), LABELS).mean()

    return nnx.grad(loss, argnums=nnx.DiffState(0, TRAINED))(model)


@pytest.mark.parametrize("name", RULES)
def test_blocks_learn_as_they_run_what_they_learn_stored(name):
    stored, stream = (attach(RULES[name], schedule=one) for one in (jaxfa.stacks.stored, jaxfa.stacks.stream))
    want, got = gradient(stored, X), gradient(stream, X)
    chex.assert_trees_all_close(nnx.to_pure_dict(got), nnx.to_pure_dict(want), rtol=2e-5, atol=1e-6)
    # What auxiliary networks compute leaves no trace in the model: statistics and counts are those of one pass.
    plain = Stages(nnx.Rngs(0))
    nnx.jit(lambda model: model(X))(plain)
    for model in (stored, stream):
        for kind in (nnx.BatchStat, nnx.RngCount):
            own, others = (nnx.to_pure_dict(nnx.state(one, kind)) for one in (model.model, plain))
            chex.assert_trees_all_close(own, others, rtol=1e-6)


def test_an_auxiliary_network_is_made_of_the_blocks_above():
    model = attach(jaxfa.auglocal(depth=2, pyramid=0.0))
    first, second, last = (model.model.blocks[i].feedback_tap.feedback.get_value() for i in range(3))
    assert [len(one.blocks) for one in (first, second, last)] == [2, 1, 0]
    assert first.sides == ((8, 8), (4, 4))
    assert [one is None for one in (*first.adapters, *second.adapters)] == [True, True, True]
    own = nnx.to_pure_dict(nnx.state(model.model.blocks[1].conv))["kernel"]
    np.testing.assert_array_equal(np.sort(first.params[0]["conv.kernel"], None), np.sort(own, None))
    assert not np.array_equal(first.params[0]["conv.kernel"], own)

    # By the modules themselves, with these weights and without dropout.
    above = [Stages(nnx.Rngs(0)).blocks[i] for i in (1, 2)]
    for block, params in zip(above, first.params, strict=True):
        block.conv.kernel[...], block.conv.bias[...] = params["conv.kernel"], params["conv.bias"]

    def loss(block, w, b):
        h = block(X, train=True)
        for one in above:
            h = one.conv(h)
            centred = h - h.mean((0, 1, 2), keepdims=True)
            h = jnp.tanh(centred / jnp.sqrt((centred**2).mean((0, 1, 2), keepdims=True) + 1e-5))
        logits = h.mean((1, 2)) @ w
        logits = logits + jnp.broadcast_to(b, logits.shape)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    block = Stages(nnx.Rngs(0)).blocks[0]
    want = nnx.grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1, 2))(block, first.w, first.b)
    got = gradient(model, X)["model"]["blocks"][0]
    signal = got["feedback_tap"]["feedback"].get_value()
    chex.assert_trees_all_close((signal.w, signal.b), want[1:], rtol=1e-4, atol=1e-6)
    for part in ("conv", "norm"):
        chex.assert_trees_all_close(*(nnx.to_pure_dict(one[part]) for one in (got, want[0])), rtol=1e-4, atol=1e-6)


def test_heads_are_listed_and_learn_by_the_rules_transform_alone():
    for name, rule in RULES.items():
        model = attach(rule)
        rows = {row.layer: row for row in model.coverage().rows}
        first = model.model.blocks[0].feedback_tap.feedback.get_value()
        assert rows["blocks/0/conv"].feedback.startswith(type(first).__name__)
        assert rows["blocks/0/conv"].learns == "from the batch"
        assert rows["head"].arrives == "exact: last"
        optimizer = nnx.Optimizer(model, jaxfa.optimizer(optax.sgd(0.0), rule), wrt=TRAINED)
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        optimizer.update(model, gradient(model, X))
        chex.assert_trees_all_equal(nnx.state(model, nnx.Param), before)
        assert name


def test_single_layers_are_followed_by_the_models_nonlinearity():
    model = jaxfa.nn.attach(
        MLP((2, 2, 2), 3, hidden=(8, 7, 6), rngs=nnx.Rngs(0)), jaxfa.auglocal(depth=2, pyramid=0.0), rngs=nnx.Rngs(1),
        example=inputs(6, 2, 2, 2),
    )  # fmt: skip
    taps = [model.model.layers[1], model.model.layers[2], model.model.head]
    first, second, last = (one.feedback_tap.feedback.get_value() for one in taps)
    assert [len(one.blocks) for one in (first, second, last)] == [2, 1, 0]
    assert (first.w.shape, second.w.shape, last.w.shape) == ((6, 3), (6, 3), (6, 3))
    h = jax.random.normal(jax.random.key(0), (6, 8))
    (one, two), (p, q) = first.blocks, first.params
    want = jax.nn.relu(jax.nn.relu(h @ p["kernel"] + p["bias"][None]) @ q["kernel"] + q["bias"][None])
    np.testing.assert_allclose(two(one(h, (p, {})), (q, {})), want, rtol=1e-6)


class Pairs(nnx.Module):
    """Blocks that return a hidden state and a cache, behind a parameter."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, h):
            return jnp.tanh(self.layer(h)), h[:, :2]

    def __init__(self, rngs):
        self.start = nnx.Param(jnp.ones((1, 6)))
        self.blocks = nnx.List([self.Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        h = x + self.start[...].repeat(len(x), 0)
        for block in self.blocks:
            h, _ = block(h)
        return self.head(h)


def test_of_several_outputs_the_hidden_state_goes_on_and_parameters_have_blocks_above():
    model = jaxfa.nn.attach(
        Pairs(nnx.Rngs(0)), jaxfa.auglocal(), rngs=nnx.Rngs(1), example=inputs(9, 6), at=("start", "blocks/*")
    )
    taps = model.model.feedback_tap_start, *(block.feedback_tap for block in model.model.blocks)
    networks = [tap.feedback.get_value() for tap in taps]
    assert [len(one.blocks) for one in networks] == [2, 1, 0]
    (block, *_), (params, *_) = networks[0].blocks, networks[0].params
    h = inputs(9, 6)
    want = jnp.tanh(h @ params["layer.kernel"] + params["layer.bias"][None])
    np.testing.assert_allclose(block(h, (params, {})), want, rtol=1e-6)


class Wide(nnx.Module):
    """Equal dense blocks."""

    def __init__(self, width, depth, rngs):
        self.blocks = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# There are fewer examples where they are compared in pairs.
@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (jaxfa.local_classifier(), (4096, 32)),
        (jaxfa.predsim(), (512, 256)),
        (jaxfa.auglocal(depth=1), (4096, 32)),
    ],
    ids=RULES,
)
def test_no_activation_beyond_a_block_is_kept_if_blocks_stream(rule, shape):
    x = jnp.ones(shape)

    def temporaries(depth, schedule):
        model = jaxfa.nn.attach(
            Wide(shape[1], depth, nnx.Rngs(0)), rule, rngs=nnx.Rngs(1), example=x, at="blocks/*", schedule=schedule
        )

        def loss(model, x):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), jnp.zeros(len(x), int)).mean()

        graphdef, state = nnx.split(model)
        run = jax.jit(lambda s, x: nnx.grad(loss, argnums=nnx.DiffState(0, TRAINED))(nnx.merge(graphdef, s), x))
        return run.lower(state, x).compile().memory_analysis().temp_size_in_bytes

    activation = x.size * x.dtype.itemsize
    growth = {one: temporaries(12, one) - temporaries(4, one) for one in (jaxfa.stacks.stored, jaxfa.stacks.stream)}
    # Stored, every activation waits for the error, which alone tells the targets.
    assert growth[jaxfa.stacks.stored] > 7 * activation
    assert growth[jaxfa.stacks.stream] < activation


def test_what_can_not_learn_by_a_loss_of_its_own_is_refused():
    for rule in RULES.values():
        with pytest.raises(ValueError, match="The tap 'head' is at the logits themselves"):
            attach(rule, at=("blocks/*", "head"))
    with pytest.raises(ValueError, match="'blocks' is a stack of layers, or is called with more than one array"):
        jaxfa.nn.attach(
            Scanned(nnx.Rngs(0)), jaxfa.auglocal(), rngs=nnx.Rngs(1), example=inputs(9, 6), at=("stem", "blocks")
        )
    regression = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 1, rngs=nnx.Rngs(0)))
    for rule in RULES.values():
        with pytest.raises(ValueError, match=r"logits \(N, ..., C\) of two classes or more"):
            jaxfa.nn.attach(regression, rule, rngs=nnx.Rngs(1), example=inputs(9, 6))
    # A classifier for each layer of a stack does.
    stack = jaxfa.nn.attach(
        Scanned(nnx.Rngs(0)), jaxfa.local_classifier(), rngs=nnx.Rngs(1), example=inputs(9, 6), at=("stem", "blocks")
    )
    assert stack.model.blocks.feedback_tap.feedback.get_value().w.shape == (3, 4, 3)


def by_halves(model, x, labels):
    return (mean(model(x[:3]), labels[:3]) + mean(model(x[3:]), labels[3:])) / 2


def mean(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def padded(model, x, labels):
    real = jnp.arange(len(x) + 2) < len(x)
    padding = jnp.full((2, *x.shape[1:]), 7.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(jnp.concatenate([x, padding])), jnp.concatenate([labels, jnp.array([2, 0])])
    )
    return jnp.sum(losses * real) / real.sum()


OBJECTIVES = {
    "two halves in one gradient": (by_halves, 1),
    "padding": (padded, 1),
    "a sum": (lambda model, x, labels: len(x) * mean(model(x), labels), 6),
}


@pytest.mark.parametrize("schedule", [jaxfa.stacks.stored, jaxfa.stacks.stream, "dispatch"], ids=str)
@pytest.mark.parametrize("rule", [jaxfa.drtp(), *RULES.values()], ids=["drtp", *RULES])
def test_an_example_counts_as_it_does_in_the_loss(rule, schedule):
    schedule = jaxfa.stacks.dispatch(jaxfa.stacks.mesh(layer=2)) if schedule == "dispatch" else schedule
    x, labels = inputs(6, 5), jnp.array([0, 1, 2, 0, 1, 2])
    model = jaxfa.nn.attach(
        Wide(5, 2, nnx.Rngs(0)), rule, rngs=nnx.Rngs(1), example=x, at="blocks/*", schedule=schedule
    )

    @nnx.jit(static_argnums=1)
    def learned(model, objective):
        grads = nnx.grad(lambda model: objective(model, x, labels), argnums=nnx.DiffState(0, TRAINED))(model)
        return nnx.to_pure_dict(grads)

    want = learned(model, lambda model, x, labels: mean(model(x), labels))
    for name, (objective, factor) in OBJECTIVES.items():
        if name.startswith("two") and rule is RULES["predsim"]:
            continue  # whose pairs are those of one call
        got = learned(model, objective)
        chex.assert_trees_all_close(got, jax.tree.map(partial(jnp.multiply, factor), want), rtol=2e-4, atol=1e-6)
    assert all(jnp.abs(want["model"]["blocks"][i]["kernel"]).max() > 1e-4 for i in range(2))


def test_targets_for_some_taps_alone_or_at_a_source_are_refused():
    def mixed(key, h, logits):
        return (jaxfa.drtp() if h.shape[-1] == 8 else jaxfa.dfa()).init(key, h, logits)

    model, x = MLP((2, 2, 2), 3, hidden=(8, 7, 6), rngs=nnx.Rngs(0)), inputs(6, 2, 2, 2)
    for rule, words in (
        (jaxfa.DirectRule(mixed), "of DirectMatrix, TargetProjection some need the output error"),
        (replace(jaxfa.drtp(), source="layers/2"), "takes the error at 'layers/2': leave out its source"),
    ):
        with pytest.raises(ValueError, match=words):
            jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), example=x)


@LOOKS
def test_labels_that_the_error_does_not_tell_are_refused_in_words_outside_of_jit():
    layers = nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 3, rngs=nnx.Rngs(0))
    rule, x = jaxfa.local_classifier(), inputs(9, 6)
    model = jaxfa.nn.attach(nnx.Sequential(*layers), rule, rngs=nnx.Rngs(1), example=x)
    smooth = jnp.full((9, 3), 1 / 3)

    def loss(model):
        return optax.softmax_cross_entropy(model(inputs(9, 6)), smooth).mean()

    with pytest.raises(ValueError, match="does not tell the targets"):
        nnx.grad(loss)(model)
    with pytest.raises(ValueError, match="error is not finite"):
        nnx.grad(lambda model: optax.softmax_cross_entropy(model(x.at[0, 0].set(jnp.nan)), smooth).mean())(model)
    assert np.isnan(nnx.jit(nnx.grad(loss))(model)["model"]["layers"][0]["kernel"][...]).any()
