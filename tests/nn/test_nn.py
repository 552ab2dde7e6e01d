"""``jaxfa.nn`` on whole models: they train by every kind of rule, and nothing else about them changes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from jaxfa.jaxprs.versions import equations, opened
from jaxfa.nn.learning import quiet
from tests.networks import (
    BLOCKS,
    LOOKS,
    MLP,
    MODELS,
    TRAINED,
    ConvNet,
    Residual,
    Scanned,
    Transformer,
    alignment,
    attach,
    inputs,
    loss,
)


def trainer(aligned, x, tx=None):
    """An ``nnx.Optimizer`` and one jitted step with it, in plain NNX style."""
    optimizer = nnx.Optimizer(aligned, jaxfa.optimizer(tx or optax.adamw(1e-2), aligned.rule), wrt=TRAINED)

    @nnx.jit
    def step(aligned, optimizer, key):
        aligned.refine(key, x)
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, TRAINED))(aligned, x)
        optimizer.update(aligned, grads)
        return value

    return optimizer, step


KINDS = {"kolen_pollack": jaxfa.kolen_pollack(), "brsf": jaxfa.brsf(), "dkp": jaxfa.dkp(), "ldfa": jaxfa.ldfa(1)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", KINDS)
def test_every_model_trains_by_every_kind_of_rule_through_nnx(name, rule):
    make, x, at = MODELS[name]
    model = make(nnx.Rngs(0))
    aligned = attach(model, KINDS[rule], x, at)
    np.testing.assert_array_equal(nnx.clone(aligned)(x), nnx.clone(model)(x))
    before = jax.tree.map(jnp.copy, nnx.state(aligned, *TRAINED))
    optimizer, step = trainer(aligned, x)
    assert np.isfinite([step(aligned, optimizer, jax.random.key(i)) for i in range(3)]).all()
    after = nnx.state(aligned, *TRAINED)
    jax.tree.map(
        lambda a, b: np.testing.assert_raises(AssertionError, np.testing.assert_array_equal, a, b), before[0], after[0]
    )
    for old, new in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True):
        assert not np.array_equal(old, new) or rule == "brsf"  # whose seed stays and whose step moves


def test_the_original_is_left_as_it_was_even_when_the_copy_is_donated():
    model, x = ConvNet(nnx.Rngs(0)), MODELS["conv, batch norm, dropout"][1]
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param, nnx.BatchStat)[0]))
    graphdef, state = nnx.split(attach(model, jaxfa.fa(), x))
    jax.jit(lambda state: jax.tree.map(lambda a: a, state), donate_argnums=0)(state)
    del graphdef
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert not hasattr(model.conv1, "feedback_tap")
    assert model.head.dot_general is jax.lax.dot_general
    model(x)


def test_paths_classes_and_parameters_stay_the_users():
    model = Residual(nnx.Rngs(0))
    aligned = attach(model, jaxfa.dfa(), inputs(9, 6), BLOCKS)
    assert isinstance(aligned.model.blocks[0], type(model.blocks[0]))
    ours, theirs = nnx.state(aligned.model, nnx.Param), nnx.state(model, nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


def test_feedback_has_a_variable_type_of_its_own():
    aligned = attach(MLP(nnx.Rngs(0)), jaxfa.fa(), inputs(9, 6))
    _, params, feedback, rest = nnx.split(aligned, nnx.Param, jaxfa.nn.Feedback, ...)
    assert len(jax.tree.leaves(params)) == 6
    assert [leaf.shape for leaf in jax.tree.leaves(feedback)] == [(8, 8), (8, 3)]  # none for the first layer
    assert not jax.tree.leaves(rest)


def test_taps_wait_for_each_other_only_where_a_gradient_is_run():
    attached = attach(MLP(nnx.Rngs(0)), jaxfa.dfa(), inputs(9, 6))

    def waiting(model):
        program = jax.make_jaxpr(lambda state: nnx.grad(loss)(nnx.merge(graph, state), inputs(9, 6)))
        graph, state = nnx.split(model)
        return sum(eqn.primitive.name == "optimization_barrier" for eqn in equations(opened(program(state))))

    looked_at = quiet(attached, is_run=False)
    assert (waiting(attached), waiting(quiet(attached)), waiting(looked_at)) == (2, 2, 0)


def test_nothing_is_traced_again_from_step_to_step():
    x = inputs(9, 8, 8, 3)
    aligned = attach(ConvNet(nnx.Rngs(0)), jaxfa.dkp(), x)
    graphdef, params, feedback, rest = nnx.split(aligned, *TRAINED, ...)
    traces = []

    @jax.jit
    def step(params, feedback, rest, x):
        traces.append(1)

        def objective(params, feedback):
            model = nnx.merge(graphdef, params, feedback, rest, copy=True)
            return loss(model, x), nnx.state(model, nnx.Not(nnx.Any(*TRAINED)))

        (grads, signals), rest_ = jax.grad(objective, (0, 1), has_aux=True)(params, feedback)
        params, feedback = jax.tree.map(lambda p, g: p - 0.1 * g, (params, feedback), (grads, signals))
        return params, feedback, rest_

    mean = rest["model"]["norm"]["mean"][...]
    for _ in range(3):
        params, feedback, rest = step(params, feedback, rest, x)
    assert len(traces) == 1
    assert not np.array_equal(mean, rest["model"]["norm"]["mean"][...])  # BatchNorm's statistics moved


def test_a_direct_rules_gradient_traces_the_model_once_where_its_example_tells_the_error():
    runs = []

    class Counted(MLP):
        def __call__(self, x):
            runs.append(x.shape)
            return super().__call__(x)

    attached = attach(Counted(nnx.Rngs(0)), jaxfa.dfa(), inputs(9, 6))
    last = attached.model.fc3
    for x, dtype, count in ((inputs(9, 6), None, 1), (inputs(4, 6), None, 2), (inputs(9, 6), jnp.bfloat16, 2)):
        last.dtype = dtype  # what the example says of the error is not so: the model is traced again
        runs.clear()
        found = nnx.grad(loss)(attached, x)["model"]["fc3"]["kernel"]
        assert len(runs) == count
        true = nnx.grad(loss)(jaxfa.nn.plain(attached), x)["fc3"]["kernel"]
        np.testing.assert_array_equal(found[...], true[...])


def test_seeds_by_vmap_are_the_seeds_one_by_one():
    x = inputs(9, 6)

    def run(key):
        aligned = attach_fresh(key, x)
        return nnx.state(aligned, *TRAINED), nnx.grad(loss, argnums=nnx.DiffState(0, TRAINED))(aligned, x)

    def attach_fresh(key, x):
        return jaxfa.nn.attach(MLP(nnx.Rngs(key)), jaxfa.dkp(), rngs=nnx.Rngs(jax.random.fold_in(key, 1)), example=x)

    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.jit(jax.vmap(run))(keys)
    for i, key in enumerate(keys):
        alone = jax.jit(run)(key)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), together, alone)


def test_pseudo_gradients_are_those_of_the_functional_core():
    x = inputs(9, 6)
    aligned = attach(MLP(nnx.Rngs(0)), jaxfa.dfa(), x)
    model = aligned.model
    feedback = [getattr(model, name).feedback_tap.feedback.get_value() for name in ("fc2", "fc3")]
    params = [(layer.kernel[...], layer.bias[...]) for layer in (model.fc1, model.fc2, model.fc3)]

    def functional(params):
        wire, h = jaxfa.error_wire(jnp.zeros((9, 3))), x
        for (w, b), end in zip(params[:-1], feedback, strict=True):
            h, wire = jaxfa.direct(nnx.relu(h @ w + b[None]), wire, end)
        return loss(lambda h: h @ params[-1][0] + params[-1][1][None] + wire, h)

    ours = nnx.grad(loss)(aligned, x)["model"]
    for name, (dw, db) in zip(("fc1", "fc2", "fc3"), jax.grad(functional)(params), strict=True):
        np.testing.assert_allclose(ours[name]["kernel"][...], dw, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(ours[name]["bias"][...], db, rtol=1e-5, atol=1e-7)


def test_the_shortcut_of_a_tapped_block_leaks_nothing():
    """What a block learns does not change with the weights above it while the output error is held."""
    x = inputs(9, 6)
    aligned = attach(Residual(nnx.Rngs(0)), jaxfa.dfa(), x, BLOCKS)
    e = inputs(9, 3)

    def signals(aligned):
        return nnx.grad(lambda model: jnp.sum(model(x) * e))(aligned)["model"]

    before = signals(nnx.clone(aligned))
    changed = nnx.clone(aligned)
    changed.model.blocks[1].down.kernel[...] *= -3.0
    after = signals(changed)
    jax.tree.map(np.testing.assert_array_equal, before["blocks"][0], after["blocks"][0])
    jax.tree.map(np.testing.assert_array_equal, before["stem"], after["stem"])
    true = [nnx.grad(lambda model: jnp.sum(model(x) * e))(jaxfa.nn.plain(a)) for a in (nnx.clone(aligned), changed)]
    assert not np.array_equal(true[0]["stem"]["kernel"][...], true[1]["stem"]["kernel"][...])  # backpropagation's do


def test_what_stays_exact():
    """The policy: with w as feedback everything is exact, so biases, norms and embeddings pass errors on truly."""
    tokens = MODELS["transformer"][1]
    copy = jaxfa.LayerRule(lambda key, w: jaxfa.FixedFeedback(w))
    found = alignment(attach(Transformer(nnx.Rngs(0)), copy, tokens), tokens)
    assert {"embed/embedding", "block/norm/scale", "block/norm/bias", "head/bias"} <= set(found)
    assert max(one.angle for one in found.values()) < 0.1
    # With a random one the last layer's kernel and bias alone stay exact.
    found = alignment(attach(Transformer(nnx.Rngs(0)), jaxfa.fa(), tokens), tokens)
    assert {path for path, one in found.items() if one.angle < 0.1} == {"head/kernel", "head/bias"}


def test_plain_shares_its_variables_and_serves_to_calibrate():
    x = inputs(9, 6)
    aligned = attach(Residual(nnx.Rngs(0)), jaxfa.dfa(), x, BLOCKS)
    twin = jaxfa.nn.plain(aligned)
    assert type(twin) is Residual
    assert type(twin.blocks[0]) is type(Residual(nnx.Rngs(0)).blocks[0])
    optimizer = nnx.Optimizer(twin, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(twin, nnx.grad(loss)(twin, x))
    assert twin.stem.kernel is aligned.model.stem.kernel
    np.testing.assert_array_equal(nnx.clone(aligned)(x), nnx.clone(twin)(x))


def test_alignment_changes_nothing_and_sees_one_dropout_mask():
    x = inputs(9, 8, 8, 3)
    aligned = attach(ConvNet(nnx.Rngs(0)), jaxfa.backprop(), x)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(aligned, nnx.Param, nnx.BatchStat, nnx.RngCount)[1]))
    found = alignment(aligned, x)
    assert max(one.angle for one in found.values()) < 1e-3
    after = nnx.to_pure_dict(nnx.state(aligned, nnx.Param, nnx.BatchStat, nnx.RngCount)[1])
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_the_mirror_sees_every_layer_of_a_model():
    x = inputs(9, 8, 8, 3)
    aligned = attach(ConvNet(nnx.Rngs(0)), jaxfa.weight_mirror(learning_rate=0.05), x)
    refine = nnx.jit(lambda aligned, key: aligned.refine(key, x))
    for i in range(150):
        refine(aligned, jax.random.key(i))
    found = jaxfa.nn.weight_angles(aligned)
    assert found.keys() == {"conv2", "head"}
    assert found["conv2"].shape == (2,)  # a convolution in two groups: a feedback, and an angle, for each
    assert all(np.all(angle < 25) for angle in found.values())


def test_the_mirror_reaches_into_a_stack():
    x = inputs(9, 6)
    aligned = attach(Scanned(nnx.Rngs(0)), jaxfa.weight_mirror(learning_rate=0.05), x)
    refine = nnx.jit(lambda aligned, key: aligned.refine(key, x))
    for i in range(150):
        refine(aligned, jax.random.key(i))
    layer = aligned.model.blocks.down
    for w, b in zip(layer.kernel[...], layer.dot_general.feedback.get_value().b, strict=True):
        assert jaxfa.diagnostics.angle(w, b) < 45


def test_a_direct_rules_refine_gets_the_plain_network_with_taps():
    x = inputs(9, 6)
    seen = {}

    def refine(forward, feedback, key):
        h = {"fc2": jnp.zeros((9, 8)), "fc3": jnp.zeros((9, 8))}
        seen["logits"], seen["tangent"] = jax.jvp(forward, (h,), (jax.tree.map(jnp.ones_like, h),))
        return jax.tree.map(lambda b: b + 1, feedback)

    rule = replace(jaxfa.dfa(), refine=refine)
    aligned = attach(MLP(nnx.Rngs(0)), rule, x)
    before = aligned.model.fc2.feedback_tap.feedback.get_value().b
    aligned.refine(jax.random.key(0), x)
    np.testing.assert_array_equal(seen["logits"], aligned(x))
    assert np.abs(seen["tangent"]).max() > 0
    np.testing.assert_array_equal(aligned.model.fc2.feedback_tap.feedback.get_value().b, before + 1)


def test_checkpoint_round_trip_through_orbax(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    x = inputs(9, 6)
    aligned = attach(Residual(nnx.Rngs(0)), jaxfa.dkp(), x, BLOCKS)
    optimizer, step = trainer(aligned, x)
    step(aligned, optimizer, jax.random.key(0))
    state = nnx.to_pure_dict(nnx.state((aligned, optimizer)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", state)
        checkpointer.wait_until_finished()
        blank = jax.tree.map(jnp.zeros_like, state)
        back = checkpointer.restore(tmp_path / "saved", blank)
    jax.tree.map(np.testing.assert_array_equal, state, back)
    assert jax.tree.structure(state) == jax.tree.structure(back)


def test_weight_angles_of_layers_and_of_stacks():
    x = inputs(9, 6)
    found = jaxfa.nn.weight_angles(attach(Scanned(nnx.Rngs(0)), jaxfa.fa(), x))
    assert {path: angle.shape for path, angle in found.items()} == {"blocks/up": (3,), "blocks/down": (3,), "head": ()}
    exact = attach(Scanned(nnx.Rngs(0)), jaxfa.LayerRule(lambda key, w: jaxfa.FixedFeedback(w)), x)
    np.testing.assert_allclose(jaxfa.nn.weight_angles(exact)["blocks/up"], 0, atol=1e-3)
    signs = jaxfa.nn.weight_angles(attach(MLP(nnx.Rngs(0)), jaxfa.usf(), x))
    assert all(angle < 60 for angle in signs.values())
    assert jaxfa.nn.weight_angles(attach(MLP(nnx.Rngs(0)), jaxfa.dfa(), x)) == {}


def test_one_optimizer_for_split_states_and_for_nnx_optimizer():
    x = inputs(9, 6)
    aligned = attach(MLP(nnx.Rngs(0)), jaxfa.kolen_pollack(), x)
    tx = jaxfa.optimizer(optax.adam(1e-2), aligned.rule)
    graphdef, *both = nnx.split(aligned, *TRAINED)
    grads = jax.grad(lambda both: loss(nnx.merge(graphdef, *both), x))(both)
    updates, _ = tx.update(grads, tx.init(both), both)
    functional = nnx.merge(graphdef, *optax.apply_updates(both, updates))
    optimizer = nnx.Optimizer(aligned, tx, wrt=TRAINED)
    optimizer.update(aligned, nnx.grad(loss, argnums=nnx.DiffState(0, TRAINED))(aligned, x))
    ours, theirs = nnx.state(functional), nnx.state(aligned)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_forward_mode_of_a_direct_model_says_where_to_have_it():
    x = inputs(9, 6)
    aligned = attach(MLP(nnx.Rngs(0)), jaxfa.dfa(), x)
    with pytest.raises(TypeError, match=r"no forward mode .* jaxfa\.nn\.plain\(model\)"):
        jax.jvp(aligned, (x,), (x,))
    jax.jvp(jaxfa.nn.plain(aligned), (x,), (x,))


@LOOKS
@pytest.mark.parametrize("rule", [jaxfa.dfa(), jaxfa.forward_gradient()], ids=["dfa", "forward_gradient"])
def test_second_derivatives_of_pseudo_gradients_are_refused(rule):
    x = inputs(9, 6)
    graph, params, rest = nnx.split(attach(MLP(nnx.Rngs(0)), rule, x), nnx.Param, ...)

    def of(params):
        return loss(nnx.merge(graph, params, rest), x)

    for second in (jax.hessian(of), jax.grad(lambda params: optax.tree.norm(jax.grad(of)(params)))):
        with pytest.raises(RuntimeError, match=r"derivative of no function.* jaxfa\.nn\.plain\(model\)"):
            second(params)
