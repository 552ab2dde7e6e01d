"""What each of SSA's local losses does: all of them, and one left out at a time.

Claim (Roy, Apolinario, Das Biswas and Roy 2025, VGG-13, CIFAR-10): 92.7 with all; 27.1 without the cross-entropy's
gradient, 83.1 without alignment, 85.4 without orthogonality.

Command: ``python -m experiments run ssa_ablation``; ``--preset paper`` for the published set-up.

The preset ``cpu`` is of a network without normalisation. Where ``gamma`` is small, the literal reading stays at chance
in it: the factors drift from orthonormal ones, and the loss grows. Here it is 1, the one of two tried on the validation
split, .01 and 1, at which it learns. Ranks stay whole, without Hoyer's penalty: one local loss at a time is left out,
and nothing else.

All means the literal reading: gradients along the Stiefel manifold, no retraction, ``L_ortho`` against the drift,
alignment pulls the weights. Without orthogonality there is neither projection nor loss. Without the cross-entropy the
hidden factors lose its gradient; the head, biases and normalisation keep theirs, or chance would be certain. Two arms
are ours: a retraction in the place of ``L_ortho``, and alignment that pulls the feedback, which is weight transport.

Verdict: half of it. Without the cross-entropy's gradient hardly anything is learned, without orthogonality accuracy is
lost beyond its error. Alignment turns updates by more than its error, most of all in the last hidden layer, and is
worth no more than the error here, most likely since weights that follow random matrices pay for it; feedback that
follows the weights, which is transport, gains a little, by more than the error. A retraction does what the loss does.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp

import jaxfa
from experiments.common.bounds import FROM_ZERO
from experiments.common.experiment import Arm, Experiment, Page, load
from experiments.ssa import arms as ssa_arms
from experiments.ssa.arms import NetworkName
from jaxfa.factored.svd import is_factors

# In so many steps the literal reading comes well above chance.
LEARNS: dict[str, Any] = {"images": 5000, "epochs": 6, "learning_rate": 1e-3, "hoyer": 0.0, "energy": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ssa_arms.Config):
    """The network, and the reading."""

    network: NetworkName = "vgg13"
    """The network to train."""
    parallel: bool = True
    """Errors reach all layers at once, else one after the other."""
    beta: Annotated[float, FROM_ZERO] = 0.1
    """The weight of the alignment loss."""
    gamma: Annotated[float, FROM_ZERO] = 1e-2
    """The weight of the orthogonality loss, in the arms without a retraction."""


def arms(config: Config) -> Iterator[Arm]:
    """All losses, and what is left out or changed."""
    dataset = load(config, "cifar10", config.shrink)
    every: dict[str, Any] = {"parallel": config.parallel, "beta": config.beta}
    literal = every | {"gamma": config.gamma, "retract": False}
    transport = {"pull_weights": False, "pull_feedback": True}
    chosen: dict[str, tuple[str, jaxfa.Rule, float | None]] = {
        "all": ("All losses", jaxfa.ssa(**literal), 92.7),
        "no-ce": ("No cross-entropy in the hidden factors", without_cross_entropy(jaxfa.ssa(**literal)), 27.05),
        "no-align": ("No alignment", jaxfa.ssa(**literal | {"beta": 0.0}), 83.12),
        "no-ortho": ("No orthogonality", jaxfa.ssa(**literal | {"gamma": 0.0, "project": False}), 85.44),
        "retraction": ("Retraction in place of a loss", jaxfa.ssa(**every), None),
        "transport": ("Feedback pulled: transport", jaxfa.ssa(**literal | transport), None),
    }
    for name, (title, rule, published) in chosen.items():
        task = ssa_arms.ssa(config.network, config, dataset, rule)
        yield Arm(name, title, None, task, published)


def without_cross_entropy(rule: jaxfa.Rule) -> jaxfa.Rule:
    """The same rule, by which all factors but the head's learn from their local losses alone."""

    local: Any = rule.transform

    def gradient(g: Any, w: Any, b: Any) -> Any:
        hidden = is_factors(w) and w.name != "head"
        return local.gradient(jax.tree.map(jnp.zeros_like, g) if hidden else g, w, b)

    return dataclasses.replace(rule, transform=local._replace(gradient=gradient))


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(network="mlp", gamma=1.0, **(ssa_arms.CPU | LEARNS | {"seeds": 8})),
        "paper": Config(**ssa_arms.PAPER),
    },
    Page(
        "What do SSA's local losses do?",
        "Roy, Apolinario, Das Biswas and Roy 2025, VGG-13 on CIFAR-10, last epoch, 5 runs",
        epoch="last",
    ),
    arms,
    size=("network", "shrink", "scale"),
)
