"""However a model runs its tapped blocks, and whatever its loss is wrapped in: the gradients of the plain loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfa
import jaxfa.nn
from tests.networks import TRAINED

X = np.random.default_rng(0).normal(size=(5, 3, 4))
Y = np.random.default_rng(1).normal(size=(5, 2))


class Cell(nnx.Module):
    """Two blocks, one of them with a count of its calls."""

    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(n, 6, param_dtype=float, rngs=rngs) for n in (4, 6))

    def __call__(self, u):
        return nnx.tanh(self.b(nnx.tanh(self.a(u))))


class Steps(nnx.Module):
    """A cell for every step of a sequence, called in some way; a head on the sum."""

    def __init__(self, rngs, how):
        self.cell, self.head, self.how = Cell(rngs), nnx.Linear(6, 2, param_dtype=float, rngs=rngs), how

    def __call__(self, x):
        return self.head(HOW[self.how](self.cell, x.swapaxes(0, 1)).sum(0))


def loop(cell, xs):
    return jnp.stack([cell(u) for u in xs])


def split(transform):
    """On a functional copy inside a transformation of a function of state."""

    def run(cell, xs):
        graph, state = nnx.split(cell)
        return jnp.stack([transform(lambda state, u: nnx.merge(graph, state)(u))(state, u) for u in xs])

    return run


def each(transform):
    """Inside a transformation of a function that closes over the module."""
    return lambda cell, xs: jnp.stack([transform(cell.__call__)(u) for u in xs])


def fori(cell, xs):
    return jnp.stack([lax.fori_loop(0, 1, lambda i, h, u=u: cell(u), jnp.zeros((len(u), 6))) for u in xs])


def carried(cell, xs):
    return nnx.scan(lambda cell, u: (cell, cell(u)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(cell, xs)[1]


def state_of_a_scan(cell, xs):
    graph, state = nnx.split(cell)
    step = jax.checkpoint(lambda state, u: (state, nnx.merge(graph, state)(u)))
    return lax.scan(step, state, xs)[1]


def run(cell, u):
    return cell(u)


HOW = {
    "loop": loop,
    "nnx.jit": nnx.jit(loop),
    "nnx.remat": nnx.remat(loop),
    "nnx.clone": lambda cell, xs: loop(nnx.clone(cell), xs),
    "nnx.scan, broadcast": nnx.scan(run, in_axes=(None, 0), out_axes=0),
    "nnx.scan, carried": carried,
    "nnx.vmap, broadcast": nnx.vmap(run, in_axes=(None, 0)),
    "split, jax.jit": split(jax.jit),
    "split, jax.checkpoint": split(jax.checkpoint),
    "split, scan of checkpoint": state_of_a_scan,
    "jax.jit by closure": each(jax.jit),
    "jax.checkpoint by closure": each(jax.checkpoint),
    "lax.scan by closure": lambda cell, xs: lax.scan(lambda carry, u: (carry, cell(u)), 0, xs)[1],
    "lax.map by closure": lambda cell, xs: lax.map(cell.__call__, xs),
    "jax.vmap by closure": lambda cell, xs: jax.vmap(cell.__call__)(xs),
    "lax.fori_loop by closure": fori,
    "nnx.cond": lambda cell, xs: jnp.stack(
        [nnx.cond(u.sum() > -1e9, lambda c, u: c(u), lambda c, u: 2 * c(u), cell, u) for u in xs]
    ),
    "lax.cond by closure": each(lambda f: lambda u: lax.cond(u.sum() > -1e9, f, lambda u: 2 * f(u), u)),
}
RULES = {"dkp": (jaxfa.dkp(), ("cell/a", "cell/b")), "dfa, at inputs": (jaxfa.dfa(), None)}


def model(how, rule):
    value, at = RULES[rule]
    return jaxfa.nn.attach(Steps(nnx.Rngs(0), how), value, rngs=nnx.Rngs(1), example=jnp.asarray(X), at=at)


def objective(model, x, y):
    return ((model(x) - y) ** 2).sum() / len(Y)


def gradient(aligned, x=X, y=Y):
    graph, both, rest = nnx.split(aligned, nnx.Any(*TRAINED), ...)
    return nnx.to_pure_dict(jax.grad(lambda both: objective(nnx.merge(graph, both, rest, copy=True), x, y))(both))


@pytest.fixture(scope="module")
def wanted():
    with jax.enable_x64(True):
        return {rule: gradient(model("loop", rule)) for rule in RULES}


def test_the_loop_has_the_closed_form(wanted, x64):
    aligned = model("loop", "dkp")
    cell = aligned.model.cell
    hs = [nnx.tanh(cell.a(u)) for u in X.swapaxes(0, 1)]
    e = 2 * (aligned(X) - Y) / len(Y)
    tops = [nnx.tanh(cell.b(h)) for h in hs]
    np.testing.assert_allclose(wanted["dkp"]["model"]["head"]["kernel"], sum(tops).T @ e, rtol=1e-12)
    b = {name: getattr(cell, name).feedback_tap.feedback.get_value().b for name in "ab"}
    for name, below in (("a", list(X.swapaxes(0, 1))), ("b", hs)):
        want = sum(np.asarray(h).T @ (e @ b[name].T) for h in below)
        np.testing.assert_allclose(wanted["dkp"]["model"]["cell"][name]["kernel"], want, rtol=1e-10)


@pytest.mark.parametrize("how", HOW)
def test_a_model_may_run_its_blocks_in_any_way(how, wanted, x64):
    if "cond" in how and jax.__version_info__ < (0, 12):
        with pytest.raises(ValueError, match=r"'cell/[ab]' is inside a lax\.cond"):
            model(how, "dkp")
        return
    aligned = model(how, "dkp")
    np.testing.assert_array_equal(aligned(X), Steps(nnx.Rngs(0), how)(X))
    chex.assert_trees_all_close(gradient(aligned), wanted["dkp"], rtol=1e-10, atol=1e-13)


def sharded(value, both, *data):
    mesh = jax.make_mesh((5,), ("d",), axis_types=(AxisType.Auto,))
    specs = (P(), P("d"), P("d"))
    return jax.jit(jax.shard_map(jax.grad(value), mesh=mesh, in_specs=specs, out_specs=P()))(both, *data)


def by_example(value, both, x, y):
    return jax.vmap(lambda x, y: value(both, x[None], y[None]))(x, y)


# How a loss and its gradient may be wrapped; each gives the whole batch's gradient.
AROUND = {
    "jit(grad)": lambda value, both, *data: jax.jit(jax.grad(value))(both, *data),
    "grad(jit)": lambda value, both, *data: jax.grad(jax.jit(value))(both, *data),
    "grad(checkpoint)": lambda value, both, *data: jax.jit(jax.grad(jax.checkpoint(value)))(both, *data),
    "grad(vmap)": lambda value, both, *data: jax.jit(jax.grad(lambda both: by_example(value, both, *data).sum()))(both),
    "grad(vmap), eager": lambda value, both, *data: jax.grad(lambda both: by_example(value, both, *data).sum())(both),
    "vmap(grad)": lambda value, both, x, y: jax.tree.map(
        lambda a: a.sum(0), jax.vmap(lambda x, y: jax.grad(value)(both, x[None], y[None]))(x, y)
    ),
    "jacrev": lambda value, both, *data: jax.tree.map(
        lambda a: a.sum(0), jax.jit(jax.jacrev(lambda both: by_example(value, both, *data)))(both)
    ),
    "grad(scan)": lambda value, both, x, y: jax.grad(
        lambda both: lax.scan(lambda c, d: (c + value(both, *d), None), 0.0, (x[:, None], y[:, None]))[0]
    )(both),
    "scan(grad)": lambda value, both, *data: lax.scan(lambda c, _: (c, jax.grad(value)(both, *data)), 0, length=1)[1],
    "shard_map": sharded,
    "donation": lambda value, both, *data: jax.jit(jax.grad(value), donate_argnums=0)(
        jax.tree.map(jnp.copy, both), *data
    ),
}


@pytest.mark.parametrize("how", ["loop", "split, scan of checkpoint"])
@pytest.mark.parametrize("around", AROUND)
def test_a_loss_may_be_wrapped_in_any_way(around, how, wanted, x64):
    graph, both, rest = nnx.split(model(how, "dfa, at inputs"), nnx.Any(*TRAINED), ...)

    def value(both, x, y):
        return objective(nnx.merge(graph, both, rest, copy=True), x, y)

    found = AROUND[around](value, both, jnp.asarray(X), jnp.asarray(Y))
    found = jax.tree.map(lambda a, like: a.reshape(like.shape), found, both)
    chex.assert_trees_all_close(nnx.to_pure_dict(found), wanted["dfa, at inputs"], rtol=1e-10, atol=1e-13)
