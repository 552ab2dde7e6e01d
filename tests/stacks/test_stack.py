"""Stacks of equal blocks: every schedule, and the fused update, against a plain loop over the blocks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.nn import initializers
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxfa
from tests.blocks import DIRECT, attention, conv, dense, draw

LAYERS, EXAMPLES, OUTPUTS = 4, 6, 3
SCHEDULES = {"stored": jaxfa.stacks.stored, "parallel": jaxfa.stacks.parallel, "stream": jaxfa.stacks.stream}


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


# name: (block, stacked parameters, the input of the first)
BLOCKS = {
    "dense": (dense, {"w": draw(0, LAYERS, 5, 5), "b": draw(1, LAYERS, 5)}, draw(2, EXAMPLES, 5)),
    "attention": (attention, {name: draw(i, LAYERS, 5, 5) for i, name in enumerate("qkv")}, draw(3, EXAMPLES, 4, 5)),
    "conv": (conv, draw(4, LAYERS, 3, 3, 2, 2), draw(5, EXAMPLES, 4, 4, 2)),
}


def create(rule, name="dense", dtype=jnp.float64):
    block, params, h = BLOCKS[name]
    params, h = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, h))
    logits = jax.ShapeDtypeStruct((EXAMPLES, OUTPUTS), dtype)
    if rule is None:
        return block, params, None, h
    first = rule.init(jax.random.key(0), h, logits)
    keys = jax.random.split(jax.random.key(0), LAYERS)
    return block, params, first if first.shared else jax.vmap(rule.init, (0, None, None))(keys, h, logits), h


def at(layer, tree):
    return jax.tree.map(lambda leaf: leaf[layer], tree)


def head(h, wire, feedback):
    logits = jaxfa.with_wire(h.reshape(len(h), -1) @ draw(9, OUTPUTS, h[0].size).T.astype(h.dtype), wire, feedback)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(h)) % OUTPUTS).mean()


def wire_for(h):
    return jnp.zeros((len(h), OUTPUTS), h.dtype)


def objective(block, schedule, unroll=None):
    def loss(params, feedback, h):
        out = jaxfa.direct_stack(block, params, h, wire_for(h), feedback, schedule=schedule, unroll=unroll)
        return head(*out, feedback)

    return loss


def looped(block):
    """The definition: one block after the other."""

    def loss(params, feedback, h):
        wire = wire_for(h)
        for layer in range(LAYERS):
            one = feedback if feedback is None or feedback.shared else at(layer, feedback)
            h, wire = jaxfa.direct(block(at(layer, params), h), wire, one)
        return head(h, wire, feedback)

    return loss


def gradients(loss, *args):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args)


@pytest.mark.parametrize("rule", DIRECT.values(), ids=DIRECT)
def test_every_schedule_learns_as_the_loop_does(rule, x64):
    block, *args = create(rule)
    want = gradients(looped(block), *args)
    for schedule in SCHEDULES.values():
        got = gradients(objective(block, schedule), *args)
        chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "unroll"), [("attention", False), ("conv", True), long("attention", True), long("conv", False)]
)
def test_any_block_in_a_loop_or_in_straight_code(name, unroll, x64):
    block, *args = create(jaxfa.dkp(distribution=initializers.glorot_normal()), name)
    want = gradients(looped(block), *args)
    for schedule in SCHEDULES.values():
        got = gradients(objective(block, schedule, unroll), *args)
        chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-15)


def test_without_feedback_it_is_the_plain_network(x64):
    block, params, feedback, h = create(jaxfa.dfa())
    stack, plain = objective(block, jaxfa.stacks.stream), looped(block)

    def derivatives(f, params, h):
        gradient = jax.grad(lambda params, h: f(params, None, h), argnums=(0, 1))(params, h)
        return gradient, jax.jvp(lambda h: f(params, None, h), (h,), (h,))

    got, want = (jax.jit(derivatives, static_argnums=0)(f, params, h) for f in (stack, plain))
    chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-15)
    # The control: what a random feedback teaches is not this.
    assert jaxfa.diagnostics.angle(jax.jit(jax.grad(stack))(params, feedback, h)["w"], want[0][0]["w"]) > 30


@pytest.mark.parametrize("schedule", [jaxfa.stacks.stream, jaxfa.stacks.parallel], ids=repr)
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_only_the_stream_keeps_no_activations(name, schedule):
    # Temporary memory of the compiled gradient, of 4 blocks and of 32 alike.
    block, params, feedback, h = create(jaxfa.dfa(), name, jnp.float32)
    h = jnp.tile(h, (32, *[1] * (h.ndim - 1)))

    def temporary(repeats):
        deep = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * repeats), (params, feedback))
        compiled = jax.jit(jax.grad(objective(block, schedule))).lower(*deep, h).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert (temporary(8) < 1.3 * temporary(1)) == (schedule is jaxfa.stacks.stream)


def test_a_refine_phase_reaches_every_block(x64):
    # In so small a batch scales that learn fast are as noisy as what they are to measure.
    rule = jaxfa.grape(learning_rate=0.5, averaging=0.97, scaling=0.03, column_norm=False)
    block, params, feedback, h = create(rule)

    def forward(taps):
        tapped = (params, taps[0])
        out, wire = jaxfa.direct_stack(
            lambda p, h: block(p[0], h) + p[1], tapped, h, wire_for(h), None, schedule=jaxfa.stacks.stream
        )
        return out @ draw(9, OUTPUTS, 5).T + wire

    jacobian = jax.jit(jax.jacrev(lambda taps: forward([taps]).sum(0)))(jnp.zeros((LAYERS, *h.shape)))
    before = feedback
    refine = jax.jit(lambda feedback, key: rule.refine(forward, [feedback], key)[0])
    for key in jax.random.split(jax.random.key(1), 200):
        feedback = refine(feedback, key)
    for layer in range(LAYERS):
        true = jacobian[:, layer].mean(1).T
        assert jaxfa.diagnostics.angle(feedback.b[layer], true) < 45
        assert jaxfa.diagnostics.angle(before.b[layer], true) > 60


OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
    "decay and schedule": optax.adamw(optax.cosine_decay_schedule(1e-2, 10), weight_decay=0.1),
}


def fused(block, optimizer, unroll=None):
    @jax.jit
    def step(both, state, h):
        out, wire = jaxfa.direct_stack(block, both[0], h, wire_for(h), None, schedule=jaxfa.stacks.stream)
        e = jax.grad(lambda wire: head(out, wire, both[1]))(wire)
        return jaxfa.update_stack(block, both, h, e, optimizer=optimizer, state=state, unroll=unroll)

    return step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_fused_update_is_the_unfused_one(name, x64):
    rule = jaxfa.dkp()
    block, *both, h = create(rule)
    optimizer = jaxfa.optimizer(OPTIMIZERS[name], rule)
    step, gradient = (
        fused(block, optimizer, unroll=name == "adam"),
        jax.jit(jax.grad(objective(block, jaxfa.stacks.stored), argnums=(0, 1, 2))),
    )
    got, state = tuple(both), jax.vmap(optimizer.init)(tuple(both))
    want, whole = tuple(both), optimizer.init(tuple(both))
    for _ in range(3):
        *signals, dh = gradient(*want, h)
        updates, whole = optimizer.update(tuple(signals), whole, want)
        want = optax.apply_updates(want, updates)
        got, state, error = step(got, state, h)
        np.testing.assert_allclose(error, dh, rtol=1e-12, atol=1e-15)
    chex.assert_trees_all_close(got, want, rtol=1e-11, atol=1e-14)
    # The control: everything has moved that learns.
    assert not jnp.allclose(got[0]["w"], both[0]["w"], rtol=1e-3)


def test_the_fused_update_leaves_keys_and_counts_alone(x64):
    def noisy(p, h):
        return h + jnp.tanh(h @ p["w"]) + 0.1 * jax.random.normal(p["key"], h.shape)

    rule = jaxfa.dfa()
    _, params, feedback, h = create(rule)
    key, count = jax.random.split(jax.random.key(3), LAYERS), jnp.arange(LAYERS)
    both = {"w": params["w"], "key": key, "count": count}, feedback
    floats = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), both)
    optimizer = optax.masked(optax.adam(1e-2), floats)
    (after, _), *_ = fused(noisy, optimizer)(both, jax.vmap(optimizer.init)(both), h)
    assert not jnp.any(after["w"] == params["w"])
    chex.assert_trees_all_equal((after["key"], after["count"]), (key, count))


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_the_fused_update_keeps_no_activations(name):
    # In straight code XLA keeps the parameters and the optimizer's state once more, and no activation.
    rule = jaxfa.dfa()
    block, *both, h = create(rule, name, jnp.float32)
    h, optimizer = jnp.tile(h, (32, *[1] * (h.ndim - 1))), jaxfa.optimizer(optax.sgd(0.1), rule)

    def temporary(repeats):
        deep = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * repeats), tuple(both))
        state, e = jax.vmap(optimizer.init)(deep), jnp.zeros((len(h), OUTPUTS))
        update = jax.jit(lambda both, h: jaxfa.update_stack(block, both, h, e, optimizer=optimizer, state=state))
        compiled = update.lower(deep, h).compile()
        return compiled.memory_analysis().temp_size_in_bytes - sum(3 * leaf.nbytes for leaf in jax.tree.leaves(deep))

    assert temporary(8) < 1.3 * temporary(1)


def test_a_global_norm_sees_one_block_at_a_time(x64):
    rule = jaxfa.dfa()
    block, *both, h = create(rule)
    both, optimizer = tuple(both), optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    got, *_ = fused(block, optimizer)(both, jax.vmap(optimizer.init)(both), h)
    signals = jax.jit(jax.grad(objective(block, jaxfa.stacks.stored), argnums=(0, 1)))(*both, h)

    @jax.jit
    def updates(signals):
        each = jax.vmap(optimizer.update)(signals, jax.vmap(optimizer.init)(both))
        return each[0], optimizer.update(signals, optimizer.init(both))[0]

    each, whole = updates(signals)
    moved = jax.tree.map(jnp.subtract, got, both)
    chex.assert_trees_all_close(moved, each, rtol=1e-9)
    assert not jnp.allclose(moved[0]["w"], whole[0]["w"], rtol=0.1)


@every_schedule
def test_keys_in_the_parameters_and_seeds_side_by_side(schedule, x64):
    def noisy(p, h):
        return h @ p["w"] + jax.random.normal(p["key"], h.shape)

    _, _, feedback, h = create(jaxfa.dfa())
    params = {"w": draw(0, 2, LAYERS, 5, 5), "key": jax.random.split(jax.random.key(2), (2, LAYERS))}
    got, want = (
        jax.jit(jax.vmap(jax.grad(f, allow_int=True), (0, None, None)))(params, feedback, h)["w"]
        for f in (objective(noisy, schedule), looped(noisy))
    )
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


@every_schedule
def test_batches_side_by_side_learn_from_their_own_errors(schedule, x64):
    block, *both, h = create(jaxfa.dkp())
    batches = jnp.stack([h, -h])
    loss = objective(block, schedule)
    got = jax.jit(jax.grad(lambda *both: jax.vmap(lambda h: loss(*both, h))(batches).sum(), (0, 1)))(*both)
    each = [jax.jit(jax.grad(loss, (0, 1)))(*both, h) for h in batches]
    chex.assert_trees_all_close(got, jax.tree.map(jnp.add, *each), rtol=1e-12, atol=1e-15)


@every_schedule
def test_what_a_block_closes_over_is_constant(schedule):
    block, params, feedback, h = create(jaxfa.dfa(), dtype=jnp.float32)
    run = jax.jit(jax.grad(lambda scale: objective(lambda p, h: block(p, scale * h), schedule)(params, feedback, h)))
    if schedule is jaxfa.stacks.parallel:
        with pytest.raises(jax.errors.UnexpectedTracerError):
            run(1.5)
    else:
        # Stored, a block's own derivative in it is what autodiff finds; never more than that.
        assert (run(1.5) == 0) == (schedule is jaxfa.stacks.stream)


def test_no_examples_and_numbers_that_are_none():
    # In straight code, where the order is kept by a number that the compiler cannot know.
    block, params, feedback, h = create(jaxfa.dfa(), dtype=jnp.float32)

    def run(params, h):
        return jaxfa.direct_stack(block, params, h, wire_for(h), feedback, schedule=jaxfa.stacks.stream, unroll=True)

    gradient = jax.jit(jax.grad(lambda params: sum(part.sum() for part in run(params, h[:0]))))(params)
    assert not gradient["w"].any()
    out, _ = jax.jit(run)(params, h.at[0].set(jnp.nan))
    assert jnp.isnan(out).any(1).tolist() == [True] + [False] * (EXAMPLES - 1)


@every_schedule
def test_half_precision(schedule):
    block, *args = create(jaxfa.dfa(), dtype=jnp.bfloat16)
    got, want = (jax.jit(jax.grad(f))(*args)["w"] for f in (objective(block, schedule), looped(block)))
    assert got.dtype == jnp.bfloat16
    chex.assert_trees_all_close(got, want, rtol=0.05, atol=1e-3)


@every_schedule
def test_a_sharded_batch(schedule, x64):
    block, *both, h = create(jaxfa.dkp(distribution=initializers.glorot_normal()))

    def local(params, feedback, h, labels):
        def loss(params, feedback):
            out, wire = jaxfa.direct_stack(block, params, h, wire_for(h), feedback, schedule=schedule)
            logits = out @ draw(9, OUTPUTS, 5).T + wire
            return lax.pmean(optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), "data")

        return jax.grad(loss, argnums=(0, 1))(params, feedback)

    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("data",))
    specs = (P(), P(), P("data"), P("data"))
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))(
        *both, h, jnp.arange(EXAMPLES) % OUTPUTS
    )
    chex.assert_trees_all_close(got, gradients(looped(block), *both, h)[1][:2], rtol=1e-12, atol=1e-15)


def test_wrong_use_is_told_so():
    block, params, feedback, h = create(jaxfa.dfa(), dtype=jnp.float32)
    wire = wire_for(h)
    with pytest.raises(ValueError, match=r"jaxfa.stacks.stream, a value and no string; got 'fast'"):
        jaxfa.direct_stack(block, params, h, wire, feedback, schedule="fast")
    with pytest.raises(ValueError, match=r"expected float32\[6, 5\]"):
        jaxfa.direct_stack(lambda p, h: block(p, h)[:, :2], params, h, wire, feedback, schedule=jaxfa.stacks.stream)
    with pytest.raises(ValueError, match="one leading axis for its blocks"):
        jaxfa.direct_stack(block, params | {"b": jnp.zeros((2, 5))}, h, wire, feedback, schedule=jaxfa.stacks.stream)
    with pytest.raises(ValueError, match="4 blocks need as many feedbacks, got 2"):
        jaxfa.direct_stack(block, params, h, wire, at(slice(2), feedback), schedule=jaxfa.stacks.stream)
    with pytest.raises(TypeError, match="DirectFeedback, got FixedFeedback"):
        jaxfa.direct_stack(block, params, h, wire, jaxfa.FixedFeedback(params["w"]), schedule=jaxfa.stacks.stream)
    with pytest.raises(TypeError, match="h is one array, got tuple"):
        jaxfa.direct_stack(block, params, (h, h), wire, feedback, schedule=jaxfa.stacks.stream)
    with pytest.raises(ValueError, match="one leading axis for its blocks"):
        jaxfa.direct_stack(block, at(slice(0), params), h, wire, feedback, schedule=jaxfa.stacks.stream)
    unbound = create(jaxfa.forward_gradient(), dtype=jnp.float32)[1:]
    with pytest.raises(ValueError, match="A forward gradient is of one batch"):
        gradients(objective(block, jaxfa.stacks.stream), *unbound)
    optimizer = optax.adam(1e-3)
    shared = create(jaxfa.dfa(shared=True), dtype=jnp.float32)[2]
    with pytest.raises(ValueError, match="got one shared by all"):
        jaxfa.update_stack(block, (params, shared), h, wire, optimizer=optimizer, state=())
    with pytest.raises(ValueError, match="the optimizer's state"):
        jaxfa.update_stack(
            block, (params, feedback), h, wire, optimizer=optimizer, state=optimizer.init((params, feedback))
        )
