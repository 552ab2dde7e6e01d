"""What other terms of a loss than the logits' error teach: the table tells, and backpropagation is refused by name."""

import jax.numpy as jnp
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from tests.networks import inputs

X = inputs(4, 8)


class Penalty(nnx.Variable):
    """A term of the loss."""


class Auxiliary(nnx.Module):
    """A second head of one layer or two, for a term of the loss that the model writes, or for an output."""

    def __init__(self, layers, returns):
        self.a, self.b, self.c = (nnx.Linear(8, m, rngs=nnx.Rngs(i)) for i, m in enumerate((8, 8, 3)))
        self.aux = nnx.Sequential(*[nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(layers)])
        self.returns = returns

    def __call__(self, x):
        h = nnx.relu(self.b(nnx.relu(self.a(x))))
        y = self.aux(h)
        if self.returns:
            return self.c(h), y
        self.penalty = Penalty((y**2).mean())
        return self.c(h)


class Codes(nnx.Module):
    """A table that data looks up, taught by a penalty alone, which is an attribute."""

    def __init__(self):
        self.a, self.c = (nnx.Linear(8, m, rngs=nnx.Rngs(m)) for m in (8, 3))
        self.book = nnx.Param(jnp.eye(5, 8))

    def __call__(self, x):
        h = nnx.relu(self.a(x))
        code = self.book[...][jnp.argmax(h[:, :5], -1)]
        self.penalty = ((jnp.asarray(code) - 1) ** 2).mean()
        return self.c(h)


def arrivals(model, rule, **options):
    table = jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(9), **{"example": X} | options).coverage()
    return {row.layer: row.arrives for row in table.rows}


AT = {"at": ("a", "b"), "logits": lambda out: out[0] if isinstance(out, tuple) else out}


@pytest.mark.parametrize("returns", [False, True])
def test_a_second_head_learns_from_its_own_term(returns):
    rows = arrivals(Auxiliary(1, returns), jaxfa.dfa(), **AT)
    # A number stops at the tap; what else is written or returned may be no term at all.
    stops = "" if returns else ", without other terms of the loss"
    assert rows == {
        "a": f"direct, output of a{stops}",
        "b": f"direct, output of b{stops}",
        "aux/layers/0": "other terms of the loss alone: exact",
        "c": "exact: last",
    }
    with pytest.raises(ValueError, match="'aux/layers/1' sends the error on to 'aux/layers/0/bias', 'aux/layers/0/ke"):
        arrivals(Auxiliary(2, returns), jaxfa.dfa(), **AT)
    rows = arrivals(Auxiliary(2, returns), jaxfa.dfa(), allow="aux", **AT)
    assert rows["aux/layers/0"] == "other terms of the loss alone: backpropagation"


def test_layer_wise_rules_send_every_term_on():
    rows = arrivals(Auxiliary(2, returns=False), jaxfa.fa())
    assert rows["aux/layers/0"] == "other terms of the loss alone: through feedback"
    assert rows["aux/layers/1"] == "other terms of the loss alone: exact"


@pytest.mark.parametrize("rule", [jaxfa.fa(), jaxfa.dfa()], ids=["fa", "dfa"])
def test_a_table_of_codes_that_only_a_penalty_reads_learns(rule):
    assert arrivals(Codes(), rule)["book"] == "other terms of the loss alone: exact"


class Critic(nnx.Module):
    """Layers whose weights are divided by their largest singular value."""

    def __init__(self):
        self.a, self.b, self.c = (
            nnx.SpectralNorm(nnx.Linear(8, m, rngs=nnx.Rngs(m)), rngs=nnx.Rngs(i)) for i, m in enumerate((8, 8, 3))
        )

    def __call__(self, x):
        return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))


@pytest.mark.parametrize("at", [None, ("a", "b")])
def test_the_derivative_of_a_norm_of_weights_is_the_weights_own(at):
    place = "input of {1}/layer_instance" if at is None else "output of {0}"
    assert list(arrivals(Critic(), jaxfa.dfa(), at=at).values()) == [
        f"direct, {place.format('a', 'b')}",
        f"direct, {place.format('b', 'c')}",
        "exact: last",
    ]
    with pytest.raises(ValueError, match=r"'c/layer_instance' sends the error on to 'b/layer_instance/bias'"):
        arrivals(Critic(), jaxfa.dfa(), at="a")


class Translator(nnx.Module):
    """One embedding for a source and a target of other lengths."""

    def __init__(self):
        self.embed = nnx.Embed(5, 8, rngs=nnx.Rngs(0))
        self.encoder, self.decoder, self.head = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(3))

    def __call__(self, source, target):
        context = nnx.relu(self.encoder(self.embed(source))).mean(1, keepdims=True)
        return self.head(nnx.relu(self.decoder(self.embed(target) + context)))


def test_a_tap_that_is_called_with_two_shapes_is_refused_in_words():
    example = jnp.ones((4, 3), int), jnp.ones((4, 6), int)
    options = {"rngs": nnx.Rngs(0), "example": example, "at": ("embed", "encoder", "decoder")}
    with pytest.raises(ValueError, match=r"'embed' is called with several shapes \(of one example: \(3, 8\), \(6, 8\)"):
        jaxfa.nn.attach(Translator(), jaxfa.dfa(), **options)
