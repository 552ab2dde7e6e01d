"""SSA on Flax models: factored layers are the dense ones, coverage tells the truth, and there is a way back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from jaxfa.nn.weights.factored import Factored
from tests.networks import MLP, TRAINED, Block, ConvNet, Residual, Scanned, alignment, inputs, loss

READINGS = {"parallel": jaxfa.ssa(), "sequential": jaxfa.ssa(parallel=False)}
every_reading = pytest.mark.parametrize("rule", READINGS.values(), ids=READINGS)


class Strided(nnx.Module):
    """Convolutions of several kinds, one of them used at two places, batch norm, a head."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 5), strides=2, padding=((1, 1), (2, 2)), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.same = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.again = self.same
        self.down = nnx.Conv(4, 5, (1, 1), strides=(2, 1), padding="VALID", use_bias=False, rngs=rngs)
        self.head = nnx.Linear(5 * 2 * 4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.relu(self.down(nnx.relu(self.same(x))))
        return self.head(x.reshape(x.shape[0], -1))


class Doubled(nnx.Linear):
    """A layer with a forward pass of its own."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Tuple(nnx.Module):
    """Layers in a tuple."""

    def __init__(self, rngs):
        self.layers = nnx.data((nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)))


class Video(nnx.Module):
    """Convolutions over images with two batch axes."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv2(nnx.relu(self.conv1(x)))).mean((-2, -3)))


class Attention(nnx.Module):
    """Attention, an einsum with biases and its outputs apart, and a layer that is called by keyword."""

    def __init__(self, rngs):
        options = {"param_dtype": float, "bias_init": nnx.initializers.normal(1.0), "rngs": rngs}
        self.first = nnx.Linear(6, 6, **options)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, **options)
        self.einsum = nnx.Einsum("nta,hab->nhtb", (2, 6, 3), (2, 3), **options)
        self.head = nnx.Linear(3, 3, **options)

    def __call__(self, x):
        h = self.attention(jnp.tanh(self.first(inputs=x, out_sharding=None)))
        return self.head(jnp.tanh(self.einsum(jnp.tanh(h))).sum(1))


def attach(model, rule, x, **options):
    return jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), example=x, **options)


MODELS = {"mlp": (MLP, inputs(9, 6)), "convolutions": (Strided, inputs(9, 8, 8, 3))}
every_model = pytest.mark.parametrize(("make", "x"), MODELS.values(), ids=MODELS)


@every_reading
@every_model
def test_at_full_rank_the_model_is_the_dense_one_and_so_is_what_comes_back(rule, make, x, x64):
    model = make(nnx.Rngs(0))
    aligned = attach(model, rule, x)
    expected = make(nnx.Rngs(0))(x)  # batch norm's statistics move with every call
    chex.assert_trees_all_close(aligned(x), expected, atol=1e-5)
    assert not any(isinstance(module, Factored) for _, module in nnx.iter_modules(model))
    for back in (jaxfa.nn.to_dense(aligned), jaxfa.nn.to_thin(aligned)):
        assert type(back) is make
        assert not any(type(module).__module__.startswith("jaxfa") for _, module in nnx.iter_modules(back))
        chex.assert_trees_all_close(back(x), expected, atol=1e-5)
    merged = nnx.state(jaxfa.nn.to_dense(aligned), nnx.Param)
    chex.assert_trees_all_close(nnx.to_pure_dict(merged), nnx.to_pure_dict(nnx.state(model, nnx.Param)), atol=1e-5)


def test_attention_and_einsums_are_factored_and_come_back(x64):
    model, x = Attention(nnx.Rngs(0)), inputs(5, 4, 6)
    aligned = attach(model, jaxfa.ssa(parallel=False), x)
    for other in (aligned, jaxfa.nn.to_dense(aligned), jaxfa.nn.to_thin(aligned)):
        chex.assert_trees_all_close(other(x), model(x), atol=1e-12)
    merged = nnx.state(jaxfa.nn.to_dense(aligned), nnx.Param)
    chex.assert_trees_all_close(nnx.to_pure_dict(merged), nnx.to_pure_dict(nnx.state(model, nnx.Param)), atol=1e-12)
    rows = {row.layer: (row.shape, row.leaves) for row in aligned.coverage().rows}
    passed = {f"attention/{name}": ((6, 6), "through its feedback") for name in ("query", "key", "value", "out")}
    assert rows.items() >= passed.items()
    assert rows["einsum"] == ((6, 6), "through its feedback")
    tied = nnx.grad(lambda m: (m(x) ** 2).sum())
    exact = attach(jaxfa.nn.factorise(model), jaxfa.backprop(), x)
    biases = [
        {path: leaf.get_value() for path, leaf in nnx.to_flat_state(found) if path[-1] == "bias"}
        for found in (tied(exact)["model"], tied(model), tied(aligned)["model"])
    ]
    chex.assert_trees_all_close(biases[0], biases[1], atol=1e-10)
    assert np.abs(biases[2][("first", "bias")] - biases[1][("first", "bias")]).max() > 1e-2


