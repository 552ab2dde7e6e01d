"""The lemma beside what happens: the bound is one, and perturbed weights see the Jacobian through patches."""

import numpy as np
import pytest

import jaxfa
from experiments.grape import bound


@pytest.mark.long
def test_the_lemma_holds_at_every_step_and_is_empty():
    found = bound.follow(jaxfa.rules.published_grape(), bound.Config(steps=60, batch=32), 0)
    a, b, c = np.moveaxis(found["cosines"], -1, 0)
    assert (c >= a * b - np.sqrt(1 - a * a) * np.sqrt(1 - b * b) - 1e-5).all()
    assert ((a * a + b * b)[20:] < 1).all()
    assert (c[-10:] > 0.3).all()
    assert (found["bias"] < 0.9).all()
