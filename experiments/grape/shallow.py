"""GrAPE in shallow convolutional networks: how much of the gap between fixed feedback and backpropagation it closes.

Claim (Caillon et al. 2026): on MNIST, CIFAR-10 and CIFAR-100 learned direct feedback is ahead of fixed, direct or layer
by layer, and .2, 1.6 and 6.2 points below backpropagation.

Command: ``python -m experiments run grape_shallow`` (``--preset paper`` for all images).

The paper states neither networks nor rates. The network is that of its ancestor, two convolutions and a hidden layer.
Every rule may have a rate of its own; none was tuned.

Beside the literal rule stands the library's with a Kalman mean, ``grape(averaging=jaxfa.rules.kalman())``.

Measured with the preset ``cpu`` (4000 training and the first 2000 test images, 4 epochs of 62 steps, Adam at 1e-3 for
all, one seed: a standard error of up to 1 point; accuracy after the last epoch, gap to backpropagation between best
epochs and the published gap), in 10 min a data set on one of two CPU cores, the other being busy:

=================  =====================  =====================  =====================
.                  MNIST                  CIFAR-10               CIFAR-100
=================  =====================  =====================  =====================
bp                 95.2                   49.4                   11.8
fa                 83.7  -11.6 (-.3)      31.6  -17.7 (-3.6)     2.4  -9.5 (-9.2)
dfa                87.0  -8.4 (-.4)       33.6  -15.8 (-5.3)     2.7  -9.1 (-9.7)
grape, literal     93.4  -1.8 (-.2)       43.4  -6.0 (-1.6)      8.2  -3.6 (-6.2)
grape, less noise  92.6  -2.4             46.0  -3.4             9.8  -2.0
=================  =====================  =====================  =====================

On both CIFARs less noise halves the gap, nearly; on CIFAR-10, a tenth of its training images held out, one seed,
backpropagation had 49.2, the literal rule 43.4, scales 42.1 on the full map and 45.1 with tiles, a matrix per channel
45.8, tiles, scales and Kalman mean 46.7, but 42.1 without tiles. On MNIST it gains nothing in so few steps. Time of a
step relative to backpropagation's: fa .99 to 1.09, dfa .86 to .96, grape 1.67 to 1.94.

250 steps are far from convergence, where the published gaps were measured. Nearer to it are ``--datasets mnist --images
20000 --test-images 10000 --epochs 6`` (1872 steps, a standard error of .1, 35 min on one of two cores that others used)
and ``--datasets cifar10 --images 8000 --epochs 8`` (1000 steps, a standard error of 1; FA and DFA left out): one seed,
last epoch, gap, published gap, and the angles of both convolutions and the hidden layer:

=================  =====  ===========  ==========  ========  ===========  ==========
.                  MNIST  gap          angles      CIFAR-10  gap          angles
=================  =====  ===========  ==========  ========  ===========  ==========
bp                 98.78                           56.7
fa                 98.28  -.50 (-.3)   85, 86, 45
dfa                98.25  -.53 (-.4)   76, 81, 47
grape, literal     98.55  -.23 (-.2)   71, 51, 10  53.0      -3.6 (-1.6)  61, 50, 13
grape, less noise  98.59  -.19         69, 43, 18  55.3      -1.4         99, 42, 20
=================  =====  ===========  ==========  ========  ===========  ==========

Between best epochs CIFAR-10's gaps are -4.2 and -1.9. So MNIST's published gaps are reproduced, within two errors, and
less noise is level with the published GrAPE on both, not clearly ahead of it. CIFAR-100 has not been trained for so
long, nor has the preset ``paper`` been run.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import optax

import jaxfa
from experiments.common import data, records, sweep
from experiments.common.task import Task
from experiments.models.cnn import ShallowCNN

Name = Literal["mnist", "cifar10", "cifar100"]
TITLES: dict[Name, str] = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
PUBLISHED: dict[Name, dict[str, float]] = {
    "mnist": {"bp": 99.03, "fa": 98.7, "dfa": 98.6, "grape": 98.8},
    "cifar10": {"bp": 74.66, "fa": 71.05, "dfa": 69.34, "grape": 73.1},
    "cifar100": {"bp": 44.22, "fa": 35.0, "dfa": 34.53, "grape": 38.0},
}

LITERAL = jaxfa.grape(tile=None, scaling=0.0, perturbation=jax.random.normal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(sweep.Config):
    """The data sets, every rule's rate, and for how long."""

    datasets: tuple[Name, ...] = ("mnist", "cifar10", "cifar100")
    """The data sets to learn."""
    fa_rate: float = 1e-3
    """The learning rate of Adam under FA."""
    dfa_rate: float = 1e-3
    """The learning rate of Adam under DFA."""
    grape_rate: float = 1e-3
    """The learning rate of Adam under GrAPE."""
    out: Path = Path("runs/grape_shallow")
    """The folder of the results."""

    arms = ("datasets",)

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_empty(self, "datasets")


PRESETS = {
    # One seed: on a CPU, XLA runs the convolutions of several seeds at once many times slower.
    "cpu": Config(epochs=4, images=4000, test_images=2000, seeds=1),
    "gpu15": Config(
        datasets=("cifar10", "cifar100"), epochs=30, batch=128, seeds=1, apart=True, minutes=6.0,
        out=Path("runs/grape_shallow-gpu15"),
    ),
    "paper": Config(epochs=100, seeds=5, out=Path("runs/grape_shallow-paper")),
}  # fmt: skip
PAGE = sweep.Page(
    "Does learned direct feedback close the gap?",
    "Shallow convolutional networks under backpropagation, feedback alignment, and direct feedback that is fixed (DFA) "
    "or learned (GrAPE). The paper's GrAPE is .2, 1.6 and 6.2 points below backpropagation.",
    "Caillon et al. 2026, networks and rates not stated",
    course=True,
)


def run(config: Config) -> Path:
    """Trains every arm and writes the report.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.
    """
    return sweep.run(config, PAGE, [arm for name in config.datasets for arm in _arms(config, name)])


def _arms(config: Config, name: Name) -> Iterator[sweep.Arm]:
    dataset = sweep.prepare(config, data.load(name, config.data))
    rules = {
        "bp": ("backpropagation", jaxfa.backprop(), config.learning_rate),
        "fa": ("FA", jaxfa.fa(), config.fa_rate),
        "dfa": ("DFA", jaxfa.dfa(), config.dfa_rate),
        "grape": ("GrAPE, as published", LITERAL, config.grape_rate),
        "averaged": ("GrAPE, less noise", jaxfa.grape(averaging=jaxfa.rules.kalman()), config.grape_rate),
    }
    for rule, (title, value, rate) in rules.items():
        task = _task(config, dataset, value, rate)
        arm = sweep.Arm(f"{name}-{rule}", f"{TITLES[name]}: {title}", None, task, PUBLISHED[name].get(rule))
        yield arm._replace(reference=f"{name}-bp")


def _task(config: Config, dataset: data.Dataset, rule: jaxfa.Rule, rate: float) -> Task:
    shape, classes = dataset.train_images.shape[1:], dataset.classes
    steps = len(dataset.train_labels) // config.batch
    # The ancestor's: 5 % less every epoch of a hundred, and no augmentation.
    schedule = optax.exponential_decay(rate, steps * config.epochs / 100, 0.95)
    return Task(
        make=lambda rngs: ShallowCNN(shape, classes, rngs=rngs),
        rule=rule,
        optimizer=optax.adam(schedule),
        data=dataset,
        batch=config.batch,
        augment=lambda key, images: images,
    )
