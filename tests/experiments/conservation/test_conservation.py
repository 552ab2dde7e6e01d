"""The experiment on what is conserved: small, against what is known."""

import dataclasses

import numpy as np
import pytest

import jaxfa
import jaxfa.nn
from experiments.common import data, records, sweep
from experiments.common.trainer import Trainer
from experiments.conservation import conservation
from experiments.conservation import figure as conservation_figure
from experiments.conservation import laws as conservation_laws
from tests.experiments.tasks import mock, task


@pytest.mark.long
def test_the_experiment_reports_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name, folder=None: mock() if name != "digits" else DIGITS)
    monkeypatch.setattr(conservation, "STARTS", {"aligned": conservation.STARTS["aligned"]})
    cases = {name: conservation_laws.CASES[name] for name in ("ReLU", "DFA, layer below")}
    monkeypatch.setattr(conservation_laws, "CASES", cases)
    monkeypatch.setattr(conservation_figure, "CASES", cases)
    monkeypatch.setattr(conservation, "RATES", (0.1, 0.05))
    monkeypatch.setattr(conservation, "HORIZON", 0.5)
    sizes = {"datasets": ("mnist",), "hidden": (6, 5), "images": 48, "batch": 16}
    config = conservation.Config(steps=60, iterations=1500, epochs=1, seeds=2, **sizes, out=tmp_path / "run")
    page = sweep.run(conservation.EXPERIMENT, config)
    assert page.read_text().count("<svg") == 1
    found = records.read_json(page.parent / "study.json")["numbers"]
    assert found["residual"]["ReLU"] < 1e-12
    assert found["residual"]["DFA, layer below"] > 1e-3
    assert found["drift"]["0.1"] / found["drift"]["0.05"] == pytest.approx(2, rel=0.2)
    assert max(found["least"]["zero"] + found["least"]["in the span of the data"]) < 1e-10
    assert min(found["least"]["random"]) > 0.05
    assert len(records.read(page.parent / "mnist" / "aligned")) == 2
    with pytest.raises(ValueError, match="another configuration: seeds was 2, is now 1"):
        sweep.run(conservation.EXPERIMENT, dataclasses.replace(config, seeds=1))


DIGITS = data.load("digits")


def test_the_control_of_an_aligned_start_has_its_norms_and_no_alignment():
    kernels = {}
    for start in ("random", "aligned", "random, norms as aligned"):
        rule, prepare = conservation.STARTS[start]
        state = Trainer(task(rule(), prepare=prepare), (0,)).init()
        kernels[start] = np.asarray(state.params["model"]["layers"][1]["kernel"][0])
        angle = float(
            jaxfa.diagnostics.angle(
                kernels[start], state.feedback["model"]["layers"][1]["dot_general"]["feedback"].b[0]
            )
        )
        assert (angle < 30) == (start == "aligned")
    norms = {start: np.linalg.norm(kernel, axis=0) for start, kernel in kernels.items()}
    np.testing.assert_allclose(norms["aligned"], norms["random, norms as aligned"], rtol=1e-5)
    assert abs(norms["aligned"] - norms["random"]).max() > 0.1
