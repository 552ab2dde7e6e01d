"""What each of SSA's local losses does: all of them, and one left out at a time.

Claim (Roy, Apolinario, Das Biswas and Roy 2025, VGG-13, CIFAR-10): 92.7 with all; 27.1 without the cross-entropy's
gradient, 83.1 without alignment, 85.4 without orthogonality.

Command: ``python -m experiments run ssa_ablation``, 8 minutes; ``--preset paper`` for the published set-up.

All means the literal reading: gradients along the Stiefel manifold, no retraction, ``L_ortho`` against the drift,
alignment pulls the weights. Without orthogonality there is neither projection nor loss. Two arms are ours: a retraction
in the place of ``L_ortho``, and alignment that pulls the feedback, which is weight transport.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jaxfa
from experiments.common.experiment import Arm, Experiment, Page, load
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


def arms(config: Config) -> Iterator[Arm]:
    """All losses, and what is left out or changed."""
    dataset = load(config, "cifar10")
    every: dict[str, Any] = {"parallel": config.parallel, "beta": config.beta}
    literal = every | {"gamma": config.gamma, "retract": False}
    chosen: dict[str, tuple[str, dict[str, Any], float | None]] = {
        "all": ("All losses", literal, 92.7),
        "no-ce": ("No cross-entropy", literal | {"alpha": 0.0}, 27.05),
        "no-align": ("No alignment", literal | {"beta": 0.0}, 83.12),
        "no-ortho": ("No orthogonality", literal | {"gamma": 0.0, "project": False}, 85.44),
        "retraction": ("Retraction in place of a loss", every, None),
        "transport": ("Weight transport", literal | {"pull_weights": False, "pull_feedback": True}, None),
    }
    for name, (title, options, published) in chosen.items():
        task = ssa_arms.ssa(config.network, config, dataset, jaxfa.ssa(**options))
        yield Arm(name, title, None, task, published if config.network == "vgg13" else None)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(network="smallconv", epochs=4, images=3000, test_images=2000, **ssa_arms.CPU),
        "paper": Config(**ssa_arms.PAPER, seeds=5),
    },
    Page(
        "What do SSA's local losses do?",
        "The gradient of the cross-entropy, alignment, orthogonality: all of them, and one left out at a time. The "
        "paper: without the first nothing is learned, without one of the others 7 to 10 points are lost.",
        "Roy, Apolinario, Das Biswas and Roy 2025, VGG-13 on CIFAR-10, last epoch, 5 runs",
    ),
    arms,
)
