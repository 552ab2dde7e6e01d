"""The one place where a method's name becomes a value."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jaxfa


class Method(NamedTuple):
    """A rule as the tables show it.

    Attributes:
      title: what to call it.
      family: what it belongs to, for the report's groups.
      idea: in a few words, what carries the error back.
      rule: makes the :class:`jaxfa.Rule`.
    """

    title: str
    family: str
    idea: str
    rule: Callable[[], jaxfa.Rule]

    @property
    def direct(self) -> bool:
        """Whether the rule taps activations: a :class:`jaxfa.DirectRule`."""
        return self.family in (DIRECT, LOCAL)


EXACT, LAYERWISE, DIRECT = "Exact", "Layer by layer", "Straight from the output"
LOCAL = "By a loss of its own"
FACTORED, TRANSPORTED = "factors pulled to fixed random ones", "factors that follow the weights' own"
METHODS: dict[str, Method] = {
    "bp": Method("Backpropagation", EXACT, "the weights, transposed", jaxfa.backprop),
    "fa": Method("Feedback alignment", LAYERWISE, "fixed random weights", jaxfa.fa),
    "usf": Method("uSF", LAYERWISE, "signs of the weights", jaxfa.usf),
    "brsf": Method("brSF", LAYERWISE, "signs, new random sizes every step", jaxfa.brsf),
    "frsf": Method("frSF", LAYERWISE, "signs, fixed random sizes", jaxfa.frsf),
    "kolen_pollack": Method("Kolen-Pollack", LAYERWISE, "learned: same steps, same decay", jaxfa.kolen_pollack),
    "weight_mirror": Method("Weight mirror", LAYERWISE, "learned from noise", jaxfa.weight_mirror),
    "ldfa": Method("LDFA, rank 8", LAYERWISE, "learned, 8 numbers wide", partial(jaxfa.ldfa, 8)),
    "normative_ldfa": Method(
        "LDFA, fitted, rank 8", LAYERWISE, "the weights, 8 numbers wide", partial(jaxfa.normative_ldfa, 8)
    ),
    "ssa_sequential": Method("SSA, sequential", LAYERWISE, FACTORED, partial(jaxfa.ssa, parallel=False)),
    "ssa_transported": Method(
        "SSA, transported", LAYERWISE, TRANSPORTED, partial(jaxfa.ssa, parallel=False, pull_feedback=True)
    ),
    "dfa": Method("DFA", DIRECT, "fixed random, one per layer", jaxfa.dfa),
    "shared_dfa": Method("DFA, shared", DIRECT, "one fixed random for all", partial(jaxfa.dfa, shared=True)),
    "dkp": Method("DKP", DIRECT, "learned: activity times error", jaxfa.dkp),
    "dldfa": Method("dLDFA, rank 8", DIRECT, "learned, 8 numbers wide", partial(jaxfa.dldfa, 8)),
    "grape": Method("GrAPE, scaled", DIRECT, "learned from forward-mode derivatives", jaxfa.grape),
    "published_grape": Method(
        "GrAPE to the letter", DIRECT, "the same, weights perturbed where they are fewer", jaxfa.rules.published_grape
    ),
    "fdfa": Method("FDFA", DIRECT, "learned likewise, magnitudes kept", jaxfa.fdfa),
    "forward_gradient": Method(
        "Forward gradient", DIRECT, "a random direction, times the slope along it", jaxfa.forward_gradient
    ),
    "pepita": Method("PEPITA", DIRECT, "a second pass, on an input that the error changes", jaxfa.pepita),
    "mirrored_pepita": Method(
        "PEPITA, mirrored", DIRECT, "the same, by noise from input to output", partial(jaxfa.pepita, mirror=0.1)
    ),
    "ssa": Method("SSA, parallel", DIRECT, FACTORED, jaxfa.ssa),
    "drtp": Method("DRTP", DIRECT, "the target, no error at all", jaxfa.drtp),
    "local_classifier": Method(
        "Local classifiers", LOCAL, "a linear classifier for each layer", jaxfa.local_classifier
    ),
    "predsim": Method("PredSim", LOCAL, "the same, and similarity matching", jaxfa.predsim),
    "auglocal": Method("AugLocal", LOCAL, "copies of layers above, redrawn", jaxfa.auglocal),
}
