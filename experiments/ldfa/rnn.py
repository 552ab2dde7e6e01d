"""LDFA in a recurrent network that reads MNIST row by row: the error goes back through time in few dimensions.

Claim (Hanut and Kadmon 2025, of feedforward networks; this one is ours): a rank of the number of classes suffices, and
behind a learned P a random Q will do.

Command: ``python -m experiments run ldfa_rnn``.

The state's layer is used once for every row, so that its ``P`` turns as often a step, and its rate is divided by how
many rows there are: see :func:`jaxfa.ldfa` on stability.

Verdict: neither holds. Where both factors learn, a rank of the number of classes stays behind full rank by more than
the error, and full rank behind backpropagation, so that it is not rank alone that is missing. Behind a learned ``P``, a
random ``Q`` is no better than fixed factors, at either rank, and far behind a ``Q`` that learns; with a fixed ``P``, a
``Q`` that learns makes up for half of that at the number of classes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import optax

import jaxfa
from experiments.common.bounds import FROM_ZERO
from experiments.common.experiment import Arm, Experiment, Page, load
from experiments.common.task import Task
from experiments.ldfa.arms import FEEDBACK_RATE, Varied, by_rank
from experiments.models.rnn import RNN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Varied):
    """The network, the ranks, and for how long."""

    feedback_rate: Annotated[float, FROM_ZERO] = FEEDBACK_RATE / 14
    """The learning rate of P, the projection of the error, at each of the rows."""
    width: int = 64
    """Units of the state."""


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation through time; every variant and rank."""
    dataset = load(config, "mnist", config.shrink)
    shape, classes = dataset.train_images.shape[1:], dataset.classes
    bp = Task(
        make=lambda rngs: RNN(shape, classes, config.width, rngs=rngs),
        rule=jaxfa.backprop(),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate)),
        data=dataset,
        batch=config.batch,
    )
    yield from by_rank(config, bp)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(
            ranks=(10, 64), shrink=2, epochs=20, images=10_000, test_images=5000, batch=100, learning_rate=2e-3
        ),
        "full": Config(ranks=(1, 2, 4, 8, 10, 16, 64), epochs=40, width=128, feedback_rate=FEEDBACK_RATE / 28),
    },
    Page("How many dimensions does an error through time need?"),
    arms,
)
