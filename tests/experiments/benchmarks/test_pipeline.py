"""The experiment on pipelines: its steps are what they say, and its model counts what the programs do."""

import json

import chex
import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.benchmarks import collectives, pipeline, pipeline_model, pipeline_steps
from jaxfa import stacks

NETWORK = pipeline_steps.Network(layers=4, width=6, outputs=3, examples=16)


def gradients(loss, network=NETWORK):
    params, *rest = pipeline_steps.arguments(network)
    return jax.jit(jax.value_and_grad(loss))(params, *rest)


def test_gpipe_learns_by_backpropagation_and_ours_by_direct_feedback():
    mesh = stacks.mesh(layer=2)
    arms, bases = pipeline_steps.arms(mesh, 4), pipeline_steps.BASES
    expected = {name: gradients(loss) for name, loss in bases.items()}
    expected["backpropagation, rematerialised"] = expected["backpropagation"]
    assert set(arms) == set(expected) == set(pipeline_model.METHODS)
    for name, loss in arms.items():
        chex.assert_trees_all_close(gradients(loss), expected[name], rtol=1e-5, atol=1e-7)
    bp, direct = (expected[name][1]["stack"] for name in ("backpropagation", "direct, stream"))
    assert np.abs(bp - direct).max() > 1e-3


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 2)])
def test_the_model_counts_the_bytes_that_the_programs_send(stages, microbatches):
    mesh = stacks.mesh(layer=stages)
    for name, loss in pipeline_steps.arms(mesh, microbatches).items():
        params, *rest = jax.device_put(pipeline_steps.arguments(NETWORK), pipeline_steps.shardings(mesh))
        text = pipeline_steps.step_of(loss).lower(params, *rest).compile().as_text()
        model = pipeline_model.cost(pipeline_model.METHODS[name], stages, microbatches, NETWORK)
        assert sum(collectives.sent(text, stages).values()) == model.sent, name


def test_on_paper_direct_feedback_waits_less_and_sends_less():
    methods = pipeline_model.METHODS
    for stages, microbatches in [(2, 8), (8, 32), (64, 32)]:
        bp, _, ours, stream = (pipeline_model.cost(m, stages, microbatches, NETWORK) for m in methods.values())
        # GPipe's own formula; the bubble of a forward pass alone; and none of two passes but the first's.
        ticks = microbatches + stages - 1
        np.testing.assert_allclose(bp.bubble, (stages - 1) / ticks)
        np.testing.assert_allclose(ours.bubble, (stages - 1) / (ticks + microbatches))
        assert stream.bubble < ours.bubble < bp.bubble
        assert ours.ticks == bp.ticks / 2
        assert ours.sent < bp.sent


def test_loops_collectives_and_rings_are_counted():
    text = """
%body (p: f32[4,2]) -> f32[4,2] {
  %x = f32[4,2]{1,0} collective-permute(%p), channel_id=1, source_target_pairs={{0,1},{1,2}}, metadata={}
}
ENTRY %main (a: f32[4,2]) -> f32[4,2] {
  %w = f32[4,2] while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %g = bf16[6]{0} all-gather(%w), replica_groups=[1,3]<=[3]
  %r = (f32[], f32[3]{0}) all-reduce(%g, %h), replica_groups=[1,3]<=[3]
}
"""
    assert collectives.sent(text, 3) == {"collective-permute": 5 * 2 * 32, "all-gather": 2 * 12, "all-reduce": 4 * 16}
    with pytest.raises(ValueError, match="unknown length"):
        collectives.sent(text.replace("known_trip_count", "other"), 3)
    with pytest.raises(ValueError, match="Not counted"):
        collectives.sent(text.replace("all-gather", "all-to-all"), 3)


@pytest.mark.long
def test_the_experiment_counts_times_and_reports(tmp_path, capfd):
    options = "--layers 4 --width 6 --examples 16 --stages 2 --microbatches 2 4 --timed-layers 2 --timed-width 4"
    sizes = ["--timed-examples", "8", "--timed-microbatches", "2", "--steps", "1", "--rounds", "2"]
    command = ["run", "pipeline", *options.split(), *sizes, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    counts, times = (json.loads((tmp_path / "run" / name).read_text()) for name in ("counts.json", "times.json"))
    assert {(one["stages"], one["microbatches"]) for one in counts} == {(2, 2), (2, 4)}
    assert all(one["kept"] > 0 for one in counts)
    assert set(times) == set(pipeline.BASES)
    assert all(one["one core"]["ratio"] > 0 and one["bound"] > 1 for one in times.values())
    assert "What do layers on several devices cost?" in (tmp_path / "run" / "report.html").read_text()
    before = (tmp_path / "run" / "times.json").read_text()
    assert main(command) == 0
    assert (tmp_path / "run" / "times.json").read_text() == before
    capfd.readouterr()
