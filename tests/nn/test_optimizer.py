"""Optimizers of Flax models: what they are shown, and wrappers around them, inside and outside."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from tests.networks import MLP, TRAINED, attach, inputs, loss

X = inputs(9, 6)
RULES = {
    "backprop": jaxfa.backprop(),
    "fa": jaxfa.fa(),
    "kolen_pollack": jaxfa.kolen_pollack(weight_decay=0.1),
    "dkp": jaxfa.dkp(),
    "ldfa": jaxfa.ldfa(2),
    "dldfa": jaxfa.dldfa(2),
    "ssa": jaxfa.ssa(parallel=False, pull_feedback=True),
}
WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda r: optax.chain(tx, optax.scale(r)))(r=0.5),
}


def train(model, optimizer, wrt, steps=3, **extra):
    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model, X)
        optimizer.update(model, grads)

    for _ in range(steps):
        step(model, optimizer)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("rule", RULES)
def test_wrappers_outside_hold_the_pair(rule, wrapper):
    aligned, other = (attach(MLP(nnx.Rngs(0)), RULES[rule], X) for _ in range(2))
    tx = jaxfa.optimizer(optax.adam(0.1), RULES[rule])
    train(aligned, jaxfa.nn.Optimizer(aligned, WRAPPERS[wrapper](tx)), TRAINED, steps=2)
    # Without Flax's optimizer, on the same gradients.
    graph, both, rest = nnx.split(other, nnx.filterlib.to_predicate(nnx.Any(*TRAINED)), ...)
    both, plain = nnx.as_pure(both), WRAPPERS[wrapper](tx)
    state = plain.init(both)

    @jax.jit
    def step(both, state):
        grads = jax.grad(lambda both: loss(nnx.merge(graph, both, rest), X))(both)
        updates, state = plain.update(grads, state, both)
        return optax.apply_updates(both, updates), state

    for _ in range(2):
        both, state = step(both, state)
    after = nnx.as_pure(nnx.state(aligned, nnx.Any(*TRAINED)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after, both)


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("rule", ["backprop", "kolen_pollack", "ssa"])
def test_a_mask_tree_of_the_parameters_made_before_or_after_attaching_is_what_plain_flax_takes(rule, made):
    aligned, twin = (attach(MLP(nnx.Rngs(0)), RULES[rule], X) for _ in range(2))

    def masks(tree):  # one entry for a weight that is factors, if the tree is of the model before
        return jax.tree_util.tree_map_with_path(lambda path, _: "bias" not in jax.tree_util.keystr(path), tree)

    def optimizer(model, mask):
        tx = jaxfa.optimizer(optax.adamw(0.1, mask=mask), RULES[rule])
        return nnx.Optimizer(model, tx, wrt=TRAINED)

    of = MLP(nnx.Rngs(0)) if made == "before" else aligned
    train(aligned, optimizer(aligned, masks(nnx.as_pure(nnx.state(of, nnx.Param)))), TRAINED)
    if rule == "backprop":
        train(twin, nnx.Optimizer(twin, optax.adamw(0.1, mask=masks), wrt=nnx.Param), nnx.Param)
    else:
        train(twin, optimizer(twin, masks), TRAINED)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(aligned, nnx.Param), nnx.state(twin, nnx.Param))


@pytest.mark.parametrize("rule", ["fa", "kolen_pollack", "dkp", "ssa"])
def test_labels_of_the_model_before_attaching_are_those_of_the_model_after(rule):
    aligned, twin = (attach(MLP(nnx.Rngs(0)), RULES[rule], X) for _ in range(2))

    def labels(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: "fc2" in jax.tree_util.keystr(path), tree)

    def partition(labels):
        return optax.partition({True: optax.set_to_zero(), False: optax.adam(0.01)}, labels)

    for model, given in ((aligned, labels(nnx.as_pure(nnx.state(MLP(nnx.Rngs(0)), nnx.Param)))), (twin, labels)):
        optimizer = nnx.Optimizer(model, jaxfa.optimizer(partition(given), RULES[rule]), wrt=TRAINED)
        train(model, optimizer, TRAINED, steps=2)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(aligned, TRAINED), nnx.state(twin, TRAINED))


def test_in_a_flax_layer_labels_by_name_keep_kolen_pollacks_law():
    rule = RULES["kolen_pollack"]
    aligned = attach(MLP(nnx.Rngs(0)), rule, X)

    def labels(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: "fc2" in jax.tree_util.keystr(path), tree)

    tx = optax.partition({True: optax.set_to_zero(), False: optax.adam(0.01)}, labels)
    optimizer = nnx.Optimizer(aligned, jaxfa.optimizer(tx, rule), wrt=TRAINED)

    def apart(name):
        layer = aligned.model[name] if isinstance(aligned.model, dict) else getattr(aligned.model, name)
        return np.asarray(layer.kernel[...] - layer.dot_general.feedback.get_value().b)

    before = {name: apart(name) for name in ("fc2", "fc3")}
    train(aligned, optimizer, TRAINED, steps=3)
    np.testing.assert_array_equal(apart("fc2"), before["fc2"])
    np.testing.assert_allclose(apart("fc3"), 0.9**3 * before["fc3"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["fa", "kolen_pollack"])
def test_a_mask_tree_that_does_not_fit_is_refused_in_words(rule):
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, nnx.as_pure(nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))))
    tx = jaxfa.optimizer(optax.adamw(0.1, mask=mask), RULES[rule])
    with pytest.raises(ValueError, match=r"nnx\.state\(model, nnx\.Param\)\), before or after jaxfa\.nn\.attach"):
        nnx.Optimizer(attach(MLP(nnx.Rngs(0)), RULES[rule], X), tx, wrt=TRAINED)


SEARCH = optax.scale_by_backtracking_linesearch(6)
UNATTACHED = jax.tree.map(lambda _: True, nnx.as_pure(nnx.state(nnx.eval_shape(lambda: MLP(nnx.Rngs(0))), nnx.Param)))


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.sgd(4.0), SEARCH),
        optax.lbfgs(linesearch=SEARCH),
        optax.chain(optax.masked(optax.sgd(4.0), UNATTACHED), SEARCH),
    ],
    ids=["sgd", "lbfgs", "mask of the model before"],
)
@pytest.mark.parametrize("rule", ["backprop", "fa"])
def test_a_line_search_searches_along_the_parameters(rule, tx):
    aligned = attach(MLP(nnx.Rngs(0)), RULES[rule], X)
    optimizer = nnx.Optimizer(aligned, jaxfa.optimizer(tx, RULES[rule]), wrt=TRAINED)
    graph, both, rest = nnx.split(aligned, nnx.filterlib.to_predicate(nnx.Any(*TRAINED)), ...)

    def value_fn(both):
        return loss(nnx.merge(graph, both, rest, copy=True), X)

    start = value_fn(both)
    for _ in range(3):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, TRAINED))(aligned, X)
        optimizer.update(aligned, grads, value=value, grad=grads, value_fn=value_fn)
    assert loss(aligned, X) < start


@pytest.mark.parametrize("rule", ["kolen_pollack", "ldfa", "dkp", "fa"])
def test_a_gradient_without_the_feedback_is_refused(rule):
    model = attach(MLP(nnx.Rngs(0)), RULES[rule], X)
    tx = jaxfa.optimizer(optax.adam(0.1), RULES[rule])
    optimizer = nnx.Optimizer(model, tx, wrt=TRAINED)
    with pytest.raises(ValueError, match=r"made with 2 feedbacks, and the gradient has 0: .*DiffState\(0, learned\)"):
        optimizer.update(model, nnx.grad(loss)(model, X))


def test_the_feedback_of_a_frozen_layer_is_frozen_as_the_error_says():
    class Frozen(nnx.Variable):
        pass

    mlp = MLP(nnx.Rngs(0))
    mlp.fc2.kernel = Frozen(mlp.fc2.kernel[...])
    rule = RULES["kolen_pollack"]
    model = attach(mlp, rule, X)
    tx = jaxfa.optimizer(optax.adam(0.1), rule)
    with pytest.raises(ValueError, match=r"[Ff]reeze both.* nnx\.Not\(nnx\.PathContains\('name'\)\)"):
        nnx.Optimizer(model, tx, wrt=TRAINED)
    learned = (nnx.Param, nnx.All(jaxfa.nn.Feedback, nnx.Not(nnx.PathContains("fc2"))))
    before = nnx.clone(model).model
    train(model, nnx.Optimizer(model, tx, wrt=learned), learned, steps=1)
    feedback = [
        [getattr(one, name).dot_general.feedback.get_value().b for name in ("fc2", "fc3")]
        for one in (before, model.model)
    ]
    moved = [bool((a != b).any()) for a, b in zip(*feedback, strict=True)]
    assert moved == [False, True]


def test_a_wrapper_that_keeps_copies_fails_in_flaxs_own_optimizer_as_the_page_says():
    rule = RULES["kolen_pollack"]
    model = attach(MLP(nnx.Rngs(0)), rule, X)
    tx = optax.MultiSteps(jaxfa.optimizer(optax.adam(0.1), rule), 2)
    with pytest.raises(ValueError, match="pytree structure error"):
        train(model, nnx.Optimizer(model, tx, wrt=TRAINED), TRAINED)
