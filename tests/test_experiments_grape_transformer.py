"""GrAPE in a language model: two steps of every arm on a mock text, and a report of perplexities."""

import lzma

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.common import courses, records, sweep, sweep_report, text, timing
from experiments.common.metrics import METRICS
from experiments.common.trainer import Trainer
from experiments.grape import transformer as grape_transformer
from experiments.grape.transformer import PUBLISHED, Config

SIZE = {"context": 6, "width": 8, "depth": 1, "heads": 2, "batch": 4, "images": 9, "test_images": 5, "seeds": 1}
ARMS = ["bp", "dfa-1", "grape-1", "alone-1"]


@pytest.fixture
def play(tmp_path, monkeypatch):
    content = "To be, or not to be:\nthat is the question.\n" * 12
    (tmp_path / "tinyshakespeare.txt.xz").write_bytes(lzma.compress(content.encode()))
    monkeypatch.setattr(timing, "_ROUNDS", 2)
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.001)
    return tmp_path


def configured(folder, **options):
    return Config(**{"corpus": "shakespeare", "data": folder, "epochs": 1, "out": folder / "run", **SIZE, **options})


@pytest.mark.long
def test_every_arm_two_steps_and_the_report(play, capsys):
    config = configured(play, calibrations=(1,))
    page = grape_transformer.run(config).read_text()
    rows = {row.name: row for row in sweep_report.read_rows(config.out)}
    assert list(rows) == ARMS
    for name, row in rows.items():
        last = records.read(config.out / name)[-1]
        assert last["step"] == (1 if name == "alone-1" else 2)
        assert last.get("calibrations") == ([1] if name in ("dfa-1", "grape-1") else None)
        assert row.last.mean == pytest.approx(np.exp(last["test_loss"][0]))
        assert f"{row.last.mean:.2f}" in page
        exact = name in ("bp", "alone-1")
        assert (max(map(max, last["angle"].values())) == 0) == exact
        assert ("direct, output of blocks/0" in row.coverage) != exact
    assert "Test perplexity: less is better" in page
    # The figure, its two small ones, and a course for every arm with the angles of two.
    assert page.count("<svg") == 3 + 4 + 2
    assert "blocks/0" in page
    assert "//" not in page.replace("</", "")
    assert main(["report", str(config.out)]) == 0
    assert (config.out / "report.html").read_text() == page
    assert "alone-1" in capsys.readouterr().out


def arms(config):
    found = text.load("shakespeare", config.data, context=config.context)
    return {arm.name: arm for arm in grape_transformer._arms(config, sweep.prepare(config, found))}


def test_only_the_published_text_stands_beside_the_published_numbers(play):
    assert {arm.published for arm in arms(configured(play)).values()} == {None}
    (play / "shakespeare.npz").rename(play / "wikitext103.npz")
    found = arms(configured(play, corpus="wikitext103", calibrations=(0, 1, 2)))
    published = {f"{rule}-{count}": number for (rule, count), number in PUBLISHED.items()}
    assert {name: arm.published for name, arm in found.items() if arm.published} == {"bp": 29.8, **published}
    assert [Trainer(found[name].task, (0,)).steps for name in ("bp", "alone-1", "alone-2")] == [2, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrations": (0, 3)}, r"divide an epoch's 2 steps \(--steps\), got \(0, 3\)"),
        ({"calibrations": ()}, "one or more numbers from 0"),
        ({"calibrations": (-1,)}, "one or more numbers from 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_what_no_epoch_can_do_is_refused(play, options, message):
    with pytest.raises(ValueError, match=message):
        arms(configured(play, **options))


def test_the_best_perplexity_is_the_least():
    history = [{"test_loss": [np.log(9.0), np.log(4.0)]}, {"test_loss": [np.log(3.0), np.log(5.0)]}]
    metric = METRICS["perplexity"]
    np.testing.assert_allclose(metric.values(history), [[9, 4], [3, 5]])
    np.testing.assert_allclose(metric.best(metric.values(history)), [3, 4])
    assert [metric.reaches(gap) for gap in (-2.0, 0.4, 0.6)] == [True, True, False]
    assert [METRICS["accuracy"].reaches(gap) for gap in (2.0, -0.9, -1.1)] == [True, True, False]


def test_a_part_of_the_network_has_the_mean_angle_of_its_layers():
    angles = {
        "blocks/0/fc1": [10.0, 20.0],
        "blocks/0/norm/fc": [30.0, None],
        "blocks/1/fc1": [5.0, 5.0],
        "head": [0, 0],
    }
    (record,) = courses.by_part([{"epoch": 0, "angle": angles}])
    np.testing.assert_array_equal(record["angle"]["blocks/0"], [20.0, np.nan])
    assert list(record["angle"]) == ["blocks/0", "blocks/1", "head"]
