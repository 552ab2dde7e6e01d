"""Puts a rule on a Flax NNX model: the only part of the library that knows Flax.

What stays exact, whatever the rule: biases, norms (BatchNorm included), embeddings and activations pass errors on by
their own derivatives, and every parameter's gradient is the true one for the error that reaches its layer. The last
layer's error is the true one. See :func:`attach`.
"""

from jaxfa.nn.aligned import Aligned as Aligned
from jaxfa.nn.aligned import alignment as alignment
from jaxfa.nn.aligned import plain as plain
from jaxfa.nn.aligned import weight_angles as weight_angles
from jaxfa.nn.attach import attach as attach
from jaxfa.nn.conserved import Link as Link
from jaxfa.nn.conserved import align as align
from jaxfa.nn.conserved import imbalances as imbalances
from jaxfa.nn.conserved import links as links
from jaxfa.nn.convert import export as export
from jaxfa.nn.convert import factorise as factorise
from jaxfa.nn.convert import merge as merge
from jaxfa.nn.convert import prune as prune
from jaxfa.nn.errors import errors as errors
from jaxfa.nn.optimizer import Optimizer as Optimizer
from jaxfa.nn.table import Coverage as Coverage
from jaxfa.nn.table import Row as Row
from jaxfa.nn.variables import Feedback as Feedback

__all__ = [
    "Aligned", "Coverage", "Feedback", "Link", "Optimizer", "Row", "align", "alignment", "attach", "errors", "export",
    "factorise", "imbalances", "links", "merge", "plain", "prune", "weight_angles",
]  # fmt: skip
