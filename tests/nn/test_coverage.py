"""Which way the error goes in whole models, as ``coverage()`` tells it, and who refuses what."""

import ast
import inspect
import pathlib
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from jaxfa.base import DirectFeedback, LayerFeedback
from jaxfa.nn.taps.describe import NOTHING
from tests.networks import (
    BLOCKS,
    MLP,
    MODELS,
    RawWeights,
    Recurrent,
    Residual,
    Scanned,
    Transformer,
    alignment,
    attach,
    inputs,
    loss,
)


def test_coverage_tells_how_every_error_travels():
    rows = attach(Residual(nnx.Rngs(0), 1), jaxfa.dfa(), inputs(9, 6), BLOCKS).coverage().rows
    assert [row[:4] for row in rows] == [
        ("stem", (6, 4), "direct, output of stem", "not needed: first"),
        ("blocks/0/up", (4, 4), "direct, output of blocks/0, then exact inside blocks/0", "not needed"),
        ("blocks/0/down", (4, 4), "direct, output of blocks/0", "exact inside blocks/0"),
        ("head", (4, 3), "exact: last", "not needed"),
    ]
    table = str(attach(MLP(nnx.Rngs(0)), jaxfa.backprop(), inputs(9, 6)).coverage())
    assert table.splitlines()[1].split() == ["fc1", "(6,", "8)", "backpropagation", "not", "needed:", "first"]
    table = str(attach(MLP(nnx.Rngs(0)), jaxfa.dfa(shared=True), inputs(9, 6)).coverage())
    assert table.count("SharedMatrix (8, 3) 96 B") == 2


def test_a_refusal_tells_eight_violations_and_how_many_there_are():
    for depth, rest in ((9, []), (12, ["- and 3 more."])):
        model = nnx.Sequential(*[nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(depth + 1)])
        with pytest.raises(ValueError, match="would not learn by the rule alone") as refused:
            attach(model, jaxfa.dfa(), inputs(9, 4), f"layers/{depth - 1}")
        told = [line for line in str(refused.value).splitlines() if line.startswith("- ")]
        assert told[8:] == rest
        assert str(refused.value).count("then backpropagation") == depth - 1


def test_attention_is_covered_projection_by_projection():
    rows = attach(Transformer(nnx.Rngs(0)), jaxfa.fa(), MODELS["transformer"][1]).coverage().rows
    assert {row.layer: row.feedback for row in rows if row.leaves == "through its feedback"} == {
        "block/attention/query": "FixedFeedback (6, 8) 192 B",
        "block/attention/key": "FixedFeedback (6, 8) 192 B",
        "block/attention/value": "FixedFeedback (6, 8) 192 B",
        "block/attention/out": "FixedFeedback (8, 6) 192 B",
        "head": "FixedFeedback (6, 11) 264 B",
    }


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell])
def test_recurrent_cells_are_covered(cell):
    rows = attach(Recurrent(nnx.Rngs(0), cell), jaxfa.fa(), inputs(9, 4, 6)).coverage().rows
    ways = {row.leaves for row in rows}
    assert ways == {"not needed: first", "through its feedback"}


def test_weights_that_would_stay_backprop_are_refused_by_name():
    x = inputs(9, 6)
    with pytest.raises(ValueError, match=r"'w' .*allow='w'"):
        attach(RawWeights(nnx.Rngs(0)), jaxfa.dfa(), x, "input of fc2")
    with pytest.raises(ValueError, match=r"'w' .*It is left out: name it in at=, too, or allow='w'"):
        jaxfa.nn.attach(RawWeights(nnx.Rngs(0)), jaxfa.fa(), rngs=nnx.Rngs(1), example=x, at="fc2")
    rows = attach(RawWeights(nnx.Rngs(0)), jaxfa.fa(), x, allow="w").coverage().rows
    assert {row.layer: row.leaves for row in rows}["w"] == "backpropagation, allowed"


def test_without_an_example_no_gradient_is_taken_unchecked():
    x = inputs(9, 6)
    unchecked = attach(RawWeights(nnx.Rngs(0)), jaxfa.fa(), None)
    unchecked(x)
    for gradient in (nnx.grad(loss), nnx.jit(nnx.grad(loss))):
        with pytest.raises(ValueError, match=r"'w' .*allow='w'"):
            gradient(unchecked, x)
    with pytest.raises(ValueError, match=r"give attach\(\) an example="):
        unchecked.coverage()
    aligned = attach(MLP(nnx.Rngs(0)), jaxfa.fa(), None)
    nnx.grad(loss)(aligned, x)
    assert [row.leaves for row in aligned.coverage(x).rows] == ["not needed: first", *["through its feedback"] * 2]


