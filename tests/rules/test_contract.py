"""The contract: every row of the table of methods meets every clause."""

import functools
import io
import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import jaxfa
from jaxfa.base import is_direct, is_feedback
from tests.methods import METHODS, SIZES, Method, batch, create, forward, loss, signals, train

KEYS = jax.random.split(jax.random.PRNGKey(7), 3)
STRONG = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1), optax.trace(0.5))


# One row of each kind of feedback; what takes long to compile all others meet in `make test-all`.
KINDS = "backprop", "fa", "brsf", "kolen_pollack", "dfa", "ldfa", "grape", "ssa"


# Each is much as another row is.
ALIKE = (
    "usf",
    "dfa_hashed",
    "ldfa_fixed",
    "ssa_sequential",
    "local_classifier_fixed",
    "predsim",
    "auglocal",
    "pepita_mirrored",
)


def law(words, quick=tuple(row.name for row in METHODS if row.name not in ALIKE)):
    """A clause of the contract: a test of every method, whose failure names method and law; ``quick`` ones first."""

    def clause(test):
        @functools.wraps(test)
        def run(method, **fixtures):
            try:
                test(method, **fixtures)
            except AssertionError as error:
                raise AssertionError(f"{method}: law {words!r} broken: {error}") from error

        rows = [pytest.param(row, marks=() if row.name in quick else pytest.mark.long) for row in METHODS]
        return pytest.mark.parametrize("method", rows, ids=str)(run)

    return clause


def assert_same_bits(a, b):
    chex.assert_trees_all_equal_structs(a, b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@law("the forward pass is the plain one, bit for bit")
def test_the_forward_pass_is_the_plain_one(method, x64):
    params, feedback = create(method.rule, KEYS[0])
    x, _ = batch()
    assert_same_bits(*jax.jit(lambda feedback: (forward(params, feedback, x), forward(params, None, x)))(feedback))


@law("jit is eager", quick=("fa", "dfa", "ldfa", "ssa"))
def test_jit_is_eager(method, x64):
    params, feedback = create(method.rule, KEYS[0])
    x, y = batch()
    eager = jax.grad(loss, argnums=(0, 1))(params, feedback, x, y)
    chex.assert_trees_all_close(signals(params, feedback, x, y), eager, atol=1e-14, rtol=1e-12)


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def nodes_of(feedback):
    return jax.tree.leaves(feedback, is_leaf=is_feedback)


class Training:
    """A jitted step that counts its traces, shared by the tests of one method."""

    def __init__(self, rule):
        self.init, self.step = train(rule, STRONG)
        self.traces = 0
        self.jitted = jax.jit(self.counted)

    def counted(self, *args):
        self.traces += 1
        return self.step(*args)

    def run(self, both, state, keys):
        for key in keys:
            both, state = self.jitted(both, state, *batch(), key)
        return both, state


training = functools.cache(Training)


@law("a run that is saved goes on bit for bit, and one trace serves it")
def test_a_checkpointed_run_continues_bit_for_bit_and_is_traced_once(method, x64):
    trained = training(method.rule)
    both = create(method.rule, KEYS[0])
    both, state = trained.run(both, trained.init(both), KEYS[:2])
    traces = trained.traces  # one, but for a process that has dropped its programs since
    file = io.BytesIO()
    np.savez(file, *jax.tree.leaves((both, state)))
    file.seek(0)
    arrays = np.load(file)
    saved = jax.tree.unflatten(jax.tree.structure((both, state)), [jnp.asarray(arrays[name]) for name in arrays])
    assert_same_bits(trained.run(*saved, KEYS[2:]), trained.run(both, state, KEYS[2:]))
    assert trained.traces == traces


OPTIONS = (
    Method("grape_ema", jaxfa.grape(averaging=0.9), fixed=False),
    Method("grape_plain", jaxfa.grape(tile=None, scaling=0.0), fixed=False),
    Method("fdfa_scaled", jaxfa.fdfa(scaling=0.3), fixed=False),
    Method("ldfa_labels", jaxfa.ldfa(2, labels="*"), fixed=False),
    Method("brsf_quantile", jaxfa.brsf(quantile=jnp.sqrt), fixed=False),
    Method("ssa_low_rank", jaxfa.ssa(rank=2), fixed=True),
    Method("calibrated", jaxfa.dkp(), fixed=False),
)


@pytest.mark.parametrize("method", METHODS + OPTIONS, ids=str)
def test_no_two_arrays_of_a_fresh_state_share_a_buffer_so_that_all_can_be_donated(method):
    both = create(method.rule, KEYS[0], jit=False)
    tx = jaxfa.optimizer(optax.chain(optax.adamw(1e-2), optax.trace(0.5)), method.rule)
    tx = jaxfa.calibrate(tx, every=2, optimizer=optax.adam(1e-2)) if method.name == "calibrated" else tx
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((both, tx.init(both)))]
    assert len(set(pointers)) == len(pointers)


def scanned(step, carry):
    return lax.scan(lambda carry, key: (step(*carry, *batch(), key), None), carry, KEYS)[0]


