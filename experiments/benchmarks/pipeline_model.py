"""What a pipeline should cost, on paper: ticks, bubbles, bytes sent, bytes kept. ``pipeline`` checks it.

A stage's forward pass of one microbatch is the unit of time. Backward, a residual layer of one matrix needs a unit for
the gradient in its weights and, where an error goes on to the layer below, one for that.
"""

from typing import NamedTuple

from experiments.benchmarks.pipeline_steps import Network


class Method(NamedTuple):
    """How a pipeline learns.

    Attributes:
      local: whether stages learn alone, at once, from the output error.
      again: whether a stage runs forward again before it learns, having kept its inputs alone.
    """

    local: bool
    again: bool

    @property
    def backward(self) -> int:
        """Units of time of a microbatch on a stage after its forward pass."""
        return (1 if self.local else 2) + self.again


METHODS = {
    "backpropagation": Method(local=False, again=False),
    "backpropagation, rematerialised": Method(local=False, again=True),
    "direct, parallel": Method(local=True, again=False),
    "direct, stream": Method(local=True, again=True),
}


class Cost(NamedTuple):
    """The cost of one training step.

    Attributes:
      ticks: in which messages are sent: forward, and backward.
      bubble: the part of its time that a stage waits.
      speedup: over one device that does the same, at best.
      sent: bytes, of all devices together.
      kept: bytes of temporaries, per device: the leading terms.
    """

    ticks: int
    bubble: float
    speedup: float
    sent: int
    kept: float


def cost(method: Method, stages: int, microbatches: int, network: Network) -> Cost:
    """The model's answer.

    Args:
      method: of :data:`METHODS`.
      stages: ``S``.
      microbatches: ``M``.
      network: the sizes.

    Returns:
      A :class:`Cost`.
    """
    ticks = microbatches + stages - 1
    busy = microbatches * (1 + method.backward)
    waits = (stages - 1) * (1 if method.local else 1 + method.backward)
    bubble = waits / (busy + waits)
    return Cost(
        ticks=ticks if method.local else 2 * ticks,
        bubble=bubble,
        speedup=stages * (1 - bubble),
        sent=_sent(method, stages, microbatches, network),
        kept=_kept(method, stages, microbatches, network),
    )


def _sent(method: Method, stages: int, microbatches: int, network: Network) -> int:
    activations = 4 * network.examples * network.width
    errors = 4 * network.examples * network.outputs
    # In every tick every link carries a microbatch, in the bubbles a useless one.
    one_way = (microbatches + stages - 1) * (stages - 1) * activations // microbatches
    head = 2 * (stages - 1) * 4 * network.width * network.outputs
    if not method.local:
        return 2 * one_way + head
    # The head's inputs are dealt out by the last stage, and the error comes back to every stage.
    return one_way + activations * (stages - 1) // stages + errors * (stages - 1) + head


def _kept(method: Method, stages: int, microbatches: int, network: Network) -> float:
    units, own = network.examples * network.width, network.layers / stages
    # A layer's output in single precision and, of its ReLU, a byte.
    layers, gradients = 5 * own * units, 4 * own * network.width**2
    ticks = 1 if method.local else (microbatches + stages - 1) / microbatches
    if method.again:
        # The stage's inputs and its outputs; then what learning from all examples, or from one microbatch, takes.
        return 8 * ticks * units + gradients + (8 * units if method.local else 4 * units + layers / microbatches)
    # Learning from all examples at once takes an error and a copy; a loop of one turn is none and shares them.
    learning = 8 * units if method.local and own > 1 else 0
    return ticks * (layers + 4 * units) + 4 * units + learning + gradients
