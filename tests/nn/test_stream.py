"""Models whose blocks learn in a second forward sweep, or on several devices: the same gradients and state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.nn import initializers
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfa
import jaxfa.nn
from experiments.models import networks
from experiments.models.gpt import GPT
from experiments.models.vgg import VGG
from jaxfa.jaxprs.versions import bodies, equations, opened
from tests.networks import BLOCKS, MLP, TRAINED, Residual, Scanned, Transformer, gradient, inputs, loss


class ConvBlock(nnx.Module):
    """Convolution, BatchNorm, dropout."""

    def __init__(self, fan_in, width, strides, rngs):
        self.conv = nnx.Conv(fan_in, width, (3, 3), strides=strides, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.dropout(self.norm(self.conv(x))))


class Stages(nnx.Module):
    """Unequal blocks behind a parameter that no tap names."""

    def __init__(self, rngs, widths=(4, 6)):
        self.scale = nnx.Param(jnp.ones(()))
        ins = (3, *widths[:-1])
        self.blocks = nnx.List([ConvBlock(n, m, 1 + (n != m), rngs) for n, m in zip(ins, widths, strict=True)])
        self.head = nnx.Linear(widths[-1], 3, rngs=rngs)

    def __call__(self, x):
        h = x * self.scale
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean((1, 2)))


# name: (model, where it is tapped, inputs)
MODELS = {
    "stages": (Stages, "blocks/*", inputs(6, 8, 8, 3)),
    "residual": (Residual, BLOCKS, inputs(9, 6)),
    "transformer": (Transformer, ("embed", "block"), jax.random.randint(jax.random.key(6), (9, 4), 0, 11)),
}


def attach(name, rule, schedule):
    make, at, x = MODELS[name]
    allow = "blocks/0/conv" if name == "stages" else ()
    options = {"rngs": nnx.Rngs(1), "example": x, "at": at, "allow": allow, "schedule": schedule}
    return jaxfa.nn.attach(make(nnx.Rngs(0)), rule, **options)


SCHEDULES = jaxfa.stacks.stored, jaxfa.stacks.stream
MESH = jaxfa.stacks.mesh(data=2, layer=2)
DISPATCHED = jaxfa.stacks.dispatch(jaxfa.stacks.mesh(layer=2))
DKP = jaxfa.dkp(distribution=initializers.glorot_normal())


@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, DKP) for name in MODELS] + [("residual", jaxfa.dfa(shared=True)), ("residual", jaxfa.dldfa(2))],
    ids=[*MODELS, "shared matrix", "dldfa"],
)
def test_every_schedule_learns_what_the_stored_gradient_is(name, rule):
    stored, stream = (attach(name, rule, schedule) for schedule in SCHEDULES)
    dispatch = attach(name, rule, jaxfa.stacks.dispatch(jaxfa.stacks.mesh(layer=2)))
    want_value, want = gradient(stored, MODELS[name][2])
    for model in (stream, dispatch):
        value, got = gradient(model, MODELS[name][2])
        # The forward pass is the same; compilers may sum the loss together with what else reads the logits.
        np.testing.assert_allclose(value, want_value, rtol=2e-7)
        chex.assert_trees_all_close(nnx.to_pure_dict(got), nnx.to_pure_dict(want), rtol=2e-5, atol=3e-7)
        # BatchNorm's means and dropout's counts are those of one pass.
        statistics, others = zip(*(nnx.state(m, nnx.BatchStat, ...) for m in (model, stored)), strict=True)
        chex.assert_trees_all_close(*map(nnx.to_pure_dict, statistics), rtol=1e-6)
        chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.filter_state(s, nnx.Not(nnx.Param))) for s in others))
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(got)) > 1e-3


OTHERS = [pytest.param(*shape, marks=pytest.mark.long) for shape in ((1, 1), (1, 8), (2, 4), (4, 2))]


@pytest.mark.parametrize(("data", "layer"), [(2, 3), *OTHERS])
def test_every_mesh_takes_the_same_step(data, layer, x64):
    # With a statistic of the batch, Oja's, and shares of unequal size.
    x = jax.random.normal(jax.random.key(5), (16, 6))
    single = x.astype(jnp.float32)
    mesh = jaxfa.stacks.mesh(data=data, layer=layer)

    def learned(put, **options):
        model = Residual(nnx.Rngs(0), depth=7)
        model = jaxfa.nn.attach(model, jaxfa.dldfa(2), rngs=nnx.Rngs(1), example=single, at=BLOCKS, **options)
        double = jax.tree.map(
            lambda leaf: leaf.astype(leaf.dtype if leaf.dtype.kind == "u" else x.dtype), nnx.state(model)
        )
        nnx.update(model, put(double, P()))
        return nnx.to_pure_dict(gradient(model, put(x, P("data")))[1])

    got = learned(
        lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec)), schedule=jaxfa.stacks.dispatch(mesh)
    )
    chex.assert_trees_all_close(got, learned(lambda tree, _: tree), rtol=1e-12, atol=1e-15)


def test_each_device_multiplies_for_its_own_blocks_alone():
    # One branch for each device; in it, the contractions of its share: a third of the blocks.
    x = MODELS["residual"][2]
    model = attach("residual", jaxfa.dfa(), jaxfa.stacks.dispatch(jaxfa.stacks.mesh(layer=3)))
    graphdef, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.grad(loss)(nnx.merge(graphdef, state), x))(state, x)
    switches = [eqn for eqn in equations(opened(jaxpr)) if len(eqn.params.get("branches", ())) == 3]
    assert len(switches) == 1
    products = [sum(e.primitive.name == "dot_general" for e in equations(one)) for one in bodies(switches[0])]
    # The delivery; for each layer, of which a residual block has two, its output, its gradient and the error below it.
    assert products == [1 + 3, 1 + 2 * 3, 1 + 2 * 3]


def test_the_table_is_read_off_the_sweep_itself():
    stored, stream = (attach("residual", jaxfa.dfa(), schedule).coverage().rows for schedule in SCHEDULES)
    assert [row.arrives for row in stream] == [row.arrives for row in stored]
    assert stream[1].arrives == "direct, output of blocks/0, then exact inside blocks/0"


def test_weights_that_an_error_would_pass_unnoticed_are_refused():
    make, _, x = MODELS["residual"]
    with pytest.raises(ValueError, match="sends the error on to 'stem/bias', 'stem/kernel' through its own weights"):
        jaxfa.nn.attach(
            make(nnx.Rngs(0)), jaxfa.dfa(), rngs=nnx.Rngs(1), example=x, at="blocks/*", schedule=jaxfa.stacks.stream
        )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(
            lambda depth: Stages(nnx.Rngs(0), (4,) * depth),
            {"at": "blocks/*", "allow": "blocks/0/conv"},
            marks=pytest.mark.long,
        ),
        (
            lambda depth: VGG((8, 8, 3), 3, widths=(4,), repeats=(depth,), rngs=nnx.Rngs(0)),
            {"at": ("blocks/*", "classifier")},
        ),
    ],
    ids=["stages", "vgg"],
)
def test_memory_does_not_grow_with_depth(make, options, schedule):
    x = inputs(64, 8, 8, 3)

    def temporary(depth):
        aligned = jaxfa.nn.attach(make(depth), jaxfa.dfa(), rngs=nnx.Rngs(1), example=x, schedule=schedule, **options)
        graphdef, state = nnx.split(aligned)
        compiled = jax.jit(lambda state, x: nnx.grad(loss)(nnx.merge(graphdef, state), x)).lower(state, x).compile()
        feedback = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(aligned, jaxfa.nn.Feedback)))
        return compiled.memory_analysis().temp_size_in_bytes - feedback

    assert (temporary(8) < 1.3 * temporary(2)) == (schedule is jaxfa.stacks.stream)


WHOLE = {
    "mlp": (lambda rngs: networks.MLP((8, 8, 1), 10, (64,) * 4, rngs=rngs), inputs(256, 8, 8, 1), None),
    "deep": (lambda rngs: Deep(rngs, 8, 0.0), inputs(2048, 16), None),
    "lenet": (lambda rngs: networks.LeNet((28, 28, 1), 10, rngs=rngs), inputs(32, 28, 28, 1), None),
    "resnet": (
        lambda rngs: networks.ResNet((16, 16, 3), 10, (8, 16), repeats=1, rngs=rngs),
        inputs(8, 16, 16, 3),
        ("stem", "blocks/*"),
    ),
    "decoder": (
        lambda rngs: GPT(11, context=16, width=32, depth=4, heads=2, rngs=rngs),
        jax.random.randint(jax.random.key(6), (16, 16), 0, 11),
        ("embedding", "blocks/*"),
    ),
    "as many outputs as units": (
        lambda rngs: networks.MLP((4, 4, 1), 60, (64,) * 6, rngs=rngs),
        inputs(128, 4, 4, 1),
        None,
    ),
    "many outputs": (lambda rngs: networks.MLP((4, 4, 1), 500, (64,) * 4, rngs=rngs), inputs(64, 4, 4, 1), None),
}


@pytest.mark.parametrize(("make", "x", "at"), WHOLE.values(), ids=WHOLE)
def test_stored_errors_take_no_more_memory_than_backpropagation(make, x, at):
    # Errors that were delivered to all blocks side by side would take as much as the activations of half of them;
    # matrices that had to be transposed, as much as these at any batch: it is small where they are large.
    model = make(nnx.Rngs(0))

    def temporary(model):
        graphdef, state = nnx.split(model)
        step = jax.jit(lambda state, x: nnx.grad(loss)(nnx.merge(graphdef, state), x))
        return step.lower(state, x).compile().memory_analysis().temp_size_in_bytes

    exact = temporary(model)
    # Slices of one shared matrix are divided by a root of their size: where blocks end linearly that takes an array.
    for rule, more in ((jaxfa.dfa(), 0.001), (jaxfa.dfa(shared=True), 0.01)):
        direct = jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), example=x, at=at)
        assert temporary(direct) <= (1 + more) * exact


def test_layers_that_share_a_matrix_share_its_product_with_the_error():
    model, x = networks.MLP((4, 4, 1), 500, (16,) * 4, rngs=nnx.Rngs(0)), inputs(32, 4, 4, 1)

    def operations(rule):
        graphdef, state = nnx.split(jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), example=x))
        step = jax.jit(lambda state, x: nnx.grad(loss)(nnx.merge(graphdef, state), x))
        return step.lower(state, x).compile().cost_analysis()["flops"]

    # One of four layers' products is left.
    products = 3 * 2 * 32 * 500 * 16
    assert operations(jaxfa.dfa()) - operations(jaxfa.dfa(shared=True)) > 0.9 * products


class Deep(nnx.Module):
    """Equal layers, each with dropout and normalisation behind it."""

    def __init__(self, rngs, depth=3, dropout=0.2):
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(depth)])
        self.norms = nnx.List([nnx.BatchNorm(16, rngs=rngs) for _ in range(depth)])
        self.dropout, self.head = nnx.Dropout(dropout, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, h):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = self.dropout(jnp.tanh(norm(layer(h))))
        return self.head(h)


AT_INPUTS = {
    "ssa": (Deep, jaxfa.ssa(rank=4, pull_feedback=True), {}),
    "dkp": (Deep, DKP, {}),
    "joined by shortcuts": (Residual, jaxfa.ssa(), {"allow": ("stem", "blocks")}),
}


@pytest.mark.parametrize(
    ("make", "rule", "options"),
    [pytest.param(*one, id=name, marks=() if name == "ssa" else pytest.mark.long) for name, one in AT_INPUTS.items()],
)
def test_errors_at_the_inputs_of_layers_stream_too(make, rule, options):
    x = inputs(9, 16 if make is Deep else 6)
    found = []
    for schedule in SCHEDULES:
        model = jaxfa.nn.attach(make(nnx.Rngs(0)), rule, rngs=nnx.Rngs(1), example=x, schedule=schedule, **options)
        value, grads = gradient(model, x)
        found.append((value, nnx.to_pure_dict(grads), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))))
    chex.assert_trees_all_close(*found, rtol=2e-5, atol=3e-7)
    assert min(jnp.abs(leaf).max() for leaf in jax.tree.leaves(found[1][1]["model"]["head"]["kernel"])) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_ssa_keeps_no_activations_of_equal_layers(schedule):
    x = inputs(2048, 16)

    def temporary(depth):
        model = jaxfa.nn.attach(
            Deep(nnx.Rngs(0), depth, 0.0), jaxfa.ssa(rank=4), rngs=nnx.Rngs(1), example=x, schedule=schedule
        )
        graphdef, state = nnx.split(model)
        step = jax.jit(lambda state, x: nnx.grad(loss)(nnx.merge(graphdef, state), x))
        return step.lower(state, x).compile().memory_analysis().temp_size_in_bytes

    assert (temporary(6) < 1.3 * temporary(2)) == (schedule is jaxfa.stacks.stream)


def test_training_takes_the_same_steps():
    trained = []
    for schedule in SCHEDULES:
        rule = jaxfa.dkp(learning_rate=1e-2)
        model = attach("residual", rule, schedule)
        optimizer = nnx.Optimizer(model, jaxfa.optimizer(optax.sgd(0.1), rule), wrt=TRAINED)
        first = None
        for _ in range(10):
            value, grads = gradient(model, MODELS["residual"][2])
            optimizer.update(model, grads)
            first = first or value
        assert value < first
        trained.append(nnx.to_pure_dict(nnx.state(model)))
    chex.assert_trees_all_close(*trained, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "rule", "options", "message"),
    [
        (MLP, jaxfa.dfa(), {"schedule": DISPATCHED}, "the tap 'fc2' is at a layer's input"),
        (Scanned, jaxfa.dfa(), {"at": ("stem", "blocks")}, "the tap 'blocks' is in a stack of layers"),
        (Residual, jaxfa.dfa(), {"at": ("stem", "blocks/*", "blocks/1/up")}, "'blocks/1/up' is inside 'blocks/1'"),
        (Residual, jaxfa.fa(), {}, "is for direct rules whose error is the logits'"),
        (Residual, jaxfa.dldfa(2, source="blocks/1"), {"at": BLOCKS}, "is for direct rules whose error is the logits'"),
        (Residual, jaxfa.dfa(), {"at": BLOCKS, "schedule": "stream"}, "a value and no string; got 'stream'"),
        (Residual, jaxfa.dfa(), {"at": BLOCKS, "schedule": jaxfa.stacks.parallel}, "got jaxfa.stacks.parallel"),
        (Residual, jaxfa.dfa(), {"at": "stem", "schedule": DISPATCHED}, "2 devices need as many tapped"),
        (
            Residual,
            jaxfa.dfa(),
            {"at": ("input of blocks/0", "blocks/*"), "schedule": DISPATCHED},
            "the tap 'input of blocks/0' is at a layer's input",
        ),
    ],
)
def test_what_can_not_be_streamed_is_told_so(make, rule, options, message):
    with pytest.raises(ValueError, match=message):
        jaxfa.nn.attach(
            make(nnx.Rngs(0)),
            rule,
            rngs=nnx.Rngs(1),
            example=inputs(9, 6),
            **{"schedule": jaxfa.stacks.stream} | options,
        )


@pytest.mark.parametrize(
    "mesh", [None, 2, Mesh(np.array(jax.devices("cpu")[:2]), ("data",))], ids=["none", "2", "data"]
)
def test_a_dispatch_needs_a_mesh_with_an_axis_for_the_layers(mesh):
    with pytest.raises(
        ValueError, match=r"needs a mesh with an axis 'layer', got (None|2|\{'data': 2\}): jaxfa.stacks.mesh"
    ):
        jaxfa.stacks.dispatch(mesh)