@law("a step keeps structure, shapes and dtypes")
def test_a_step_keeps_the_structure_shapes_and_dtypes_that_a_scan_asks_for(method, x64):
    trained, both = training(method.rule), create(method.rule, KEYS[0])
    carry = both, trained.init(both)
    chex.assert_trees_all_equal_shapes_and_dtypes(carry, jax.eval_shape(partial(scanned, trained.step), carry))


@law("a scan over steps is a loop", quick=())
def test_scan_over_steps_is_a_loop(method, x64):
    trained, both = training(method.rule), create(method.rule, KEYS[0])
    carry = both, trained.init(both)
    found = jax.jit(partial(scanned, trained.step))(carry)
    chex.assert_trees_all_close(found, trained.run(*carry, KEYS), atol=1e-12, rtol=1e-9)


@law("every weight learns, and feedback does if and only if it should")
def test_after_100_strong_steps_every_weight_has_moved_and_fixed_feedback_has_not(method, x64):
    trained = training(method.rule)
    both = create(method.rule, KEYS[0])
    (params, feedback), _ = trained.run(both, trained.init(both), np.asarray(KEYS)[np.arange(100) % 3])
    for before, after in zip(jax.tree.leaves(both[0]), jax.tree.leaves(params), strict=True):
        assert np.all(np.isfinite(after))
        assert np.linalg.norm((after - before).ravel()) > 0.05
    if method.fixed:
        assert_same_bits(feedback, both[1])
    else:
        for before, after in zip(nodes_of(both[1]), nodes_of(feedback), strict=True):
            changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
            assert max(jax.tree.leaves(changes)) > 1e-4
    assert loss(params, None, *batch()) < 0.8 * loss(both[0], None, *batch())


@law("vmap over seeds is a loop", quick=KINDS)
def test_vmap_over_seeds_is_a_loop(method, x64):
    x, y = batch()

    seeds = [create(method.rule, key) for key in KEYS]
    seeds = [(jax.tree.map(lambda leaf, i=i: leaf + 0.1 * i, params), b) for i, (params, b) in enumerate(seeds)]
    loop = [signals(*both, x, y) for both in seeds]
    stacked = jax.jit(jax.vmap(signals, in_axes=(0, 0, None, None)))(*stack(seeds), x, y)
    chex.assert_trees_all_close(stacked, stack(loop), atol=1e-14, rtol=1e-12)


@law("examples' gradients average to their batch's", quick=(*KINDS, "dldfa"))
def test_gradients_of_examples_average_to_the_gradient_of_their_batch(method, x64):
    params, feedback = create(method.rule, KEYS[0])
    x, y = batch()
    if method.batch:
        with pytest.raises(ValueError, match="one error alone"):
            jax.vmap(signals, in_axes=(None, None, 0, 0))(params, feedback, x, y)
        return
    each = jax.jit(jax.vmap(signals, in_axes=(None, None, 0, 0)))(params, feedback, x, y)
    mean = jax.tree.map(lambda leaf: leaf.mean(0), each)
    whole = signals(params, feedback, x, y)
    if method.draws:
        assert not np.allclose(mean[0][0]["w"], whole[0][0]["w"])
        alone = [signals(params, feedback, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        whole = jax.tree.map(lambda leaf: leaf.mean(0), stack(alone))
    chex.assert_trees_all_close(mean, whole, atol=1e-14, rtol=1e-12)


@law("no batch learns from another's error")
def test_what_batches_side_by_side_teach_is_the_sum_of_what_each_teaches(method, x64):
    # The gradient of a vmap: no batch may learn from another's error.
    both = create(method.rule, KEYS[0])
    x, y = batch()
    x, y = np.stack([x, -2 * x]), np.stack([y, y])

    def total(params, feedback):
        return jnp.sum(jax.vmap(lambda x, y: loss(params, feedback, x, y))(x, y))

    want = jax.tree.map(np.add, *(signals(*both, *one) for one in zip(x, y, strict=True)))
    chex.assert_trees_all_close(jax.jit(jax.grad(total, (0, 1)))(*both), want, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long), "float64"])
