"""Layers across devices: on every mesh, the pipeline's update is the single device's."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfa
from jaxfa import stacks
from tests.blocks import DIRECT, attention, conv, dense, draw

LAYERS, EXAMPLES, OUTPUTS = 8, 16, 3
MESHES = [(data, devices // data) for devices in (1, 2, 4, 8) for data in (1, 2, 4, 8) if data <= devices]
DLDFA = jaxfa.dldfa(2)  # its signals are statistics of the batch
HALVES = slice(0, EXAMPLES // 2), slice(EXAMPLES // 2, None)
CORNERS = [(1, 1), (8, 1), (1, 8), (4, 2)]
every_mesh = pytest.mark.parametrize(("data", "layer"), MESHES)
every_rule = pytest.mark.parametrize("name", DIRECT)
every_schedule = pytest.mark.parametrize("schedule", [stacks.parallel, stacks.stream], ids=repr)


# name: (block, stacked parameters, inputs, the axes of the logits that are not of the classes)
BLOCKS = {
    "dense": (dense, {"w": draw(0, LAYERS, 5, 5), "b": draw(1, LAYERS, 5)}, draw(2, EXAMPLES, 5), (EXAMPLES,)),
    "attention": (
        attention,
        {k: draw(i, LAYERS, 6, 6) for i, k in enumerate("qkv")},
        draw(3, EXAMPLES, 4, 6),
        (EXAMPLES, 4),
    ),
    "conv": (conv, draw(4, 4, 3, 3, 2, 2), draw(5, EXAMPLES, 4, 4, 2), (EXAMPLES,)),
}


def create(rule, name="dense", dtype=jnp.float64):
    """A network of a stem, a stack and a head: its block, its parameters, its feedback and its data."""
    block, stack, x, batch = BLOCKS[name]
    layers, n = len(jax.tree.leaves(stack)[0]), x[:, ...].shape[-1]
    h = x if len(batch) + 1 == x.ndim else x.reshape(EXAMPLES, -1)
    params = {"stem": draw(6, n, n), "stack": stack, "head": draw(7, h.shape[-1], OUTPUTS)}
    data = x, jnp.asarray(np.random.default_rng(8).integers(0, OUTPUTS, batch))
    feedback = None
    if rule is not None:
        first = rule.init(jax.random.key(0), x, jax.ShapeDtypeStruct((*batch, OUTPUTS), x.dtype))
        lead = () if first.shared else (layers,)
        # With zeros, as some rules start, nothing would be seen.
        feedback = jax.tree.map(lambda leaf: draw(9, *lead, *leaf.shape), first)
    cast = [jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (params, feedback, data[0])]
    return block, *cast[:2], (cast[2], data[1])


def loss(run, block, params, feedback, data):
    x, y = data
    wire = jnp.zeros((*y.shape, OUTPUTS), x.dtype)
    h, wire = run(block, params["stack"], x @ params["stem"], wire, feedback)
    logits = (h if h.ndim == wire.ndim else h.reshape(len(h), -1)) @ params["head"]
    logits = jaxfa.with_wire(logits, wire, feedback)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def learned(block, *args, **options):
    """Loss and gradients, from the pipeline if it is told where, else from the stack on one device."""

    def run(*stack):
        return (
            stacks.pipeline(*stack, **options) if options else jaxfa.direct_stack(*stack, schedule=jaxfa.stacks.stored)
        )

    return jax.jit(jax.value_and_grad(lambda *args: loss(run, block, *args), (0, 1)))(*args)


def placed(mesh, params, feedback, data):
    """Layers over ``layer``, examples over ``data``."""

    def put(tree, *spec):
        return jax.device_put(tree, NamedSharding(mesh, P(*spec)))

    params = {key: put(leaf, *(("layer",) if key == "stack" else ())) for key, leaf in params.items()}
    shared = getattr(feedback, "shared", False)
    return params, put(feedback, *(() if shared else ("layer",))), put(data, "data")


@functools.cache
def on_one_device(rule, name, dtype):
    block, *args = create(rule, name, dtype)
    return learned(block, *args)


def check(
    rule, data, layer, *, name="dense", microbatches=2, schedule=jaxfa.stacks.parallel, dtype=jnp.float64, **tolerance
):
    block, *args = create(rule, name, dtype)
    mesh = stacks.mesh(data=data, layer=layer)
    got = learned(block, *placed(mesh, *args), mesh=mesh, microbatches=microbatches, schedule=schedule)
    chex.assert_trees_all_close(got, on_one_device(rule, name, dtype), **(tolerance or {"rtol": 1e-12, "atol": 1e-12}))
    return got


@every_rule
def test_every_rule_learns_what_it_learns_on_one_device(name, x64):
    check(DIRECT[name], 2, 2)


@pytest.mark.parametrize(("data", "layer"), CORNERS)
def test_on_every_mesh_batch_statistics_are_those_of_the_whole_batch(data, layer, x64):
    _, (grads, signals) = check(DLDFA, data, layer, schedule=jaxfa.stacks.stream)
    assert float(jnp.abs(signals.p).min()) > 0
    assert layer == 1 or grads["stack"]["w"].sharding.spec[0] == "layer"


def test_a_part_of_the_batch_has_other_statistics(x64):
    # The control: were signals those of each device's examples, or of each microbatch's, it would show above.
    block, params, feedback, (x, y) = create(DLDFA)
    halves = [learned(block, params, feedback, (x[part], y[part]))[1][1] for part in HALVES]
    whole = learned(block, params, feedback, (x, y))[1][1]
    mean = jax.tree.map(lambda *both: sum(both) / 2, *halves)
    assert float(jnp.abs(mean.p - whole.p).max()) > 1e-2 * float(jnp.abs(whole.p).max())


@pytest.mark.long
@every_schedule
@every_rule
@every_mesh
def test_every_rule_on_every_mesh(data, layer, name, schedule, x64):
    check(DIRECT[name], data, layer, schedule=schedule)


@every_schedule
def test_in_single_precision_the_update_is_the_same_to_rounding(schedule):
    check(DLDFA, 2, 4, microbatches=4, schedule=schedule, dtype=jnp.float32, rtol=1e-5, atol=1e-6)


def test_a_transformer_whose_blocks_use_an_axis_of_their_own(x64):
    block, *args = create(jaxfa.dkp(), "attention")
    mesh = stacks.mesh(data=2, layer=2, model=2)
    (params, *rest), expected = placed(mesh, *args), learned(block, *args)
    params["stack"] = jax.device_put(params["stack"], NamedSharding(mesh, P("layer", None, "model")))
    got = learned(block, params, *rest, mesh=mesh, microbatches=4, schedule=jaxfa.stacks.stream)
    chex.assert_trees_all_close(got, expected, rtol=1e-12, atol=1e-12)


@every_schedule
def test_convolutions_in_straight_code(schedule, x64):
    check(jaxfa.dfa(), 2, 2, name="conv", schedule=schedule)


def test_without_feedback_it_is_backpropagation(x64):
    check(None, 2, 4)


def test_the_stages_learn_from_one_broadcast_of_the_error(x64):
    # Gradients never travel: beside the forward pass's messages there is one gathering of e, and nothing else.
    block, *args = create(jaxfa.dfa())
    mesh = stacks.mesh(layer=4)

    def step(stack, rest, feedback, data):
        def run(*stack):
            return stacks.pipeline(*stack, mesh=mesh, microbatches=2, schedule=jaxfa.stacks.stream)

        return jax.grad(lambda stack: loss(run, block, rest | {"stack": stack}, feedback, data))(stack)

    params, feedback, data = placed(mesh, *args)
    text = jax.jit(step).lower(params["stack"], params, feedback, data).compile().as_text()
    sent = re.findall(r"= (\S+) (all-\w+|collective-\w+|reduce-scatter)\(", text)
    ticks, gathered = [[shape for shape, kind in sent if kind == k] for k in ("collective-permute", "all-gather")]
    assert len(ticks) == 1 + 3  # in the loop over ticks; the last stage's output to the others
    assert [shape.split("{")[0] for shape in gathered] == [f"f64[{EXAMPLES},{OUTPUTS}]"]
    assert len(sent) == 5


@pytest.mark.parametrize("name", ["grape", "fdfa"])
def test_refine_estimates_the_same_jacobian(name, x64):
    rule = DIRECT[name]
    block, params, feedback, (x, _) = create(rule)
    mesh = stacks.mesh(data=2, layer=4)

    def refined(params, feedback, x, run):
        def forward(taps):
            return run(params["stack"], x, taps) @ params["head"]

        return rule.refine(forward, feedback, jax.random.key(1))

    def piped(stack, x, taps):
        wire = jaxfa.error_wire(x)
        return stacks.pipeline(
            block, stack, x, wire, None, mesh=mesh, microbatches=2, schedule=jaxfa.stacks.stream, taps=taps
        )[0]

    def single(stack, x, taps):
        return lax.scan(lambda h, p: (block(p[0], h) + p[1], None), x, (stack, taps))[0]

    expected = jax.jit(refined, static_argnums=3)(params, feedback, x, single)
    on_mesh = placed(mesh, params, feedback, x)
    got = jax.jit(refined, static_argnums=3)(*on_mesh, piped)
    chex.assert_trees_all_close(got, expected, rtol=1e-12, atol=1e-12)
    assert float(jnp.abs(got.b - feedback.b).max()) > 1e-3


def test_steps_with_a_sharded_optimizer_are_the_single_devices(x64):
    rule = DLDFA
    tx = jaxfa.optimizer(optax.adam(1e-2), rule)
    block, *both, data = create(rule)
    mesh = stacks.mesh(data=2, layer=4)

    def trained(both, data, **options):
        traces = []

        @jax.jit
        def step(both, state):
            traces.append(both)
            updates, state = tx.update(learned(block, *both, data, **options)[1], state, both)
            return optax.apply_updates(both, updates), state

        state = tx.init(both)
        for _ in range(3):
            both, state = step(both, state)
        assert len(traces) <= 2  # before the first step the optimizer counts on one device
        return both, state

    *on_mesh, shards = placed(mesh, *both, data)
    got = trained(tuple(on_mesh), shards, mesh=mesh, microbatches=2, schedule=jaxfa.stacks.parallel)
    chex.assert_trees_all_close(got, trained(tuple(both), data), rtol=1e-10, atol=1e-12)
    stacked = [leaf for leaf in jax.tree.leaves(got) if leaf.ndim > 1 and len(leaf) == LAYERS]
    assert len(stacked) > 8
    assert all(leaf.sharding.spec[0] == "layer" for leaf in stacked)


@pytest.mark.parametrize(
    ("layers", "examples", "options", "message"),
    [
        (6, 16, {"microbatches": 2}, r"6 layers .* 4 stages: choose 1, 2, 3 or 6 stages, or a multiple of 4 layers"),
        (8, 12, {"microbatches": 2}, r"12 examples .* 2 x 4 devices \(data x layer\): choose a multiple of 8"),
        (8, 24, {"microbatches": 8}, r"24 examples on 2 .* into 8 microbatches: choose 1, 2, 3, 4, 6 or 12"),
        (8, 16, {"microbatches": 0}, r"into 0 microbatches: choose 1, 2, 4 or 8"),
        (
            8,
            16,
            {"microbatches": 2, "schedule": stacks.stored},
            r"stacks.parallel or jaxfa.stacks.stream, .* got jaxfa.stacks.stored",
        ),
        (8, 16, {"microbatches": 2, "taps": np.zeros(8)}, r"feedback=None with taps"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_can(layers, examples, options, message):
    h, w = jnp.zeros((examples, 3)), jnp.zeros((layers, 3, 3))
    feedback = jaxfa.DirectMatrix(jnp.zeros((layers, 3, 2)))
    mesh = stacks.mesh(data=2, layer=4)
    with pytest.raises(ValueError, match=message):
        stacks.pipeline(
            lambda w, h: h @ w,
            w,
            h,
            jnp.zeros((examples, 2)),
            feedback,
            **({"mesh": mesh, "schedule": stacks.stream} | options),
        )


def test_a_mesh_needs_its_devices_and_a_layer_axis():
    with pytest.raises(ValueError, match=r"needs 32 devices, and JAX sees 8"):
        stacks.mesh(data=4, layer=8)
    h, auto = jnp.zeros((4, 3)), jax.sharding.AxisType.Auto
    for axis, kind, message in [
        ("data", auto, r"axis 'layer', got \{'data': 2\}"),
        ("layer", jax.sharding.AxisType.Explicit, "a mesh of Auto axes"),
    ]:
        mesh = jax.make_mesh((2,), (axis,), (kind,))
        with pytest.raises(ValueError, match=message):
            stacks.pipeline(dense, {}, h, h, None, mesh=mesh, microbatches=1, schedule=jaxfa.stacks.stream)