def test_frozen_weights_of_another_variable_type_are_refused():
    class Frozen(nnx.Variable):
        pass

    class Between(RawWeights):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.w = Frozen(jnp.ones((4, 4)))

    with pytest.raises(ValueError, match="'w' sends the error on to 'fc1/bias'"):
        attach(Between(nnx.Rngs(0)), jaxfa.fa(), inputs(9, 6))


def test_a_learned_query_is_an_activation():
    class Pooled(nnx.Module):
        def __init__(self, rngs):
            self.below = nnx.Linear(6, 6, rngs=rngs)
            self.probe = nnx.Param(jnp.ones((1, 1, 6)))
            self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)

        def __call__(self, x):
            return self.attention(jnp.broadcast_to(self.probe[...], (9, 1, 6)), jnp.tanh(self.below(x)))[:, 0]

    rows = attach(Pooled(nnx.Rngs(0)), jaxfa.fa(), inputs(9, 4, 6)).coverage().rows
    assert {row.layer for row in rows} == {"below", *(f"attention/{name}" for name in ("query", "key", "value", "out"))}


def test_flags_in_the_example_and_closures_over_a_direct_model():
    class Flagged(MLP):
        def __call__(self, x, double):
            return super().__call__(2 * x if double else x)

    x = inputs(9, 6)
    aligned = jaxfa.nn.attach(Flagged(nnx.Rngs(0)), jaxfa.dfa(), rngs=nnx.Rngs(1), example=(x, True))
    y = aligned(x, True)
    np.testing.assert_allclose(jax.jit(lambda x: aligned(x, True))(x), y, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda x: aligned(x[None], True)[0])(x), y, rtol=1e-5)
    jax.grad(lambda x: aligned(x, True).sum())(x)


def test_a_layer_that_ignores_its_dot_general_has_feedback_where_it_contracts():
    class Own(nnx.Linear):
        def __call__(self, x):
            return x @ self.kernel[...]

    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), Own(4, 3, rngs=nnx.Rngs(1)))
    rows = attach(model, jaxfa.fa(), inputs(9, 6)).coverage().rows
    assert [(row.layer, row.leaves) for row in rows] == [
        ("layers/0", "not needed: first"),
        ("layers/1", "through its feedback"),
    ]
    assert "FixedFeedback (4, 3) 48 B" in rows[1].feedback


@pytest.mark.parametrize(
    ("make", "at", "complaint"),
    [
        # A shortcut passes every tap by.
        (Residual, ("input of blocks/*/up", "input of head"), r"ways at once .*Name whole blocks"),
        (Residual, "blocks/*", r"'blocks/0/up' sends the error on to 'stem/bias', 'stem/kernel'"),
        (Transformer, ("embed", "block/attention"), r"'block/attention/key' sends the error on to 'block/norm/bias'"),
        (MLP, "fc1", r"'fc3' sends the error on to 'fc2/bias', 'fc2/kernel'"),
        (MLP, "layers/*", r"matches nothing; the paths here are \['fc1', 'fc2', 'fc3'\]"),
    ],
)
def test_direct_taps_in_wrong_places_are_refused(make, at, complaint):
    with pytest.raises(ValueError, match=complaint):
        attach(make(nnx.Rngs(0)), jaxfa.dfa(), MODELS["transformer"][1] if make is Transformer else inputs(9, 6), at)


def test_layerwise_rules_only_where_asked_and_the_rest_by_name():
    model, x = MLP(nnx.Rngs(0)), inputs(9, 6)
    with pytest.raises(ValueError, match="'fc3' sends the error on"):
        jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(1), example=x, at="fc2")
    aligned = jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(1), example=x, at="fc2", allow="fc3")
    found = alignment(aligned, x)
    assert found["fc2/kernel"].angle < 1e-3
    assert found["fc1/kernel"].angle > 10


class Chosen(MLP):
    def __call__(self, x):
        return super().__call__(x).argmax(-1)


