"""What a model does beside its outputs: attributes that it sets, modules that it makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from tests.networks import inputs

X = inputs(4, 8)


class Base(nnx.Module):
    """Three layers, two of them tapped."""

    def __init__(self):
        self.a, self.b, self.c = (nnx.Linear(8, m, rngs=nnx.Rngs(i)) for i, m in enumerate((8, 8, 3)))

    def __call__(self, x):
        return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))


class Attributes(Base):
    """Counts its calls, and keeps a term of the loss as an attribute."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        self.penalty = (self.a(x) ** 2).mean()
        return super().__call__(x)


class Lazy(Base):
    """Makes a layer when it is first called."""

    def __call__(self, x):
        if not hasattr(self, "last"):
            self.last = nnx.Linear(3, 3, rngs=nnx.Rngs(3))
        return self.last(super().__call__(x))


HOW = {
    "fa": (jaxfa.fa(), {}),
    "dfa": (jaxfa.dfa(), {}),
    "stream": (jaxfa.dfa(), {"at": "b", "allow": "b", "schedule": jaxfa.stacks.stream}),
}
every_way = pytest.mark.parametrize("how", HOW)


def attach(model, how):
    rule, options = HOW[how]
    return jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), example=X, **options)


@every_way
def test_attributes_that_a_call_sets_are_kept_and_have_their_gradient(how):
    def loss(state):
        model = nnx.merge(graphdef, state, copy=True)
        y = model(X)
        calls.append(model.model.calls)
        return 0 * y.sum() + model.model.penalty

    calls = []
    graphdef, state = nnx.split(attach(Attributes(), how))
    learned = jax.jit(jax.grad(loss, allow_int=True))(state)["model"]["a"]["bias"][...]
    h = Attributes().a(X)
    wanted = jax.grad(lambda b: ((h + b[None]) ** 2).mean())(jnp.zeros(8))
    np.testing.assert_allclose(learned, wanted, rtol=1e-5, atol=1e-7)
    assert calls == [1]


@every_way
def test_a_layer_that_is_made_in_the_call_is_refused_until_it_is_there(how):
    model = Lazy()
    with pytest.raises(ValueError, match=r"makes a new module, 'last' of Lazy, .* call the model once before"):
        attach(model, how)
    model(X)
    rows = jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(1), example=X).coverage().rows
    assert [row.layer for row in rows] == ["a", "b", "c", "last"]


class Optional(Base):
    """A layer that not every call comes to."""

    def __call__(self, x, *, skip=False):
        h = nnx.relu(self.a(x))
        return self.c(h if skip else nnx.relu(self.b(h)))


@pytest.mark.parametrize("at", [None, "[ab]", "a", "input of c"])
def test_the_gradient_of_a_call_that_comes_to_other_layers_than_the_example_is_refused(at):
    options = {"rngs": nnx.Rngs(1), "example": X, "at": at}

    def gradient(model, **how):
        return nnx.grad(lambda model: (model(X, **how) ** 2).sum())(model)

    short = jaxfa.nn.attach(Optional(), jaxfa.dfa(), **options, example_kwargs={"skip": True})
    np.testing.assert_allclose(jax.jit(short.__call__)(X), Optional()(X), rtol=1e-6)
    assert gradient(short, skip=True)["model"]["a"]["kernel"][...].any()
    with pytest.raises(RuntimeError, match="This call comes to 'b', which the example of attach\\(\\) does not"):
        gradient(short)
    true, plain = (gradient(model)["b"]["kernel"][...] for model in (Optional(), jaxfa.nn.plain(short)))
    np.testing.assert_array_equal(plain, true)


def test_what_the_example_did_not_reach_inside_a_tapped_block_learns_with_it():
    class Outer(nnx.Module):
        def __init__(self):
            self.block, self.head = Optional(), nnx.Linear(3, 3, rngs=nnx.Rngs(1))

        def __call__(self, x, *, skip=False):
            return self.head(self.block(x, skip=skip))

    short, long = (
        jaxfa.nn.attach(Outer(), jaxfa.dfa(), rngs=nnx.Rngs(1), at="block", example=X, example_kwargs={"skip": skip})
        for skip in (True, False)
    )
    ours, theirs = (nnx.grad(lambda model: (model(X) ** 2).sum())(model)["model"] for model in (short, long))
    np.testing.assert_array_equal(ours["block"]["b"]["kernel"][...], theirs["block"]["b"]["kernel"][...])
