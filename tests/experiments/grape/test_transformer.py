"""GrAPE in a language model: every arm as it says, and perplexities."""

import numpy as np
import pytest

from experiments.common.metrics import METRICS
from experiments.common.trainer import Trainer
from experiments.grape import transformer
from experiments.grape.transformer import PUBLISHED, Config

SIZE = {"context": 6, "width": 8, "depth": 1, "heads": 2, "batch": 4, "images": 9, "test_images": 5, "seeds": 1}


def configured(folder, **options):
    return Config(**{"corpus": "shakespeare", "data": folder, "epochs": 1, "out": folder / "run", **SIZE, **options})


def arms(config):
    return {arm.name: arm for arm in transformer.arms(config)}


def test_the_published_numbers_are_those_of_the_papers_arms(play):
    arms(configured(play))  # leaves the text's tokens behind
    (play / "shakespeare.npz").rename(play / "wikitext103.npz")
    found = arms(configured(play, corpus="wikitext103", calibrations=(0, 1, 2)))
    published = {f"{rule}-{count}": number for (rule, count), number in PUBLISHED.items()}
    assert {name: arm.published for name, arm in found.items() if arm.published} == {"bp": 29.8, **published}
    assert [Trainer(found[name].task, (0,)).steps for name in ("bp", "alone-1", "alone-2")] == [2, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrations": (0, 3)}, r"divide an epoch's 2 steps \(--steps\), got \(0, 3\)"),
        ({"calibrations": ()}, "calibrations must name one or more, got none"),
        ({"calibrations": (-1,)}, r"calibrations must be at least 0, got \(-1,\)"),
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