@pytest.mark.long
def test_an_exported_model_is_thin_even_where_singular_values_are_negative():
    aligned = attach(Strided(nnx.Rngs(0)), jaxfa.ssa(rank=3), inputs(2, 8, 8, 3))
    for layer in (aligned.model.same, aligned.model.head):
        kernel = layer.kernel.get_value()
        layer.kernel.set_value(type(kernel)(kernel.u, -kernel.s, kernel.v, kernel.shape, kernel.name))
    thin = jaxfa.nn.to_thin(aligned)
    assert [layer.kernel.shape for layer in thin.same.layers] == [(3, 1, 4, 3), (1, 3, 3, 4)]
    assert thin.same is thin.again
    x = inputs(2, 8, 8, 3)
    aligned.eval(), thin.eval()
    chex.assert_trees_all_close(thin(x), aligned(x), atol=1e-5)


def test_coverage_tells_both_readings_apart():
    rows = {name: attach(MLP(nnx.Rngs(0)), rule, inputs(9, 6)).coverage().rows for name, rule in READINGS.items()}
    assert [row[:4] for row in rows["parallel"]] == [
        ("fc1", (6, 8), "direct, input of fc2", "not needed: first"),
        ("fc2", (8, 8), "direct, input of fc3", "not needed: input tapped"),
        ("fc3", (8, 3), "exact: last", "not needed: input tapped"),
    ]
    assert [row[:4] for row in rows["sequential"]] == [
        ("fc1", (6, 8), "through feedback", "not needed: first"),
        ("fc2", (8, 8), "through feedback", "through its feedback"),
        ("fc3", (8, 3), "exact: last", "through its feedback"),
    ]
    pulled = attach(MLP(nnx.Rngs(0)), jaxfa.ssa(pull_feedback=True), inputs(9, 6))
    assert "TransportedLift" in str(pulled.coverage())


def test_factored_layers_by_backpropagation_are_told_as_that():
    model = jaxfa.nn.factorise(MLP(nnx.Rngs(0)))
    rows = attach(model, jaxfa.backprop(), inputs(9, 6)).coverage().rows
    assert [row.arrives for row in rows] == ["backpropagation", "backpropagation", "exact: last"]
    # A layer left dense in the middle would hand its error on by its own weights.
    with pytest.raises(ValueError, match=r"'fc2' sends the error on to 'fc1/"):
        attach(MLP(nnx.Rngs(0)), jaxfa.ssa(parallel=False), inputs(9, 6), at=("fc1", "fc3"))
    allowed = attach(MLP(nnx.Rngs(0)), jaxfa.ssa(), inputs(9, 6), at=("fc1", "fc2"), allow="fc3")
    assert isinstance(allowed.model.fc3, nnx.Linear)


@every_reading
def test_the_last_layer_is_exact_and_the_others_are_not(rule):
    x = inputs(9, 6)
    found = alignment(attach(MLP(nnx.Rngs(0)), rule, x), x)
    assert found["fc3/kernel"].angle < 0.1
    assert found["fc1/kernel"].angle > 5
    exact = alignment(attach(jaxfa.nn.factorise(MLP(nnx.Rngs(0))), jaxfa.backprop(), x), x)
    assert max(float(one.angle) for one in exact.values()) == 0


def test_any_rule_goes_on_factored_layers():
    x = inputs(9, 6)
    for rule in (jaxfa.dfa(), jaxfa.fa()):
        found = alignment(attach(jaxfa.nn.factorise(MLP(nnx.Rngs(0)), 3), rule, x), x)
        assert found["fc1/kernel"].angle > 5


@every_reading
def test_layers_factored_before_obey_at_and_refuse_a_rank(rule):
    x, model = inputs(9, 6), jaxfa.nn.factorise(jaxfa.nn.factorise(MLP(nnx.Rngs(0)), 2, at="fc1"), 2, at="fc2")
    aligned = attach(model, rule, x, at=("fc1", "fc2"), allow="fc3")
    assert isinstance(aligned.model.fc3, nnx.Linear)
    assert set(jaxfa.factored.ranks(nnx.to_pure_dict(nnx.state(attach(model, rule, x), nnx.Param))).values()) == {2, 3}
    whole = jaxfa.nn.factorise(MLP(nnx.Rngs(0)))
    rows = {row.layer: row for row in attach(whole, rule, x, at="fc2", allow="fc3").coverage().rows}
    assert rows["fc2"].arrives == "backpropagation" != rows["fc1"].arrives
    with pytest.raises(ValueError, match="sends the error on"):
        attach(whole, rule, x, at="fc2")
    with pytest.raises(ValueError, match="'fc1' is factored already, at rank 6"):
        attach(whole, jaxfa.ssa(rank=2), x)
    with pytest.raises(ValueError, match="is factored already"):
        jaxfa.nn.factorise(whole, 0.5, at="fc2")


@pytest.mark.long
@every_reading
def test_convolutions_with_several_batch_axes_learn_as_with_one(rule):
    nested, grads = inputs(5, 4, 6, 6, 2), []
    for x in (nested, nested.reshape(20, 6, 6, 2)):
        aligned = attach(Video(nnx.Rngs(0)), rule, x)
        grads.append(nnx.grad(lambda model, x=x: (model(x) ** 2).sum())(aligned))
    chex.assert_trees_all_close(*map(nnx.to_pure_dict, grads), rtol=1e-4, atol=1e-5)


