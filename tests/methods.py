"""The one table of methods, and a small network that takes any of them.

A new method is a new row: ``tests/rules/test_contract.py`` runs every row through every clause of the contract.
"""

import functools
import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfa
from jaxfa.base import is_direct, is_feedback
from jaxfa.nn.model.variables import init_at
from jaxfa.rules.forward_gradient import ForwardGradientFeedback, bind
from jaxfa.rules.pepita import InputModulation

SIZES = (7, 6, 5, 3)


class Method(NamedTuple):
    """A row.

    Attributes:
      name: what the test is called.
      rule: the rule.
      fixed: whether training leaves its feedback as it is, bit for bit.
      exact: whether its gradients are backpropagation's.
      batch: whether its signal is a statistic of the batch, which single examples have not.
      draws: whether it draws for each example of a batch, so that examples apart share their draws.
      second: whether it learns from a second pass, whose activities the last layer meets, too.
    """

    name: str
    rule: jaxfa.Rule
    fixed: bool
    exact: bool = False
    batch: bool = False
    draws: bool = False
    second: bool = False

    def __str__(self) -> str:
        return self.name


METHODS = (
    Method("backprop", jaxfa.backprop(), fixed=True, exact=True),
    Method("fa", jaxfa.fa(), fixed=True),
    Method("usf", jaxfa.usf(), fixed=True),
    Method("brsf", jaxfa.brsf(), fixed=False),
    Method("frsf", jaxfa.frsf(), fixed=True),
    Method("kolen_pollack", jaxfa.kolen_pollack(), fixed=False),
    Method("weight_mirror", jaxfa.weight_mirror(learning_rate=0.02), fixed=False),
    Method("dfa", jaxfa.dfa(), fixed=True),
    Method("dfa_shared", jaxfa.dfa(shared=True), fixed=True),
    Method("dfa_hashed", jaxfa.dfa(shared=True, buckets=8), fixed=True),
    Method("dkp", jaxfa.dkp(learning_rate=1e-2), fixed=False),
    Method("drtp", jaxfa.drtp(), fixed=True),
    Method("ldfa", jaxfa.ldfa(0.8), fixed=False, batch=True),
    Method("ldfa_fixed", jaxfa.ldfa(4, learn_p=False, learn_q=False), fixed=True),
    Method("normative_ldfa", jaxfa.normative_ldfa(2), fixed=False),
    Method("grape", jaxfa.grape(averaging=jaxfa.rules.kalman()), fixed=False),
    Method("fdfa", jaxfa.fdfa(), fixed=False),
    Method("forward_gradient", jaxfa.forward_gradient(), fixed=False, draws=True),
    Method("pepita", jaxfa.pepita(activation=jnp.tanh, scale=0.5), fixed=True, second=True),
    Method("pepita_mirrored", jaxfa.pepita(activation=jnp.tanh, scale=0.5, mirror=0.1), fixed=False, second=True),
    Method("ssa", jaxfa.ssa(), fixed=True),
    Method("ssa_sequential", jaxfa.ssa(parallel=False, gamma=1e-3), fixed=True),
    Method("ssa_transported", jaxfa.ssa(parallel=False, pull_feedback=True), fixed=False),
    Method("dldfa", jaxfa.dldfa(8), fixed=False, batch=True),
    Method("local_classifier", jaxfa.local_classifier(), fixed=False),
    Method("local_classifier_fixed", jaxfa.local_classifier(fixed=True), fixed=True),
    Method("predsim", jaxfa.predsim(), fixed=False, batch=True),
    Method("auglocal", jaxfa.auglocal(), fixed=False),
)


def create(
    rule: jaxfa.Rule, key: jax.Array, sizes: tuple[int, ...] = SIZES, dtype: Any = None, jit: bool = True
) -> tuple[Any, Any]:
    """Parameters ``[{"w", "b"}, ...]`` and their feedback."""
    rng = np.random.default_rng(0)
    dtype = dtype or jnp.zeros(()).dtype
    params = [
        {"w": jnp.asarray(rng.normal(size=(n, m)) / np.sqrt(n), dtype), "b": jnp.zeros(m, dtype)}
        for n, m in itertools.pairwise(sizes)
    ]
    if rule.weights is not None:
        params = [p | {"w": rule.weights(p["w"], f"layer {i}")} for i, p in enumerate(params)]
    return params, (create_feedback if jit else create_feedback.__wrapped__)(rule, key, params)


