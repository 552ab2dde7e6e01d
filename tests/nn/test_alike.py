"""What is traced once for layers that are alike: their operation with the rule's backward, and the draw of feedback."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxfa
import jaxfa.nn
from jaxfa.base import feedback_dataclass
from jaxfa.nn.weights.views import Whole


class Tower(nnx.Module):
    """Four layers of one shape."""

    def __init__(self, **options):
        self.layers = nnx.List([nnx.Linear(4, 4, **options, rngs=nnx.Rngs(i)) for i in range(4)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def test_layers_that_are_alike_are_traced_once(monkeypatch):
    @feedback_dataclass
    class Own(jaxfa.FixedFeedback):
        """Of no other test, so that nothing is known of it."""

    bound, bind = [], Whole.bind
    monkeypatch.setattr(Whole, "bind", lambda *args: bound.append(args) or bind(*args))
    model, x = Tower(), jnp.ones((3, 4))
    attached = jaxfa.nn.attach(model, jaxfa.LayerRule(lambda key, w: Own(w)), rngs=nnx.Rngs(1), example=x)
    found = nnx.grad(lambda model: model(x).sum())(attached)
    assert len(bound) == 1
    true = nnx.grad(lambda model: model(x).sum())(model)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(found)["model"], nnx.to_pure_dict(true))


def test_an_operation_of_the_users_own_may_change_from_call_to_call():
    def dot_general(*args, **kwargs):
        return scales[-1] * jax.lax.dot_general(*args, **kwargs)

    scales, x = [1.0], jnp.ones((3, 4))
    attached = jaxfa.nn.attach(Tower(dot_general=dot_general), jaxfa.fa(), rngs=nnx.Rngs(1), example=x)
    for scale in (1.0, 0.5):
        scales.append(scale)
        found, true = (
            nnx.value_and_grad(lambda model: model(x).sum())(model) for model in (attached, jaxfa.nn.plain(attached))
        )
        np.testing.assert_array_equal(found[0], true[0])
        last = [grads["layers"][3]["kernel"][...] for grads in (found[1]["model"], true[1])]
        np.testing.assert_array_equal(*last)


class Alike(nnx.Module):
    """Matrices of one shape: two layers of one class, one of another, and two of the model's own."""

    def __init__(self, rngs):
        self.lower, self.upper = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.merge = nnx.LinearGeneral((2, 2), 4, axis=(-2, -1), rngs=rngs)
        self.own = nnx.List([nnx.Param(jnp.eye(4)), nnx.Param(jnp.eye(4))])

    def __call__(self, x):
        x = self.upper(nnx.tanh(self.lower(x)))
        x = self.merge(x.reshape(-1, 2, 2))
        return jnp.tanh(x @ self.own[0]) @ self.own[1]


def test_layers_alike_have_one_draw_that_is_traced_once_and_keys_of_their_own():
    traced = []

    def distribution(key, shape, dtype):
        traced.append(shape)
        return jax.random.normal(key, shape, dtype)

    rule, x = jaxfa.fa(distribution=distribution), jnp.ones((2, 4))
    attached = jaxfa.nn.attach(Alike(nnx.Rngs(0)), rule, rngs=nnx.Rngs(1), example=x)
    assert len(traced) == 2, traced  # one for layers, one for what the model contracts by itself
    drawn = [np.asarray(one).reshape(4, 4) for one in jax.tree.leaves(nnx.state(attached, jaxfa.nn.Feedback))]
    assert len(drawn) == 4
    assert len({one.tobytes() for one in drawn}) == 4


def test_a_draw_that_asks_for_its_layer_is_told():
    asked = []

    def init(key, w, *, path):
        asked.append(path)
        return jaxfa.fa().init(key, w)

    rule = jaxfa.LayerRule(init)
    jaxfa.nn.attach(Alike(nnx.Rngs(0)), rule, rngs=nnx.Rngs(1), example=jnp.ones((2, 4)))
    assert asked == ["merge", "upper", "own/0", "own/1"]