class Scale(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return x * self.scale[...]


@pytest.mark.parametrize("rule", [jaxfa.fa(), jaxfa.kolen_pollack(), jaxfa.dfa(), jaxfa.grape()])
@pytest.mark.parametrize("make", [Chosen, Scale])
def test_a_model_in_which_nothing_would_learn_is_refused(make, rule):
    is_direct = isinstance(rule, jaxfa.DirectRule)
    words = "needs the model's logits" if is_direct and make is Chosen else "nothing here would learn by this rule"
    with pytest.raises(ValueError, match=words):
        attach(make(nnx.Rngs(0)), rule, inputs(9, 6))


def test_other_wrong_use_is_refused():
    model, x = MLP(nnx.Rngs(0)), inputs(9, 6)
    with pytest.raises(ValueError, match="needs example="):
        jaxfa.nn.attach(model, jaxfa.dfa(), rngs=nnx.Rngs(1))
    with pytest.raises(TypeError, match="expects an nnx"):
        jaxfa.nn.attach(lambda x: x, jaxfa.fa(), rngs=nnx.Rngs(1))
    with pytest.raises(TypeError, match=r"a jaxfa\.Rule"):
        jaxfa.nn.attach(model, "fa", rngs=nnx.Rngs(1))
    with pytest.raises(TypeError, match=r"nnx\.Rngs\(seed\)"):
        jaxfa.nn.attach(model, jaxfa.fa(), rngs=0)
    with pytest.raises(ValueError, match=r"these streams are \['params'\]: give it nnx\.Rngs\(feedback=seed\)"):
        jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(params=0))
    with pytest.raises(TypeError, match=r"Did you mean jaxfa\.fa\(\)\?") as forgotten:
        jaxfa.nn.attach(model, jaxfa.fa, rngs=nnx.Rngs(1))
    assert len(str(forgotten.value)) < 200
    with pytest.raises(ValueError, match="leave it out for this layer-wise rule"):
        jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(1), logits=lambda out: out)
    with pytest.raises(ValueError, match="Make the model first, or attach inside"):
        attach(nnx.eval_shape(lambda: MLP(nnx.Rngs(0))), jaxfa.fa(), x)
    nnx.eval_shape(lambda: attach(MLP(nnx.Rngs(0)), jaxfa.fa(), x))
    with pytest.raises(ValueError, match="matches nothing"):
        attach(model, jaxfa.fa(), x, allow="no/such")
    with pytest.raises(ValueError, match="was given none"):
        nnx.Optimizer(attach(model, jaxfa.dkp(), x), jaxfa.optimizer(optax.sgd(0.1), jaxfa.dkp()), wrt=nnx.Param)
    stacked = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    stacked.kernel = nnx.Param(jnp.ones((4, 3, 8)))
    with pytest.raises(ValueError, match="stack layers on axis 0"):
        attach(stacked, jaxfa.fa(), None)
    with pytest.raises(ValueError, match="already"):
        jaxfa.nn.attach(attach(model, jaxfa.fa(), x), jaxfa.fa(), rngs=nnx.Rngs(1), example=x)
    direct = attach(model, jaxfa.dfa(), x)
    np.testing.assert_array_equal(direct.model(x), model(x))
    with pytest.raises(RuntimeError, match=r"past the tap at 'fc[23]': call the attached model"):
        nnx.grad(lambda direct: direct.model(x).sum())(direct)
    unused = nnx.Sequential(MLP(nnx.Rngs(0)))
    unused.spare = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="never called"):
        attach(unused, jaxfa.dfa(), x, ("layers/0/*", "spare"))
    with pytest.raises(ValueError, match="inside the stack"):
        attach(Scanned(nnx.Rngs(0)), jaxfa.dfa(shared=True), x, ("stem", "blocks"))


def printed_by(function):
    """The words that a function puts together: its strings but for what it compares with."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    documented = ast.get_docstring(tree.body[0], clean=False)
    compared = {
        id(one)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare | ast.Set | ast.Tuple)
        for one in ast.walk(node)
    }
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {one.value.strip(" ,") for one in strings if id(one) not in compared and one.value != documented} - {""}


def test_every_word_of_the_table_is_explained_on_its_page():
    cover, ways = jaxfa.nn.coverage._Cover, jaxfa.nn.learning.how_it_learns
    arrives = printed_by(cover.arrives) | printed_by(cover.beside) | printed_by(cover.starts_of)
    leaves = printed_by(cover.leaves) | printed_by(cover.table)
    classes = [LayerFeedback, DirectFeedback]
    for one in classes:
        classes += one.__subclasses__()
    learns = printed_by(ways) | {one.learns for one in classes if one.__module__.startswith("jaxfa.")} - {""}
    assert {"through feedback", "then exact inside", "other terms of the loss alone:"} <= arrives
    assert {"not needed: first", "exact, entry by entry", "not followed"} <= leaves
    assert {"fixed", "by refine", "from the weights"} <= learns
    page = (pathlib.Path(__file__).parents[2] / "docs" / "coverage.md").read_text()
    spans = re.findall("`([^`]+)`", "\n".join(line for line in page.splitlines() if line.startswith("|")))
    words = {*arrives, *leaves, *learns, NOTHING, "input of", "output of", "parameter"}
    assert [word for word in sorted(words) if not any(word in span for span in spans)] == []
