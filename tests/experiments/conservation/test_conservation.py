"""The experiments on what is conserved: small, against what is known."""

import numpy as np
import pytest

import jaxfa
from experiments.common.trainer import Trainer
from experiments.conservation import aligned_start, angle_against_depth, conservation, laws
from experiments.conservation.convergence import convergence
from tests.experiments.tasks import task


@pytest.mark.long
def test_the_law_holds_where_it_should_and_fails_where_it_must(monkeypatch):
    monkeypatch.setattr(laws, "CASES", {name: laws.CASES[name] for name in ("ReLU", "DFA, layer below")})
    monkeypatch.setattr(conservation, "CASES", laws.CASES)
    monkeypatch.setattr(conservation, "RATES", (0.1, 0.05))
    monkeypatch.setattr(conservation, "HORIZON", 0.5)
    study = conservation.study(conservation.Config(steps=60, iterations=1500, seeds=2), {})
    found, (law, *ends) = study.numbers, study.findings
    assert law[0] == f"{found['residual']['ReLU']:.0e}"
    assert law[1].endswith(f"Where it must break: {found['residual']['DFA, layer below']:.0e} or more.")
    assert [end[0] for end in ends] == [f"{np.mean(values):.0e}" for values in found["least"].values()]
    assert found["residual"]["ReLU"] < 1e-12
    assert found["residual"]["DFA, layer below"] > 1e-3
    assert found["drift"][0.1] / found["drift"][0.05] == pytest.approx(2, rel=0.2)
    assert max(found["least"]["zero"] + found["least"]["in the span of the data"]) < 1e-10
    assert min(found["least"]["random"]) > 0.05


def test_convergence_is_exponential_at_the_rate_that_the_theorem_bounds(x64):
    for start, found in convergence(seeds=2, seed=0, steps=1500).items():
        np.testing.assert_allclose(found.fitted, found.predicted, rtol=0.05)
        assert (found.fitted >= found.bound).all()
        assert (found.bound > 0).all() == (start == "zero")


def test_the_control_of_an_aligned_start_has_its_norms_and_no_alignment():
    kernels = {}
    for start in ("random", "aligned", "norms as aligned"):
        rule, prepare = aligned_start.STARTS[start]
        state = Trainer(task(rule(), prepare=prepare), (0,)).init()
        kernels[start] = np.asarray(state.params["model"]["layers"][1]["kernel"][0])
        feedback = state.feedback["model"]["layers"][1]["dot_general"]["feedback"].b[0]
        assert (float(jaxfa.diagnostics.angle(kernels[start], feedback)) < 30) == (start == "aligned")
    norms = {start: np.linalg.norm(kernel, axis=0) for start, kernel in kernels.items()}
    np.testing.assert_allclose(norms["aligned"], norms["norms as aligned"], rtol=1e-5)
    assert abs(norms["aligned"] - norms["random"]).max() > 0.1


def test_angles_of_the_deepest_networks_are_told_beside_those_of_the_shallowest():
    config = angle_against_depth.Config(depths=(1, 2), factors=(1.0,), depth=2)
    last = {"dense-fa-1-1": [60.0], "dense-fa-2-1": [70.0, 80.0], "convolutional-fa-1-1": [88.0]}
    last["convolutional-fa-2-1"] = [90.0, 92.0]
    found = {name: (np.array(angles)[:, None], np.ones(1)) for name, angles in last.items()}
    (dense, said), (conv, _) = angle_against_depth._findings(config, found)
    assert (dense, conv) == ("75°", "91°")
    assert said == "from the true gradient: FA in dense networks of 2 hidden layers, mean of these; of 1: 60°."
