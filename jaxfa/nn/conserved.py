"""Layers of a model that follow each other, what is conserved between two, and aligned initialisation."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxfa.base import LayerFeedback, is_direct
from jaxfa.jaxprs.flows import OUTPUT, Passage
from jaxfa.measure.conservation import Pair, imbalance, shrink
from jaxfa.measure.pair import matrix_of
from jaxfa.nn.attached import Attached, plain
from jaxfa.nn.learning import quiet
from jaxfa.nn.model.program import Example
from jaxfa.nn.taps.tap import taps_of
from jaxfa.nn.taps.trace import trace, traced
from jaxfa.nn.weights.contraction import Site, contractions_of, sites_of
from jaxfa.nn.weights.views import Whole
from jaxfa.rules.dfa import DirectMatrix


class ConsecutiveLayers(NamedTuple):
    """A layer and the one that reads it.

    Attributes:
      reader: the path of the layer that reads it.
      pair: the two layers' parameters.
      feedback: what :mod:`jaxfa.conservation` takes for it; None is backpropagation.
    """

    reader: str
    pair: Pair
    feedback: Any


def consecutive_layers(attached: Attached, *args: Any) -> dict[str, ConsecutiveLayers]:
    """The pairs of layers between which :mod:`jaxfa.conservation` may say that something is conserved.

    Read off the traced gradient: a layer's reader is the one whose weights pass its error on. Left out are layers with
    several readers, used twice or stacked; all but ``nnx.Linear`` and ungrouped ``nnx.Conv``; readers whose feedback
    has no matrix of their weights' shape, as direct ones but for the last layer's. What stands between the two, an
    activation or a norm, is not seen.

    Args:
      attached: what :func:`jaxfa.nn.attach` returned.
      *args: one batch of inputs, or its shapes; by default the example that :func:`jaxfa.nn.attach` was given.

    Returns:
      ``{"path/of/layer": ConsecutiveLayers}``, in the order of the forward pass.

    Raises:
      ValueError: if there are no inputs to trace by.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
      >>> attached = jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(2), example=jnp.ones((5, 4)))
      >>> {layer: link.reader for layer, link in jaxfa.nn.consecutive_layers(attached).items()}
      {'layers/0': 'layers/2'}

    Source: as :func:`jaxfa.conservation.quantity`.
    """
    example = attached.example_of("consecutive_layers", args, {})
    sites = {path: found for path, found in sites_of(plain(attached)).items() if _is_simple(*found)}
    known = _direct_feedback(quiet(attached), example) if is_direct(attached.rule) else _layer_feedback(attached)
    found = {}
    for layer, reader in _readers(plain(attached), attached.method, example).items():
        if layer in sites and reader in sites and reader in known:
            pair, feedback = _pair(sites[layer][0], sites[reader][0]), known[reader]
            fits = pair.above.shape[-2] % pair.w.shape[-1] == 0
            if fits and (not isinstance(feedback, jax.Array) or feedback.size == pair.above.size):
                found[layer] = ConsecutiveLayers(reader, pair, feedback)
    return found


def imbalances(attached: Attached, loss: Any, *args: Any) -> dict[str, jax.Array]:
    """A model's breach of the law of :mod:`jaxfa.conservation` by its pseudo-gradient; zero where the law holds.

    Args:
      attached: what :func:`jaxfa.nn.attach` returned; its state is not changed.
      loss: ``model -> scalar``.
      *args: as for :func:`consecutive_layers`.

    Returns:
      ``{"path/of/layer": (m,)}``: :func:`jaxfa.conservation.imbalance` of every unit of every pair.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
      >>> attached = jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(2), example=jnp.ones((5, 4)))
      >>> found = jaxfa.nn.imbalances(attached, lambda model: (model(jnp.ones((5, 4))) ** 2).mean())
      >>> bool(abs(found["layers/0"]).max() < 1e-6)
      True

    Source: as :func:`jaxfa.conservation.quantity`.
    """
    gradient = nnx.clone(attached)
    nnx.update(gradient, nnx.grad(loss)(quiet(attached)))
    steps = consecutive_layers(gradient, *args)
    return {
        layer: imbalance(link.pair, steps[layer].pair, link.feedback)
        for layer, link in consecutive_layers(attached, *args).items()
    }


def align(attached: Attached, *args: Any, ratio: float = 0.5) -> None:
    """Aligned initialisation, in place: every layer's weights become its feedback's matrix, scaled.

    ``w_l = b_l`` for every layer with a feedback; then, from the last layer to the first,
    :func:`jaxfa.conservation.shrink`, which scales a unit's incoming weights down until its outgoing ones are sure to
    stay aligned for as long as the law holds. Where it does not hold this still is where both start alike.

    Args:
      attached: what :func:`jaxfa.nn.attach` returned with a layer-wise rule.
      *args: as for :func:`consecutive_layers`.
      ratio: how much of the alignment training may take away, between 0 and 1.

    Raises:
      ValueError: if the rule's feedback has no matrix of the weights' shape, as direct ones.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
      >>> attached = jaxfa.nn.attach(model, jaxfa.fa(), rngs=nnx.Rngs(2), example=jnp.ones((5, 4)))
      >>> jaxfa.nn.align(attached)
      >>> {path: float(angle) for path, angle in jaxfa.nn.weight_angles(attached).items()}
      {'layers/2': 0.0}

    Source: as :func:`jaxfa.conservation.quantity`.
    """
    contractions = contractions_of(attached.model)
    if not contractions:
        raise ValueError("Aligned initialisation needs a layer-wise rule, whose feedback has the weights' shape.")
    sites = sites_of(plain(attached))
    for path, contraction in contractions.items():
        module, site = sites[path]
        kernel = module.kernel.get_value()
        b = matrix_of(contraction.feedback.get_value(), site.matrices(kernel)).astype(kernel.dtype)
        # The view only moves axes, so that its transpose is its inverse.
        module.kernel.set_value(jax.linear_transpose(site.matrices, kernel)(b)[0])
    for layer, link in reversed(consecutive_layers(attached, *args).items()):
        module, _ = sites[layer]
        above = sites[link.reader][0].kernel.get_value()  # which may have been scaled by now
        pair = shrink(link.pair._replace(above=above), link.feedback, ratio)
        module.kernel.set_value(pair.w)
        if pair.bias is not None:
            module.bias.set_value(pair.bias)


def _is_simple(module: Any, site: Site) -> bool:
    kinds = isinstance(module, nnx.Linear | nnx.Conv) and isinstance(site.view, Whole)
    return kinds and not site.stack(module.kernel.get_value())


def _readers(model: nnx.Module, method: str, example: Example) -> dict[str, str]:
    """The one layer that reads each layer directly: the lowest of those that its error has passed."""
    found = trace(model, method, example)
    order = [name for use in found.uses for name in sorted(use.weights)]
    above = {name: {step.name for step in found.arrivals.get(name, ()) if step.kind == "weights"} for name in order}
    readers = {}
    for name in order:
        direct = [one for one in above[name] if not any(one in above.get(other, ()) for other in above[name] - {one})]
        if len(direct) == 1 and name not in above[name]:
            readers[name.removesuffix("/kernel")] = direct[0].removesuffix("/kernel")
    return readers


def _pair(module: Any, reader: Any) -> Pair:
    bias = None if module.bias is None else module.bias.get_value()
    return Pair(module.kernel.get_value(), reader.kernel.get_value(), bias)


def _layer_feedback(attached: Attached) -> dict[str, Any]:
    """What the error returns through from each layer; None, where it has no feedback, is backpropagation."""
    parts = contractions_of(attached.model)
    feedback = {path: parts[path].feedback.get_value() if path in parts else None for path in sites_of(plain(attached))}
    return {path: one for path, one in feedback.items() if one is None or type(one).matrix is not LayerFeedback.matrix}


def _direct_feedback(attached: Attached, example: Example) -> dict[str, jax.Array]:
    """The matrix of the last layer, by its path: where the error is delivered to its very input, as a layer would."""
    ways = traced(attached, example).arrivals
    taps = {Passage("direct", tap.scope("")): tap.feedback for tap in taps_of(attached.model).values()}
    found: dict[str, jax.Array] = {}
    for layer, reader in _readers(plain(attached), attached.method, example).items():
        way = [taps.get(step) for step in ways[f"{layer}/kernel"]]
        if ways[f"{reader}/kernel"] == {OUTPUT} and len(way) == 1 and way[0] is not None:
            feedback = way[0].get_value()
            found |= {reader: feedback.b} if isinstance(feedback, DirectMatrix) else {}
    return found
