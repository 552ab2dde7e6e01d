"""Where a direct rule taps if nobody says, what is said of it, and what else at= may name."""

import ast
import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from jaxfa.nn.taps.tap import taps_of
from tests.networks import MLP, Residual, attach, inputs, loss

EVERY = "tapped: the input of every layer but the first"
SHORTCUTS = "; not the input of every layer, since shortcuts pass layers by"


class Gated(nnx.Module):
    """Two layers read one activation."""

    def __init__(self, rngs):
        self.below, self.gate, self.up, self.head = (nnx.Linear(6, m, rngs=rngs) for m in (6, 6, 6, 3))

    def __call__(self, x):
        h = nnx.relu(self.below(x))
        return self.head(nnx.silu(self.gate(h)) * self.up(h))


class Block(nnx.Module):
    """A norm, attention with one head, to what is given or to itself, a layer; shortcuts around both."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.q, self.k, self.v, self.mlp = (nnx.Linear(6, 6, rngs=rngs) for _ in range(4))

    def __call__(self, x, memory=None):
        h = self.norm(x)
        memory = h if memory is None else memory
        x = x + nnx.softmax(self.q(h) @ self.k(memory).swapaxes(1, 2)) @ self.v(memory)
        return x + nnx.relu(self.mlp(x))


class Transformer(nnx.Module):
    """Norms come first, positions are a parameter, and the head is the table of words."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (1, 4, 6)))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(6, rngs=rngs)

    def __call__(self, words):
        x = self.embed(words) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class Translator(nnx.Module):
    """An encoder, and a decoder that reads it; one table of words for both."""

    def __init__(self, rngs):
        self.embed, self.head = nnx.Embed(7, 6, rngs=rngs), nnx.Linear(6, 7, rngs=rngs)
        self.encoder, self.decoder = (nnx.List([Block(rngs) for _ in range(2)]) for _ in range(2))

    def __call__(self, words):
        memory, x = self.embed(words[:, :3]), self.embed(words)
        for block in self.encoder:
            memory = block(memory)
        for block in self.decoder:
            x = block(x, memory)
        return self.head(x)


class Wrapped(nnx.Module):
    """Chains of layers and of blocks, one in the other."""

    def __init__(self, rngs):
        chain = nnx.Sequential(nnx.Linear(6, 5, rngs=rngs), nnx.tanh, nnx.Linear(5, 6, rngs=rngs))
        blocks = nnx.Sequential(Block(rngs), Block(rngs))
        self.net = nnx.Sequential(chain, blocks, nnx.Linear(6, 3, rngs=rngs))

    def __call__(self, x):
        return self.net(x)


WORDS = jax.random.randint(jax.random.key(0), (9, 4), 0, 7)
CHOICES = {
    "MLP": (MLP, inputs(9, 6), EVERY),
    "gated": (Gated, inputs(9, 6), EVERY),
    "residual": (lambda rngs: Residual(rngs, 2), inputs(9, 6), f"tapped: stem, blocks/*{SHORTCUTS}"),
    "transformer": (Transformer, WORDS, f"tapped: input of blocks/0, blocks/*{SHORTCUTS}"),
    "encoder and decoder": (
        Translator,
        WORDS,
        f"tapped: input of encoder/0, input of decoder/0, encoder/*, decoder/*{SHORTCUTS}",
    ),
    "chains": (
        Wrapped,
        inputs(9, 4, 6),
        f"tapped: input of net/layers/0/layers/2, net/layers/0, net/layers/1/layers/*{SHORTCUTS}",
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_without_at_the_finest_places_are_tapped_that_no_error_passes_by(name):
    make, x, words = CHOICES[name]
    aligned = attach(make(nnx.Rngs(0)), jaxfa.dfa(), x)
    assert str(aligned.coverage()).splitlines()[-1] == words
    assert aligned.coverage().violations == ()
    np.testing.assert_array_equal(aligned(x), make(nnx.Rngs(0))(x))
    gradient = nnx.jit(nnx.grad(lambda model: (model(x) ** 2).sum()))(aligned)["model"]
    # A shift of all keys leaves softmax as it is, and one of all examples a batch norm.
    still = [path for path, leaf in nnx.to_flat_state(gradient) if not np.abs(leaf[...]).max() > 1e-4]
    assert {path[-2:] for path in still} <= {("k", "bias"), ("up", "bias")}


def test_a_table_at_both_ends_learns_from_each_by_itself():
    aligned = attach(Transformer(nnx.Rngs(0)), jaxfa.dfa(), WORDS)
    rows = {row.layer: row.arrives for row in aligned.coverage().rows}
    assert rows["embed/embedding"] == "the output and direct, input of blocks/0"
    assert rows["positions"] == "direct, input of blocks/0"


def test_at_may_name_the_input_of_a_module():
    x = inputs(9, 6)
    ours = attach(MLP(nnx.Rngs(0)), jaxfa.dfa(), x, ("input of fc2", "input of fc3"))
    theirs = attach(MLP(nnx.Rngs(0)), jaxfa.dfa(), x)
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(model) for model in (ours, theirs)))
    rows = (model.coverage().rows for model in (ours, theirs))
    assert next(rows) == next(rows)
    # What the one block returns is what the other is given: one tap.
    both = attach(Residual(nnx.Rngs(0), 2), jaxfa.dfa(), x, ("stem", "blocks/*", "input of blocks/1"))
    assert sorted(taps_of(both.model)) == ["blocks/0", "blocks/1", "stem"]


