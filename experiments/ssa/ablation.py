"""What each of SSA's local losses does: all of them, and one left out at a time.

Claim (Roy, Apolinario, Das Biswas and Roy 2025, VGG-13, CIFAR-10): 92.7 with all; 27.1 without the cross-entropy's
gradient, 83.1 without alignment, 85.4 without orthogonality.

Command: ``python -m experiments run ssa_ablation`` (``--preset paper`` for the published set-up).

All means the literal reading: gradients along the Stiefel manifold, no retraction, ``L_ortho`` against the drift,
alignment pulls the weights. Without orthogonality there is neither projection nor loss. Two arms are ours: a retraction
in the place of ``L_ortho``, and alignment that pulls the feedback, which is weight transport.

Measured with the preset ``cpu`` (the network of three convolutions, 16 to 64 channels; 3000 training and the first
2000 test images, 4 epochs of 46 steps, one seed: a standard error of 1.1 points; last epoch, also each one's best;
angle of all layers but the last to backpropagation, mean), in 8 min on two CPU cores that others used, too:

============================  ========  =====
.                             accuracy  angle
============================  ========  =====
all losses                    40.3      107
no cross-entropy              10.4      96
no alignment                  40.8      116
no orthogonality              41.2      87
retraction in place of loss   40.8      98
weight transport              39.1      101
============================  ========  =====

Without the gradient of the cross-entropy nothing is learned, less than published (27.1 %). The two other losses change
nothing that one seed could tell in 184 steps, where the paper loses 7 to 10 points: ``L_align`` at the weight .001 is 1
to 3 % of the cross-entropy's gradient, and in this reading no layer but the head follows backpropagation yet, so that
transport has nothing to pull to (``--no-parallel`` has: see ``ssa_alignment``). A step of every arm takes the time of
the first within 7 %. The preset ``paper`` has not been run.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxfa
from experiments.common import data, sweep
from experiments.ssa import arms as ssa_arms
from experiments.ssa.arms import NetworkName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ssa_arms.Config):
    """The network, and the reading."""

    network: NetworkName = "vgg13"
    """The network to train."""
    parallel: bool = True
    """Errors reach all layers at once, else one after the other."""
    gamma: float = 1e-2
    """The weight of the orthogonality loss, in the arms without a retraction."""
    out: Path = Path("runs/ssa_ablation")
    """The folder of the results."""


PRESETS = {
    "cpu": Config(network="smallconv", epochs=4, images=3000, test_images=2000, **ssa_arms.CPU),
    "paper": Config(**ssa_arms.PAPER, seeds=5, out=Path("runs/ssa_ablation-paper")),
}
PAGE = sweep.Page(
    "What do SSA's local losses do?",
    "The gradient of the cross-entropy, alignment, orthogonality: all of them, and one left out at a time. The paper: "
    "without the first nothing is learned, without one of the others 7 to 10 points are lost.",
    "Roy, Apolinario, Das Biswas and Roy 2025, VGG-13 on CIFAR-10, last epoch, 5 runs",
)


def run(config: Config) -> Path:
    """Trains every arm and writes the report.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.
    """
    dataset = sweep.prepare(config, data.load("cifar10", config.data))
    return sweep.run(config, PAGE, list(_arms(config, dataset)))


def _arms(config: Config, dataset: data.Dataset) -> Iterator[sweep.Arm]:
    every: dict[str, Any] = {"parallel": config.parallel, "beta": config.beta}
    literal = every | {"gamma": config.gamma, "retract": False}
    arms: dict[str, tuple[str, dict[str, Any], float | None]] = {
        "all": ("All losses", literal, 92.7),
        "no-ce": ("No cross-entropy", literal | {"alpha": 0.0}, 27.05),
        "no-align": ("No alignment", literal | {"beta": 0.0}, 83.12),
        "no-ortho": ("No orthogonality", literal | {"gamma": 0.0, "project": False}, 85.44),
        "retraction": ("Retraction in place of a loss", every, None),
        "transport": ("Weight transport", literal | {"pull_weights": False, "pull_feedback": True}, None),
    }
    for name, (title, options, published) in arms.items():
        task = ssa_arms.ssa(config.network, config, dataset, jaxfa.ssa(**options))
        yield sweep.Arm(name, title, None, task, published if config.network == "vgg13" else None)