def test_residual_networks_take_errors_by_the_shortcut_if_allowed():
    x = inputs(9, 6)
    with pytest.raises(ValueError, match="on 3 ways at once"):
        attach(Residual(nnx.Rngs(0)), jaxfa.ssa(), x)
    aligned = attach(Residual(nnx.Rngs(0)), jaxfa.ssa(), x, allow=("stem", "blocks"))
    assert "direct, input of blocks/1/up and direct, input of head" in str(aligned.coverage())
    attach(Residual(nnx.Rngs(0)), jaxfa.ssa(parallel=False), x)


@every_reading
def test_training_and_pruning_with_an_nnx_optimizer(rule):
    x = inputs(9, 6)
    sizes = (6, 32, 32, 3)
    aligned = attach(MLP(nnx.Rngs(0), sizes), rule, x)
    optimizer = nnx.Optimizer(aligned, jaxfa.optimizer(optax.adam(1e-2), rule), wrt=TRAINED)

    @nnx.jit
    def step(aligned, optimizer):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, TRAINED))(aligned, x)
        optimizer.update(aligned, grads)
        return value

    first = [step(aligned, optimizer) for _ in range(20)]
    before = jaxfa.nn.to_dense(aligned)(x)
    jaxfa.nn.prune(aligned, optimizer, energy=0.7)
    assert {layer.kernel.get_value().s.size for layer in (aligned.model.fc2, aligned.model.fc1)} < {6, 8, 16, 24}
    assert aligned.model.fc2.kernel.get_value().s.size < 32
    assert np.abs(aligned(x) - before).max() > 0
    second = [step(aligned, optimizer) for _ in range(40)]
    assert second[-1] < first[-1] < first[0]


def test_what_has_no_factors_is_refused():
    x, rule = inputs(9, 8, 8, 3), jaxfa.ssa()
    with pytest.raises(ValueError, match="without groups"):
        attach(ConvNet(nnx.Rngs(0)), rule, x)
    attach(ConvNet(nnx.Rngs(0)), rule, x, at=("conv1", "head"), allow="conv2")
    with pytest.raises(ValueError, match="stack of layers"):
        attach(Scanned(nnx.Rngs(0)), rule, inputs(9, 6))
    with pytest.raises(ValueError, match="matches nothing"):
        attach(MLP(nnx.Rngs(0)), rule, inputs(9, 6), at="fc9")
    with pytest.raises(ValueError, match="no layer to factor"):
        jaxfa.nn.factorise(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    for circular in ("CIRCULAR", "REFLECT"):
        with pytest.raises(ValueError, match="No factors can take the place"):
            jaxfa.nn.factorise(nnx.Conv(2, 2, (3, 3), padding=circular, rngs=nnx.Rngs(0)))
    options = {"preferred_element_type": jnp.float32}, {"promote_dtype": lambda arrays, dtype=None: arrays}
    own = [nnx.Linear(4, 3, rngs=nnx.Rngs(0), **options[0]), nnx.Conv(2, 3, (3,), rngs=nnx.Rngs(0), **options[1])]
    for layer in (*own, Doubled(4, 3, rngs=nnx.Rngs(0)), nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match=r"place of 'layers/0', a layer \w+: .*with their own __call__"):
            jaxfa.nn.factorise(nnx.Sequential(layer))
    normed = nnx.Sequential(nnx.SpectralNorm(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"'layers/0', an nnx.SpectralNorm, norms their weights"):
        attach(normed, rule, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"place of \['layers/0', 'layers/1'\].*not in a tuple"):
        jaxfa.nn.factorise(Tuple(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="has no factored layers"):
        jaxfa.nn.to_dense(Block(4, nnx.Rngs(0)))


@every_reading
def test_a_layer_that_starts_at_zero_is_refused_by_its_path(rule):
    # Under it nothing would ever learn.
    model = MLP(nnx.Rngs(0))
    model.fc3.kernel[...] = jnp.zeros_like(model.fc3.kernel[...])
    with pytest.raises(ValueError, match="weights of 'fc3' are all zero"):
        jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), example=inputs(5, 6))
    assert jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), example=inputs(5, 6), at=("fc1", "fc2"), allow="fc3")


def test_a_layer_keeps_its_dtype_and_takes_any_batch():
    conv = nnx.Conv(2, 3, (3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    factored = jaxfa.nn.factorise(conv)
    for x in (inputs(5, 5, 2), inputs(2, 4, 5, 5, 2)):
        assert factored(x).dtype == conv(x).dtype == jnp.bfloat16
        assert factored(x).shape == conv(x).shape
    nested = inputs(2, 4, 6)
    linear = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    chex.assert_trees_all_close(jaxfa.nn.factorise(linear)(nested), linear(nested), atol=1e-6)
    graph, state = nnx.split(jaxfa.nn.factorise(linear))
    again = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))
    chex.assert_trees_all_equal(again(nested), jaxfa.nn.factorise(linear)(nested))
