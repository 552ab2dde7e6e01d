"""GrAPE and FDFA on Flax models: their own phase reaches stacks, tokens and convolutions and leaves the rest alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from tests.networks import MODELS, Scanned, attach, inputs


@pytest.mark.parametrize("name", ["mlp", "conv, batch norm, dropout", "scanned", "transformer", "recurrent"])
@pytest.mark.parametrize(
    "rule",
    [jaxfa.grape(averaging=jaxfa.rules.kalman(), tile=1, scaling=0.0), jaxfa.fdfa(separate=True)],
    ids=["grape", "fdfa"],
)
def test_refine_changes_every_feedback_and_nothing_else(name, rule):
    make, x, at = MODELS[name]
    aligned = attach(make(nnx.Rngs(0)), rule, x, at)
    kept, learned = (jax.tree.map(jnp.copy, nnx.state(aligned, kind)) for kind in (REST, jaxfa.nn.Feedback))
    nnx.jit(lambda aligned, key: aligned.refine(key, x))(aligned, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(aligned, REST), kept)
    for old, new in zip(jax.tree.leaves(learned), jax.tree.leaves(nnx.state(aligned, jaxfa.nn.Feedback)), strict=True):
        assert old.shape == new.shape
        assert not np.array_equal(old, new)
    assert not aligned.coverage().violations


REST = nnx.Any(nnx.Param, nnx.BatchStat, nnx.RngCount)


def test_in_a_stack_every_layer_finds_its_own_jacobian():
    model, x = Scanned(nnx.Rngs(0)), inputs(32, 6)
    aligned = attach(model, jaxfa.fdfa(learning_rate=0.01, scaling=0.1), x, ("stem", "blocks"))
    refine = nnx.jit(lambda aligned, key: aligned.refine(key, x))
    for key in jax.random.split(jax.random.key(0), 500):
        refine(aligned, key)
    found = aligned.model.blocks.feedback_tap.feedback.get_value().b
    assert found.shape == (3, 4, 3)
    for layer, b in enumerate(found):
        shift = jnp.zeros((3, 32, 4))
        jacobian = jax.jacrev(lambda shift: shifted(model, x, shift))(shift)[:, :, layer]
        true = jnp.einsum("bobi->io", jacobian) / 32
        assert jaxfa.diagnostics.angle(b, true) < 15


def shifted(model, x, shift):
    """The scanned model's logits with a shift after each block, block by block."""
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state, copy=True)
    h = model.stem(x)
    block_graph, block_state = nnx.split(model.blocks)
    for layer in range(len(shift)):
        h = nnx.merge(block_graph, jax.tree.map(lambda leaf, i=layer: leaf[i], block_state))(h) + shift[layer]
    return model.head(h)


def test_outputs_of_many_axes_keep_their_columns_apart():
    rule, h, w = jaxfa.grape(), jnp.ones((8, 4)), jax.random.normal(jax.random.key(2), (4, 15))
    feedback = [rule.init(jax.random.key(0), h, jnp.ones((8, 5, 3)))]
    (after,) = rule.refine(lambda taps: ((h + taps[0]) @ w).reshape(8, 5, 3), feedback, jax.random.key(1))
    np.testing.assert_allclose(np.linalg.norm(after.b, axis=0), np.ones((5, 3)), rtol=1e-5)


def test_refine_without_a_batch_is_refused():
    make, x, at = MODELS["mlp"]
    aligned = attach(make(nnx.Rngs(0)), jaxfa.grape(), x, at)
    with pytest.raises(ValueError, match=r"give refine\(key, x\) one batch"):
        aligned.refine(jax.random.key(0))