class Prompted(nnx.Module):
    """Reads its input behind a learned prompt."""

    def __init__(self):
        self.prompt = nnx.Param(jax.random.normal(jax.random.key(3), (1, 2, 6)))
        self.read, self.head = (nnx.Linear(6, m, rngs=nnx.Rngs(m)) for m in (6, 3))

    def __call__(self, x):
        prompt = jnp.broadcast_to(self.prompt[...], (len(x), 2, 6))
        h = self.read(jnp.concatenate([prompt, x], axis=1))
        return self.head(jnp.tanh(h).mean(1))


@pytest.fixture
def prompted():
    return attach(Prompted(), jaxfa.dfa(), inputs(9, 4, 6), ("prompt", "read"))


def test_at_may_name_a_parameter_that_learns_the_sum_of_what_is_delivered(prompted):
    x, e = inputs(9, 4, 6), inputs(9, 3)
    gradient = nnx.grad(lambda model: (model(x) * e).sum())(prompted)["model"]["prompt"][...]
    b = prompted.model.feedback_tap_prompt.feedback.get_value().b
    assert b.shape == (2, 6, 3)
    np.testing.assert_allclose(gradient[0], jnp.einsum("nc,tdc->td", e, b), rtol=1e-5)
    rows = {row.layer: row.arrives for row in prompted.coverage().rows}
    assert rows["prompt"] == "direct, parameter prompt"
    before = Prompted().prompt[...]
    np.testing.assert_array_equal(prompted.model.prompt[...], before)


def test_the_jacobian_at_a_parameter_is_that_at_all_of_its_copies():
    x = inputs(9, 4, 6)
    aligned = attach(Prompted(), jaxfa.fdfa(learning_rate=0.02, scaling=0.0), x, ("prompt", "read"))
    refine = nnx.jit(lambda aligned, key: aligned.refine(key, x))
    for key in jax.random.split(jax.random.key(0), 400):
        refine(aligned, key)
    model = Prompted()

    def logits(prompt):
        h = model.read(jnp.concatenate([jnp.broadcast_to(prompt, (9, 2, 6)), x], axis=1))
        return model.head(jnp.tanh(h).mean(1)).mean(0)

    true = jnp.moveaxis(jax.jacrev(logits)(model.prompt[0]), 0, -1)
    b = aligned.model.feedback_tap_prompt.feedback.get_value().b
    assert jaxfa.diagnostics.angle(b, true) < 30


@pytest.mark.parametrize(("name", "at"), [("MLP", "fc1"), ("residual", "blocks/*"), ("transformer", "blocks/*")])
def test_a_refusal_says_what_would_do(name, at):
    make, x, _ = CHOICES[name]
    with pytest.raises(ValueError, match="would do") as refused:
        attach(make(nnx.Rngs(0)), jaxfa.dfa(), x, at)
    told = re.search(r"^at=(\(.*\)) would do\.$", str(refused.value), re.MULTILINE)
    assert attach(make(nnx.Rngs(0)), jaxfa.dfa(), x, ast.literal_eval(told[1])).coverage().violations == ()


class Merged(nnx.Module):
    """Examples and steps are one axis inside."""

    def __init__(self, rngs):
        self.a, self.b, self.c = (nnx.Linear(6, m, rngs=rngs) for m in (6, 6, 3))

    def __call__(self, x):
        h = nnx.relu(self.b(nnx.relu(self.a(x.reshape(-1, 6)))))
        return self.c(h.reshape(*x.shape).mean(1))


def test_a_refusal_says_why_nothing_would_do():
    said = r"No at= was found .*: the error of 'a.*' passes 'b', and what 'b' reads, of shape \(36, 6\), has no axis"
    with pytest.raises(ValueError, match=said):
        attach(Merged(nnx.Rngs(0)), jaxfa.dfa(), inputs(9, 4, 6))


