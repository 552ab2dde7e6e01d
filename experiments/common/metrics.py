"""What a report's numbers are: accuracy in percent, or the perplexity of a language model, at most 1e9."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

MetricName = Literal["accuracy", "perplexity"]


class Metric(NamedTuple):
    """A number that a report shows of every epoch.

    Attributes:
      name: in a sentence.
      unit: behind the number.
      digits: behind the point.
      sign: 1 if more is better, -1 if less is.
      close: how far from a reference is as good as the reference.
      margin: the same in words.
      of: ``record -> (seeds,)``, from what the trainer measured.
    """

    name: str
    unit: str
    digits: int
    sign: int
    close: float
    margin: str
    of: Callable[[Mapping[str, Any]], np.ndarray]

    def values(self, history: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The numbers of a run's records, ``(epochs, seeds)``."""
        return np.array([self.of(record) for record in history])

    def best(self, values: np.ndarray) -> np.ndarray:
        """The best epoch's, ``(seeds,)``."""
        return values.max(0) if self.sign > 0 else values.min(0)

    def reaches(self, gap: float) -> bool:
        """Whether a gap to a reference is small enough."""
        return self.sign * gap >= -self.close


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "accuracy", " %", 1, 1, 1.0, "1 point", lambda record: 100 * np.array(record["test_accuracy"], dtype=float)
    ),
    "perplexity": Metric(
        "perplexity", "", 2, -1, 0.5, "0.5", lambda record: np.exp(np.minimum(record["test_loss"], math.log(1e9)))
    ),
}