@law("gradients and signals keep dtype and shape")
def test_gradients_and_signals_keep_the_dtype_and_shape_of_what_they_change(method, dtype, x64):
    def run(key):
        params, feedback = create(method.rule, key, dtype=dtype)
        x, y = batch(dtype=dtype)
        both = (params, feedback)
        init, step = train(method.rule, optax.adamw(1e-2))
        return both, signals(*both, x, y), step(both, init(both), x, y, key)[0]

    both, changes, after = jax.eval_shape(run, KEYS[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(both[0])} == {jnp.dtype(dtype)}
    chex.assert_trees_all_equal_shapes_and_dtypes(both, changes, after)


@law("bfloat16 is near the exact values", quick=("fa", "brsf", "dfa", "ldfa"))
def test_bfloat16_gradients_are_near_the_exact_ones(method, x64):
    params, feedback = create(method.rule, KEYS[0])
    x, y = batch()
    exact = signals(params, feedback, x, y)[0]

    def narrow(tree):  # all of it, as mixed-precision code does: a counter or a key kept as one float would break
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    rough = signals(narrow(params), narrow(feedback), narrow(x), y)[0]
    for a, b in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
        assert jnp.linalg.norm((a - b).ravel()) <= 0.05 * jnp.linalg.norm(b.ravel())


@law("the rule is at work below the last layer and only there")
def test_the_rule_is_at_work_below_the_last_layer_and_only_there(method, x64):
    params, feedback = create(method.rule, KEYS[0])
    x, y = batch()
    pseudo, true = signals(params, feedback, x, y)[0], signals(params, None, x, y)[0]
    if method.second:  # the last layer meets the second pass's activities; its bias meets the error alone
        assert not np.allclose(pseudo[-1]["w"], true[-1]["w"], rtol=0.01)
        pseudo[-1]["w"] = true[-1]["w"]
    chex.assert_trees_all_close(pseudo[-1], true[-1], atol=1e-15, rtol=1e-12)
    for layer, (p, t) in enumerate(zip(pseudo[:-1], true[:-1], strict=True)):
        for name in p:
            mine, theirs = ravel_pytree(p[name])[0], ravel_pytree(t[name])[0]
            apart = jnp.linalg.norm(mine - theirs) / jnp.linalg.norm(theirs)
            assert apart == 0 if method.exact else apart > 0.01, (layer, name)


@law("only backpropagation agrees with finite differences")
def test_finite_differences_agree_with_backpropagation_alone(method, x64):
    params, feedback = create(method.rule, KEYS[0])
    x, y = batch()
    direction = jax.tree.map(lambda leaf: jax.random.normal(KEYS[2], leaf.shape), params)

    def moved(by):
        return loss(jax.tree.map(lambda p, d: p + by * d, params, direction), feedback, x, y)

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    claimed = optax.tree.vdot(signals(params, feedback, x, y)[0], direction)
    assert (abs(claimed - slope) < 1e-8) == method.exact
    assert method.exact or abs(claimed - slope) > 1e-3


@law("a rule's family is its feedback's")
def test_the_family_of_a_rule_is_that_of_its_feedback(method, x64):
    _, feedback = create(method.rule, KEYS[0])
    family = jaxfa.DirectFeedback if is_direct(method.rule) else jaxfa.LayerFeedback
    nodes = nodes_of(feedback)
    assert all(isinstance(node, family) for node in nodes)
    assert bool(nodes) != method.exact
    again = jax.tree.unflatten(jax.tree.structure(feedback), jax.tree.leaves(feedback))
    assert type(again) is type(feedback)
    assert_same_bits(again, create(method.rule, KEYS[0])[1])


DIGITS = (64, 16, 16, 10)
FROZEN = jaxfa.fa(scale=0.0)  # no error comes through: the output layer alone learns


LEARN_DIGITS = "fa", "dfa", "ldfa"


@functools.cache
def train_on_digits(rule):
    """Training loss and test accuracy after 400 steps."""
    data = load_digits()
    images, labels = (data.data / 8 - 1).astype(np.float32), data.target.astype(np.int32)
    chosen = np.random.default_rng(0).integers(0, 1400, (400, 64))
    init, step = train(rule, optax.adam(3e-3))

    @jax.jit
    def run(both):
        def one(carry, given):
            return step(*carry, *given), None

        given = images[chosen], labels[chosen], jax.random.split(KEYS[2], 400)
        ((params, _), _), _ = lax.scan(one, (both, init(both)), given)
        right = jnp.argmax(forward(params, None, images[1400:]), -1) == labels[1400:]
        return loss(params, None, images[:1400], labels[:1400]), right.mean()

    return jax.tree.map(float, run(create(rule, KEYS[0], DIGITS)))


@law("it learns digits, hidden layers and all", quick=LEARN_DIGITS)
def test_every_rule_learns_digits_and_its_hidden_layers_have_a_part_in_it(method):
    frozen_loss, frozen_accuracy = train_on_digits(FROZEN)
    final_loss, accuracy = train_on_digits(method.rule)
    assert accuracy > 0.75
    assert accuracy > frozen_accuracy
    assert final_loss < 0.75 * frozen_loss


def test_no_two_classes_of_feedback_have_equal_structures(x64):
    # jit and scan look their programs up by structure: were two equal, one rule would at times run as another.
    nodes = {type(node): node for method in METHODS for node in nodes_of(create(method.rule, KEYS[0])[1])}
    nodes[jaxfa.DirectMatrix] = jaxfa.DirectMatrix(jnp.ones((5, 3)))
    structures = [jax.tree.structure(node) for node in nodes.values()]
    assert len(structures) >= 8
    for a, b in itertools.combinations(structures, 2):
        assert a != b


def test_the_table_names_each_method_once():
    assert len({method.name for method in METHODS}) == len(METHODS)
    assert len(SIZES) >= 4  # two hidden layers: in one, feedback alignment and its direct form are the same
