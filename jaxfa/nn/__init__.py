"""Puts a rule on a Flax NNX model: the only part of the library that knows Flax.

What stays exact: biases, norms (BatchNorm included), embeddings and activations pass errors on by their own
derivatives, and every parameter's gradient is the true one for the error that reaches its layer. The last layer's error
is the true one. Two rules differ: ``forward_gradient(weights=True)`` estimates every parameter's gradient, and under
``pepita`` weights meet the activities of a second pass. See :func:`attach`.
"""

from jaxfa.nn.attach import attach as attach
from jaxfa.nn.attached import Attached as Attached
from jaxfa.nn.attached import alignment as alignment
from jaxfa.nn.attached import plain as plain
from jaxfa.nn.attached import weight_angles as weight_angles
from jaxfa.nn.conserved import ConsecutiveLayers as ConsecutiveLayers
from jaxfa.nn.conserved import align as align
from jaxfa.nn.conserved import consecutive_layers as consecutive_layers
from jaxfa.nn.conserved import imbalances as imbalances
from jaxfa.nn.convert import factorise as factorise
from jaxfa.nn.convert import prune as prune
from jaxfa.nn.convert import to_dense as to_dense
from jaxfa.nn.convert import to_thin as to_thin
from jaxfa.nn.layer_errors import layer_errors as layer_errors
from jaxfa.nn.model.variables import Feedback as Feedback
from jaxfa.nn.optimizer import Optimizer as Optimizer
from jaxfa.nn.table import Coverage as Coverage
from jaxfa.nn.table import Row as Row

__all__ = [
    "Attached", "ConsecutiveLayers", "Coverage", "Feedback", "Optimizer", "Row", "align", "alignment", "attach",
    "consecutive_layers", "factorise", "imbalances", "layer_errors", "plain", "prune", "to_dense", "to_thin",
    "weight_angles",
]  # fmt: skip
