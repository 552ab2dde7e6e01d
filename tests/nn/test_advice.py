"""No tap at the logits, advice that holds, and notes that are true of the model."""

import ast
import re

import jax.numpy as jnp
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from jaxfa.nn.taps.tap import taps_of
from tests.networks import BLOCKS, MLP, Block, RawWeights, Recurrent, Residual, Scanned, attach, inputs

X = inputs(9, 6)
AT_END = r"^The tap {} is at the logits themselves: no weights follow"


class Softened(MLP):
    """Between the last layer and the output are functions without weights."""

    def __call__(self, x):
        return nnx.softmax(super().__call__(x).reshape(-1, 1, 3) / 2).mean(1)


class Headless(nnx.Module):
    """What the last block returns is the output."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(6, 4, rngs=rngs)
        self.blocks = nnx.List([Block(4, rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class HeadlessStack(Scanned):
    """The same with its blocks stacked."""

    def __call__(self, x):
        sweep = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return sweep(self.blocks, self.stem(x))


class Heads(nnx.Module):
    """Two heads read what the trunk returns, each by a function of its own."""

    def __init__(self, rngs):
        self.trunk, self.one, self.two = (nnx.Linear(6, m, rngs=rngs) for m in (6, 3, 2))

    def __call__(self, x):
        h = self.trunk(x)
        return self.one(nnx.relu(h)), self.two(jnp.tanh(h))


class Coded(nnx.Module):
    """The code is an output, and the decoder reads it."""

    def __init__(self, rngs):
        self.fc1, self.code, self.decoder = (nnx.Linear(n, m, rngs=rngs) for n, m in ((6, 8), (8, 2), (2, 6)))

    def __call__(self, x):
        code = self.code(nnx.relu(self.fc1(x)))
        return self.decoder(code), code


class Followed(MLP):
    """What follows the last layer learns or contracts: a norm, weights that are no parameter's, an activation."""

    def __init__(self, rngs, how):
        super().__init__(rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs) if how == "norm" else None
        self.how = how

    def __call__(self, x):
        h = super().__call__(x)
        if self.how == "norm":
            return self.norm(h)
        return h @ jnp.ones((3, 2)) if self.how == "constant" else jnp.einsum("nc,nd->ncd", h, x).sum(2)


class Again(Headless):
    """One block, used again and again: what it returns goes on through its own weights."""

    def __call__(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = self.blocks[0](x)
        return x


class Alone(nnx.Module):
    """A recurrent net whose cell returns its state twice."""

    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.SimpleCell(6, 3, rngs=rngs))

    def __call__(self, x):
        return self.rnn(x)


LAYERS = ("fc1", "fc2", "fc3")
RULES = {
    "dfa": jaxfa.dfa(),
    "drtp": jaxfa.drtp(),
    "grape": jaxfa.grape(),
    "forward_gradient": jaxfa.forward_gradient(),
    "local_classifier": jaxfa.local_classifier(),
}
# name: (model, the places asked for, the taps at the logits, the advice)
ENDS = {
    "a layer": (MLP, LAYERS, "'fc3'", ("fc1", "fc2")),
    "a layer alone": (MLP, "fc3", "'fc3'", ("input of fc2", "input of fc3")),
    "functions": (Softened, LAYERS, "'fc3'", ("fc1", "fc2")),
    "a block": (Headless, BLOCKS, "'blocks/1'", ("stem", "blocks/0", "blocks/1/up")),
    "one head": (Heads, ("trunk", "one"), "'one'", ("trunk",)),
    "both heads": (Heads, ("trunk", "one", "two"), "'one', 'two'", ("trunk",)),
    "a bias": (MLP, ("fc1", "fc2", "fc3/bias"), "'fc3/bias'", ("fc1", "fc2")),
}


def advised(refusal):
    """The places that a refusal advises."""
    told = re.search(r"at=(\([^()]*\)) would do\.", str(refusal.value))
    return told and ast.literal_eval(told[1])


@pytest.mark.parametrize("name", ENDS)
def test_a_tap_at_the_logits_is_refused_with_places_that_do(name):
    make, at, taps, better = ENDS[name]
    with pytest.raises(ValueError, match=AT_END.format(taps)) as refused:
        attach(make(nnx.Rngs(0)), jaxfa.dfa(), X, at)
    assert advised(refused) == better
    assert "Leave it out of at=, so that the last layer learns from that." in str(refused.value)
    aligned = attach(make(nnx.Rngs(0)), jaxfa.dfa(), X, better)
    assert {str(tap.place) for tap in taps_of(aligned.model).values()} == {*better}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("schedule", [jaxfa.stacks.stored, jaxfa.stacks.stream], ids=["stored", "stream"])
def test_so_it_is_by_every_rule_and_schedule(name, schedule):
    with pytest.raises(ValueError, match=AT_END.format("'fc3'")) as refused:
        attach(MLP(nnx.Rngs(0)), RULES[name], X, LAYERS, schedule=schedule)
    assert advised(refused) == ("fc1", "fc2")
    attach(MLP(nnx.Rngs(0)), RULES[name], X, advised(refused), schedule=schedule)