@functools.partial(jax.jit, static_argnums=0)
def create_feedback(rule: jaxfa.Rule, key: jax.Array, params: Any) -> Any:
    """Feedback per layer (none below the first), per hidden activation, or one for all of these."""
    keys = jax.random.split(key, len(params))
    if not is_direct(rule):
        return [None, *(rule.init(k, p["w"]) for k, p in zip(keys[1:], params[1:], strict=True))]
    *hidden, logits = [jax.ShapeDtypeStruct((2, *p["b"].shape), p["b"].dtype) for p in params]
    if rule.modulate is not None:
        return rule.init(keys[0], jax.ShapeDtypeStruct((2, params[0]["w"].shape[0]), logits.dtype), logits)
    layers = [jaxfa.Layer(jaxfa.linear, h, p["w"]) for h, p in zip(hidden, params[1:], strict=True)]
    blocks = [jaxfa.Layer(_block, one.x, (p, {})) for one, p in zip(layers, params[1:], strict=True)]
    known = [{"layer": one, "above": tuple(blocks[i:-1]), "below": i} for i, one in enumerate(layers)]
    feedback = [init_at(rule, **own)(k, own["layer"].x, logits) for k, own in zip(keys[1:], known, strict=True)]
    largest = max(range(len(hidden)), key=lambda i: hidden[i].shape)
    return feedback[largest] if feedback[0].shared else feedback


def _block(x: jax.Array, w: Any) -> jax.Array:
    """A hidden layer, as a rule is told of it."""
    return jnp.tanh(_affine(x, w[0], None))


def forward(params: Any, feedback: Any, x: jax.Array, activation: Any = jnp.tanh, taps: Any = None) -> jax.Array:
    """The logits; ``feedback=None`` is the plain network, to whose hidden activations ``taps`` are added."""
    nodes = jax.tree.leaves(feedback, is_leaf=is_feedback)
    hidden = len(params) - 1
    if nodes and isinstance(nodes[0], InputModulation):
        return jaxfa.rules.modulated(partial(tapped, activation), params, x, feedback)
    if nodes and isinstance(nodes[0], ForwardGradientFeedback) and nodes[0].moved is None:
        feedback = bind(lambda taps: forward(params, None, x, activation, taps), feedback)
    layers, ends = [None] * (hidden + 1), [None] * hidden
    if nodes and isinstance(nodes[0], jaxfa.DirectFeedback):
        ends = [feedback] * hidden if is_feedback(feedback) else feedback
    elif nodes:
        layers = feedback
    h = x
    wire = jaxfa.error_wire(jax.ShapeDtypeStruct((*x.shape[:-1], params[-1]["b"].size), x.dtype))
    for i, (p, layer, end) in enumerate(zip(params[:-1], layers[:-1], ends, strict=True)):
        h = activation(_affine(h, p, layer))
        h = h if taps is None else h + taps[i]
        h, wire = jaxfa.direct(h, wire, end)
    return jaxfa.with_wire(_affine(h, params[-1], layers[-1]), wire, ends)


def tapped(activation: Any, params: Any, x: jax.Array, tap: Any) -> jax.Array:
    """The logits; what hidden layers give is shown to ``tap`` before the activation."""
    for p in params[:-1]:
        x = activation(tap(_affine(x, p, None)))
    return _affine(x, params[-1], None)


def _affine(x: jax.Array, p: Any, feedback: Any) -> jax.Array:
    y = jaxfa.linear(x, p["w"], feedback)
    return y + jnp.broadcast_to(p["b"], y.shape)


def loss(params: Any, feedback: Any, x: jax.Array, y: jax.Array, activation: Any = jnp.tanh) -> jax.Array:
    """Mean softmax cross-entropy with class labels ``y``."""
    logits = forward(params, feedback, x, activation)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


signals = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=4)


@functools.partial(jax.jit, static_argnums=0)
def refine(rule: jaxfa.Rule, params: Any, feedback: Any, x: jax.Array, key: jax.Array) -> Any:
    """The rule's own phase before a step, on the plain network."""
    if isinstance(feedback, InputModulation):
        return rule.refine(lambda noise: forward(params, None, x + noise), feedback, key)
    if is_direct(rule):
        return rule.refine(lambda taps: forward(params, None, x, taps=taps), feedback, key)
    inputs = [jax.ShapeDtypeStruct((*x.shape[:-1], p["w"].shape[0]), x.dtype) for p in params[1:]]
    layers = [jaxfa.Layer(jaxfa.linear, x, p["w"]) for x, p in zip(inputs, params[1:], strict=True)]
    return rule.refine([None, *layers] if jax.tree.leaves(feedback) else feedback, feedback, key)


def train(rule: jaxfa.Rule, tx: optax.GradientTransformation) -> Any:
    """One training step ``((params, feedback), state, x, y, key) -> ((params, feedback), state)``."""
    tx = jaxfa.optimizer(tx, rule)

    def step(both: Any, state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        params, feedback = both
        both = params, refine(rule, params, feedback, x, key)
        updates, state = tx.update(signals(*both, x, y), state, both)
        return optax.apply_updates(both, updates), state

    return tx.init, step


def batch(examples: int = 8, dtype: Any = None) -> Any:
    """Inputs and labels of a task that has something to learn."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, SIZES[0]))
    y = np.argmax(x @ rng.normal(size=(SIZES[0], SIZES[-1])), axis=-1)
    return jnp.asarray(x, dtype or jnp.zeros(()).dtype), jnp.asarray(y)