class Beside(MLP):
    """A branch is computed that the logits do not depend on."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.other, self.last = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return super().__call__(x), self.last(nnx.relu(self.other(x)))


def test_what_the_logits_do_not_depend_on_is_not_tapped():
    aligned = attach(Beside(nnx.Rngs(0)), jaxfa.dfa(), inputs(9, 6), logits=lambda out: out[0], allow=("other", "last"))
    assert {tap.place.path for tap in taps_of(aligned.model).values()} == {"fc2", "fc3"}


class Steps(nnx.Module):
    """Steps come first, examples second; and the model runs with no other batch than six."""

    def __init__(self, rngs, axis):
        self.a, self.b, self.c = (nnx.Linear(6, 6, rngs=rngs) for _ in range(3))
        self.axis = axis

    def __call__(self, x):
        assert x.shape[self.axis] == 6
        h = nnx.relu(self.b(nnx.relu(self.a(x.swapaxes(0, 1)))))
        return self.c(h.mean(0))


@pytest.mark.parametrize("at", [None, ("a", "b")])
def test_an_axis_that_may_not_be_the_batch_is_not_taken_for_it(at):
    with pytest.raises(ValueError, match=r"the tap '.*' sees \(6, 6, 6\), where several axes .* at="):
        attach(Steps(nnx.Rngs(0), 0), jaxfa.dfa(), inputs(6, 6, 6), at)
    with pytest.raises(ValueError, match=r"has no axis of the logits' 6 examples first|batch axis first"):
        attach(Steps(nnx.Rngs(0), 1), jaxfa.dfa(), inputs(6, 6, 6), at)


class Queries(nnx.Module):
    """Learned queries read a sequence: a product of parameters meets activations, which is no contraction of one."""

    def __init__(self, rngs):
        self.queries = nnx.Param(inputs(2, 6))
        self.decoder = nnx.MultiHeadAttention(1, 6, decode=False, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        queries = jnp.broadcast_to(self.queries[...][None], (len(x), 2, 6))
        return self.head((queries + self.decoder(queries, x)).mean(1))


def test_a_tapped_parameter_is_an_activation_and_need_not_be_followed():
    x = inputs(9, 4, 6)
    aligned = attach(Queries(nnx.Rngs(0)), jaxfa.dfa(), x, ("queries", "decoder"))
    grads = nnx.grad(lambda aligned: jnp.sum(aligned(x) ** 2))(aligned)
    assert np.any(grads["model"]["queries"][...])


class Widened(nnx.Module):
    """A block whose output has a size that no parameter or argument has: 9, three times the factor for a batch of 2."""

    def __init__(self, rngs):
        self.below, layer, self.head = (nnx.Linear(n, m, rngs=rngs) for n, m in ((4, 8), (8, 8), (8, 4)))
        self.block = Joined(layer)

    def __call__(self, x):
        return self.head(self.block(nnx.relu(self.below(x)))[:, :8])


class Joined(nnx.Module):
    """A layer's output beside a one."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return jnp.concatenate([self.layer(x), jnp.ones((x.shape[0], 1))], axis=1)


def test_a_size_that_the_factor_divides_by_accident_is_no_batch():
    attached = attach(Widened(nnx.Rngs(0)), jaxfa.dfa(), jnp.ones((2, 4)), at=("below", "block"))
    shapes = {path: jax.tree.leaves(tap.feedback.get_value())[0].shape for path, tap in taps_of(attached.model).items()}
    assert shapes == {"below": (8, 4), "block": (9, 4)}


class Tokens(nnx.Module):
    """Logits of every token, or of their mean."""

    def __init__(self, rngs, mean):
        self.first, self.last, self.mean = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs), mean

    def __call__(self, x):
        h = nnx.tanh(self.first(x))
        return self.last(h.mean(1) if self.mean else h)


@pytest.mark.parametrize("mean", [True, False])
def test_a_feedback_for_every_position_is_for_one_length(mean):
    """Another length than the example's is refused where an activation has positions that the logits have not."""
    model = attach(Tokens(nnx.Rngs(0), mean), jaxfa.dfa(), inputs(9, 5, 4), "first")
    outcome = pytest.raises(
        ValueError, match=r"At the tap 'first': .* has the shape \(7, 6\) here and \(5, 6\) in the example .*, or pad"
    )
    for length in (5, 7):
        with outcome if mean and length == 7 else contextlib.nullcontext():
            nnx.grad(loss)(model, inputs(9, length, 4))
    forward = attach(Tokens(nnx.Rngs(0), mean), jaxfa.forward_gradient(), inputs(9, 5, 4), "first")
    with pytest.raises(ValueError, match=r"has the shape \(7, 6\) here"):
        nnx.grad(loss)(forward, inputs(9, 7, 4))
    layerwise = attach(Tokens(nnx.Rngs(0), mean), jaxfa.fa(), inputs(9, 5, 4))
    nnx.grad(loss)(layerwise, inputs(9, 7, 4))