def test_a_stack_that_ends_in_the_logits_needs_a_layer_behind_it():
    for at in (None, ("stem", "blocks")):
        with pytest.raises(ValueError, match=AT_END.format("'blocks'")) as refused:
            attach(HeadlessStack(nnx.Rngs(0)), jaxfa.dfa(), X, at)
        assert str(refused.value).endswith("Let a layer with weights follow, which then learns from that.")
    attach(Scanned(nnx.Rngs(0)), jaxfa.dfa(), X, ("stem", "blocks"))
    classifiers = attach(HeadlessStack(nnx.Rngs(0)), jaxfa.local_classifier(), X, ("stem", "blocks"))
    assert classifiers.coverage().violations == ()


@pytest.mark.parametrize("how", ["norm", "constant", "activation"])
def test_what_learns_or_contracts_may_follow(how):
    aligned = attach(Followed(nnx.Rngs(0), how), jaxfa.dfa(), X, LAYERS)
    assert {row.arrives.split()[0] for row in aligned.coverage().rows if row.layer in LAYERS} == {"direct,"}
    with pytest.raises(ValueError, match="at the logits themselves"):  # without what follows
        attach(MLP(nnx.Rngs(0)), jaxfa.dfa(), X, LAYERS)


def test_a_tap_that_is_an_output_and_goes_on_is_none_at_the_logits():
    attach(Coded(nnx.Rngs(0)), jaxfa.dfa(), X, ("fc1", "code"))
    attach(Coded(nnx.Rngs(0)), jaxfa.dfa(), X, ("fc1", "code"), logits=lambda out: out[0])
    with pytest.raises(ValueError, match=AT_END.format("'code'")):
        attach(Coded(nnx.Rngs(0)), jaxfa.dfa(), X, ("fc1", "code"), logits=lambda out: out[1])
    attach(Again(nnx.Rngs(0)), jaxfa.dfa(), X, ("stem", "blocks/0"))
    # Where every parameter is tapped the slope of the loss itself is all that comes.
    attach(MLP(nnx.Rngs(0)), jaxfa.forward_gradient(weights=True), X)


class Square(nnx.Module):
    """Runs with a batch of six alone, and what the second layer returns has six features."""

    def __init__(self, rngs):
        self.a, self.b, self.c = (nnx.Linear(n, m, rngs=rngs) for n, m in ((4, 5), (5, 6), (6, 3)))

    def __call__(self, x):
        assert len(x) == 6
        return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))


def test_places_that_would_be_refused_are_not_advised():
    with pytest.raises(ValueError, match="'c' sends the error on to 'b/bias'") as refused:
        attach(Square(nnx.Rngs(0)), jaxfa.dfa(), inputs(6, 4), "a")
    assert advised(refused) is None
    missing = "No at= was found that would do: The model runs with no other batch than the example's, and the tap 'c'"
    assert missing in str(refused.value)


def test_of_a_tap_at_several_arrays_each_has_its_feedback_in_the_table():
    aligned = attach(Alone(nnx.Rngs(0)), jaxfa.dfa(), inputs(9, 5, 6), "rnn/cell", allow="rnn")
    assert [row.feedback.count("DirectMatrix (3, 5, 3)") for row in aligned.coverage().rows] == [2, 2]


class Sum(nnx.Module):
    """Two layers read the input."""

    def __init__(self, rngs):
        self.left, self.right, self.head = (nnx.Linear(6, m, rngs=rngs) for m in (6, 6, 3))

    def __call__(self, x):
        return self.head(nnx.relu(self.left(x) + self.right(x)))


class Table(nnx.Module):
    """Layers on an embedding."""

    def __init__(self, rngs):
        self.embed, self.fc, self.head = nnx.Embed(4, 6, rngs=rngs), *(nnx.Linear(6, 6, rngs=rngs) for _ in range(2))

    def __call__(self, words):
        return self.head(nnx.relu(self.fc(self.embed(words))))


# name: (model, inputs, the last line of the table)
NOTES = {
    "two first layers": (Sum, X, "tapped: the input of every layer but left, right"),
    "a table first": (Table, jnp.arange(4), "tapped: the input of every layer"),
    "a loop": (Recurrent, inputs(9, 5, 6), "since layers run in a loop"),
    "a stack": (Scanned, X, "since layers run in a loop"),
    "shortcuts": (Residual, X, "since shortcuts pass layers by"),
    "own weights": (RawWeights, X, "since the error of 'fc1' would pass the weights of 'w'"),
    "ways that part": (Heads, X, "since the error of 'trunk' would come on several ways"),
}


@pytest.mark.parametrize("name", NOTES)
def test_the_note_is_true_of_the_model(name):
    make, x, words = NOTES[name]
    note = attach(make(nnx.Rngs(0)), jaxfa.dfa(), x).coverage().note
    assert note.endswith(words)
