"""The error that arrives at every layer of a model: what a rank or a norm of errors is measured on."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfa.nn.attached import Attached, plain
from jaxfa.nn.learning import quiet
from jaxfa.nn.model.variables import Recorder
from jaxfa.nn.weights.contraction import sites_of


class Shift(nnx.Variable):
    """What is added to a layer's contraction, whose gradient is the layer's error."""


class Shifted(nnx.Module):
    """A layer's operation with a shift added to its result."""

    def __init__(self, operation: Any, path: str) -> None:
        self.operation = nnx.data(operation) if isinstance(operation, nnx.Module) else nnx.static(operation)
        self.path = path
        self.shift = nnx.data(None)
        self.recorder: Recorder | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Runs the operation."""
        y = self.operation(*args, **kwargs)
        if self.recorder is not None:
            self.recorder.record(self.path, jax.ShapeDtypeStruct(y.shape, y.dtype))
        return y if self.shift is None else y + self.shift[...]


def layer_errors(attached: Attached, loss: Any) -> dict[str, jax.Array]:
    """The error that the rule brings to the output of every dense layer and convolution, before its activation.

    Args:
      attached: what :func:`jaxfa.nn.attach` returned; its state is not changed.
      loss: ``model -> scalar``.

    Returns:
      ``{"path/of/layer": delta}`` of the shape of the layer's output, such as ``(N, ..., m)``; summed over the calls of
      a layer that is used again. ``nnx.Linear`` and ``nnx.Conv`` alone, and none in a stack.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> attached = jaxfa.nn.attach(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jaxfa.fa(), rngs=nnx.Rngs(1))
      >>> jaxfa.nn.layer_errors(attached, lambda model: model(jnp.ones((2, 4))).sum())[""].tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]

    Source: as each rule.
    """
    recorder, probe, shifted = Recorder(), plain(attached), quiet(attached)
    for part in _shift(probe).values():
        part.recorder = recorder
    # A copy is made inside: the pass may update statistics, which nobody asked for.
    jax.eval_shape(lambda: loss(nnx.clone(probe)))
    parts = _shift(shifted.model)
    for path, shape in recorder.seen.items():
        parts[path].shift = nnx.data(Shift(jnp.zeros(shape.shape, shape.dtype)))
    gradient = nnx.grad(loss, argnums=nnx.DiffState(0, Shift))(shifted)
    # The path of a shift: the model, the layer, its operation, the shift.
    found = {"/".join(map(str, path[1:-2])): leaf[...] for path, leaf in nnx.to_flat_state(gradient)}
    return {path: found[path] for path in recorder.seen}


def _shift(model: nnx.Module) -> dict[str, Shifted]:
    parts = {}
    for path, (module, site) in sites_of(model).items():
        if isinstance(module, nnx.Linear | nnx.Conv) and not site.stack(module.kernel.get_value()):
            parts[path] = Shifted(getattr(module, site.attribute), path)
            setattr(module, site.attribute, nnx.data(parts[path]))
    return parts
