"""Gated maps: exact where their form can say what the Jacobians are; Jacobians and errors as `jax.grad` has them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.grape import forms, gates
from experiments.grape.forms import FORMS, Seen, judge
from experiments.models.networks import ResNet

pytestmark = pytest.mark.usefixtures("x64")
IMAGES, CLASSES, UNITS = 800, 3, 6


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


H, OWN = normal(0, IMAGES, forms.SEEN), normal(1, IMAGES, UNITS)
P = np.exp(3 * normal(2, IMAGES, CLASSES))
P /= P.sum(1, keepdims=True)
ERROR = P - np.eye(CLASSES)[np.arange(IMAGES) % CLASSES]
B, SLOPE, MAPS = normal(3, CLASSES, UNITS), normal(4, CLASSES, UNITS), normal(5, forms.SEEN, CLASSES, UNITS)
LEFT, RIGHT = normal(6, 2, CLASSES), normal(7, 2, UNITS)
RIDGES = np.maximum(H @ normal(8, forms.SEEN, 2) / 8, 0)
# By each form Jacobians that are of it.
JACOBIANS = {
    "alone": np.broadcast_to(B, (IMAGES, CLASSES, UNITS)),
    "own": B + SLOPE * (OWN > 0)[:, None],
    "output": B + np.einsum("Nk,kCn->NCn", P, MAPS[:CLASSES]),
    "activation": B + np.einsum("Nk,kCn->NCn", H[:, : forms.GATES], MAPS[: forms.GATES]),
    "all": B + np.einsum("Nk,kCn->NCn", H, MAPS),
    "low-rank": B + np.einsum("Nk,kC,kn->NCn", H[:, -2:], LEFT, RIGHT),
    "network": B + 3 * np.einsum("Nk,kCn->NCn", RIDGES, MAPS[:2]),
}


def cosine(form, name):
    return judge(FORMS[form][1], Seen(*map(jnp.asarray, (H, OWN, P, ERROR, JACOBIANS[name]))))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_tells_jacobians_of_its_own_and_one_map_does_not(name, monkeypatch):
    monkeypatch.setattr(forms, "RIDGE", 1e-9)
    learns = name in ("low-rank", "network")
    assert cosine(name, name) > (0.94 if learns else 1 - 1e-6)
    assert (cosine("alone", name) > 0.97) == (name == "alone")


def test_gates_that_see_something_else_tell_nothing_more():
    assert cosine("output", "activation") < cosine("alone", "activation") + 0.05
    assert cosine("activation", "low-rank") < cosine("alone", "low-rank") + 0.05


def test_measured_errors_are_those_of_jax_grad():
    model = ResNet((8, 8, 3), CLASSES, (2, 4), repeats=1, rngs=nnx.Rngs(0))
    model.eval()
    x, labels = normal(9, 5, 8, 8, 3), jnp.array([0, 1, 2, 1, 0])
    stem, block = gates.measured(model, x, labels)
    bottom, (first, second) = model.stem(x), model.blocks
    for seen, h, above in ((stem, bottom, (first, second)), (block, first(bottom), (second,))):

        def loss(h, above=above):
            for layer in above:
                h = layer(h)
            return optax.softmax_cross_entropy_with_integer_labels(model.head(h.mean((1, 2))), labels).sum()

        wanted = jnp.sort(jax.grad(loss)(h).reshape(5, -1), -1)
        assert wanted.shape == (5, 128)
        found = jnp.einsum("NC,NCn->Nn", seen.error, seen.jacobian)
        np.testing.assert_allclose(jnp.sort(found, -1), wanted, atol=1e-12)
        np.testing.assert_allclose(jnp.sort(seen.own, -1), jnp.sort(h.reshape(5, -1), -1))


def test_principal_activations_are_of_deviation_one_and_the_strongest_come_first():
    h = normal(10, 50, 2, 2) * np.array([[1.0, 3.0], [0.1, 10.0]])
    found = gates.principal(h)
    np.testing.assert_allclose(found.T @ found / 50, np.eye(4), atol=1e-9)
    assert abs(np.corrcoef(found[:, 0], h[:, 1, 1])[0, 1]) > 0.95


def test_findings_name_the_best_form():
    cosines = np.full((2, len(FORMS), 3), 0.25)
    cosines[:, 1] = 0.5
    ((figure, said),) = gates.findings({"GrAPE": cosines})
    assert figure == "0.25"
    assert said.endswith("trained by GrAPE; the best form's is 0.50 (Gated by the unit's own ReLU).")
