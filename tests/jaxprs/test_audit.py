"""The audit of a gradient: it must see backpropagation wherever it hides, and a rule wherever one is."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxfa
from jaxfa.jaxprs.audit import audit
from jaxfa.jaxprs.flows import OUTPUT, Passage
from jaxfa.jaxprs.versions import equations, opened, scan_parts, while_parts

W = {"below": jnp.ones((4, 4)), "above": jnp.ones((4, 4)), "head": jnp.ones((4, 3))}
X = jnp.ones((5, 4))


def look(network, rest=(), rest_names=()):
    """Audits ``network(weights, rest, x)`` whose weights are named by their keys."""
    return audit(network, W, rest, X, names=({name: name for name in W}, rest_names))


def dense(w, rest, x):
    return jnp.tanh(jnp.tanh(x @ w["below"]) @ w["above"]) @ w["head"]


def scanned(w, rest, x):
    stack = jnp.stack([w["below"], w["above"]])
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0] @ w["head"]


def conditional(w, rest, x):
    return lax.cond(x.sum() > 0, lambda h: h @ w["above"], lambda h: h, jnp.tanh(x @ w["below"])) @ w["head"]


def rematerialised(w, rest, x):
    return jax.checkpoint(lambda h: jnp.tanh(h @ w["above"]))(jax.jit(lambda x: x @ w["below"])(x)) @ w["head"]


def looped_below(w, rest, x):
    steps = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, x))[1]
    return (jnp.tanh(steps @ w["below"]) @ w["above"]) @ w["head"]


def chosen(w, rest, x):
    above = jnp.where(x.sum() > 0, w["above"], 2 * w["above"])
    return jnp.tanh(jnp.tanh(x @ w["below"]) @ lax.optimization_barrier((above, x))[0]) @ w["head"]


def cached(w, rest, x):
    layer = jax.jit(lambda h, w: jnp.tanh(h @ w))  # traced once for both: the equations are the same objects
    return layer(layer(x, w["below"]), w["above"]) @ w["head"]


def reshaped(w, rest, x):
    above = (2 * w["above"].T.reshape(2, 2, 4)).astype(jnp.float32).reshape(4, 4)
    return jnp.einsum("ni,ij->nj", jnp.tanh(x @ w["below"]), above) @ w["head"]


@pytest.mark.parametrize(
    "network", [dense, scanned, conditional, rematerialised, looped_below, reshaped, chosen, cached]
)
def test_backpropagation_is_seen_through_every_control_flow(network):
    found = look(network)
    assert Passage("weights", "head") in found.arrivals["below"]
    assert Passage("weights", "above") in found.arrivals["below"]
    assert found.arrivals["head"] == {OUTPUT}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_a_layerwise_rule_is_seen_and_nothing_else(wrap):
    def network(w, b, x):
        layer = wrap(jaxfa.linear)
        return layer(jnp.tanh(layer(jnp.tanh(x @ w["below"]), w["above"], b[0])), w["head"], b[1])

    key = jax.random.key(0)
    feedback = [jaxfa.fa().init(key, W["above"]), jaxfa.usf().init(key, W["head"])]
    names = [jaxfa.FixedFeedback("above"), jax.tree.map(lambda _: "head", feedback[1])]
    found = look(network, feedback, names)
    assert found.arrivals["below"] == {OUTPUT, Passage("rule", "above"), Passage("rule", "head")}
    assert found.arrivals["above"] == {OUTPUT, Passage("rule", "head")}


def test_half_a_rule_is_not_a_rule():
    def network(w, b, x):
        return jaxfa.linear(jnp.tanh(jnp.tanh(x @ w["below"]) @ w["above"]), w["head"], b)

    found = look(network, jaxfa.fa().init(jax.random.key(0), W["head"]), jaxfa.FixedFeedback("head"))
    assert found.arrivals["below"] == {OUTPUT, Passage("rule", "head"), Passage("weights", "above")}


def test_a_delivery_starts_a_new_way():
    def network(w, b, x):
        wire = jaxfa.error_wire(jnp.zeros((5, 3)))
        h = jnp.tanh(jnp.tanh(x @ w["below"]) @ w["above"])
        with jax.named_scope("tap[here]"):
            h, wire = jaxfa.direct(h, wire, b)
        return jaxfa.with_wire(h @ w["head"], wire, b)

    feedback = jaxfa.drtp().init(jax.random.key(0), jnp.ones((5, 4)), jnp.ones((5, 3)))
    found = look(network, feedback, jax.tree.map(lambda _: "", feedback))
    assert found.arrivals == {
        "below": {Passage("direct", "here"), Passage("weights", "above")},
        "above": {Passage("direct", "here")},
        "head": {OUTPUT},
    }


def test_uses_are_listed_with_what_is_first():
    found = look(dense)
    assert [(sorted(one.weights), one.first) for one in found.uses] == [
        (["below"], True),
        (["above"], False),
        (["head"], False),
    ]


def test_products_of_activations_and_of_weights_are_no_contractions_with_weights():
    def network(w, rest, x):
        h = x @ (w["below"] @ w["above"])  # one contraction, with weights made of two
        return (h @ h.T) @ (h @ w["head"])

    found = look(network)
    assert [sorted(one.weights) for one in found.uses] == [["above", "below"], ["head"]]
    # The error passes the product of the two weights on its way to each of them: a factor of a layer, not a layer.
    assert Passage("weights", "head") in found.arrivals["below"]


def test_every_use_is_listed_even_where_equations_are_shared():
    assert [(sorted(one.weights), one.first) for one in look(cached).uses] == [
        (["below"], True),
        (["above"], False),
        (["head"], False),
    ]


def test_weights_used_on_the_input_and_again_above_are_not_first():
    found = look(lambda w, rest, x: jnp.tanh(jnp.tanh(x @ w["above"]) @ w["above"]) + x @ w["above"])
    assert [(sorted(one.weights), one.first) for one in found.uses] == [(["above"], False)]


def test_a_shortcut_past_a_delivery_is_seen():
    def network(w, b, x):
        h = jnp.tanh(x @ w["below"])
        tapped, wire = jaxfa.direct(h, jaxfa.error_wire(jnp.zeros((5, 3))), b)
        return (tapped @ w["above"] + h) @ w["head"] + wire

    feedback = jaxfa.dfa().init(jax.random.key(0), jnp.ones((5, 4)), jnp.ones((5, 3)))
    found = look(network, feedback, jax.tree.map(lambda _: "", feedback))
    assert {step.kind for step in found.arrivals["below"]} == {"output", "weights", "direct"}


def test_scales_are_no_contractions():
    found = look(lambda w, rest, x: jnp.einsum("ni,i->ni", jnp.tanh(x @ w["below"]), w["above"][0]) @ w["head"])
    assert found.arrivals["below"] == {OUTPUT, Passage("weights", "head")}


def test_constants_and_what_is_carried_are_counted_in_every_version():
    def scan(w, b, x):
        return lax.scan(lambda c, row: ((c[0] @ w + b, c[1] + 1, row), c[2] * row), (x, 0, x[0]), x)

    def loop(w, b, x):
        return lax.while_loop(lambda c: c[1] < b, lambda c: (c[0] @ w, c[1] + 1), (x, 0.0))

    def parts(function, name, read):
        program = opened(jax.make_jaxpr(function)(W["below"], 3.0, X))
        (eqn,) = (eqn for eqn in equations(program) if eqn.primitive.name == name)
        return read(eqn)[1:]

    assert parts(scan, "scan", scan_parts) == (2, 3)
    assert parts(loop, "while", while_parts) == (1, 1)
