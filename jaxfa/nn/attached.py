"""The model that :func:`jaxfa.nn.attach` returns, its plain twin, and how well the two agree."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree

from jaxfa.base import ForwardPass, Rule, is_direct, keep
from jaxfa.measure.diagnostics import Alignment, compare, weight_angle
from jaxfa.nn.coverage import cover
from jaxfa.nn.learning import Phase, quiet, remind
from jaxfa.nn.model.program import Example, Program, is_transformed, method_of
from jaxfa.nn.passes.between import moved_by_weights
from jaxfa.nn.passes.direct import call_direct
from jaxfa.nn.passes.refined import layers_of, own_at, shifted_forward
from jaxfa.nn.table import Coverage
from jaxfa.nn.taps.tap import plain_of, taps_of
from jaxfa.nn.weights.contraction import audited, contractions_of, sites_of
from jaxfa.nn.weights.own import OwnSite, weights_of
from jaxfa.nn.weights.survey import OwnContraction, by_parameter, by_path, own_of, program_of, run_with_feedback
from jaxfa.ops import backward_alone


class Attached(nnx.Module):
    """A model that learns by a rule; :func:`jaxfa.nn.attach` makes it.

    Attributes:
      model: a copy of the user's model with the rule in it. Parameters and state keep their paths.
      rule: the rule.
      own: the feedback of contractions that no layer makes.
      left: those that are left to backpropagation.
    """

    def __init__(
        self,
        model: nnx.Module,
        rule: Rule,
        allow: tuple[str, ...],
        own: tuple[Sequence[OwnContraction], tuple[OwnSite, ...]] = ((), ()),
        **options: Any,
    ) -> None:
        self.model = model
        self.rule = nnx.static(rule)
        self.allow = allow
        self.example: Example | None = nnx.static(options.get("example"))
        self.method: str = options.get("method", "__call__")
        self.logits = nnx.static(options.get("logits"))
        self.forward = nnx.static(options.get("forward"))
        self.note: str = options.get("note", "")
        self.phase = nnx.static(Phase())
        error = options.get("error")  # of the example; its type alone, of which no array is made
        kinds = jax.make_jaxpr(partial(jnp.zeros, error.shape, error.dtype))().out_avals if error else [None]
        self.error = nnx.static(kinds[0])
        self.in_turn = True  # whether a direct rule's taps wait for each other, which saves memory
        self.is_local = False  # whether a direct rule's audit tells products of parameters from layers
        # By the path of the parameter, so that an optimizer sees whose weights a feedback stands for.
        self.own, self.left = nnx.Dict(by_parameter(own[0])), nnx.static(own[1])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass; its gradient is the rule's."""
        if not is_transformed():  # and so not differentiated
            return method_of(self.method)(self.model, *args, **kwargs)
        with backward_alone():
            outputs = self._run(args, kwargs)
            return remind(self, outputs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_direct(self.rule):
            return (self.forward or call_direct)(self, args, kwargs)
        if self.example is None:
            # Without an example to check it by, every trace checks itself: a gradient is never taken unchecked.
            self.coverage(*args, **kwargs).refuse()
        if self.own:
            program = program_of(self.model, method_of(self.method), args, kwargs)
            return run_with_feedback(program, own_of(self), self.left)
        program = Program(self.model, method_of(self.method), args, kwargs)
        return program.finish(*program.run(*program.states, prepare=audited))

    def coverage(self, *args: Any, **kwargs: Any) -> Coverage:
        """How the error reaches and leaves every weight contraction, as a table, read off the traced gradient.

        Args:
          *args: one batch of inputs, as for the model; by default the example that :func:`jaxfa.nn.attach` was given.
          **kwargs: likewise.

        Raises:
          ValueError: if there are neither.
        """
        return cover(quiet(self), self.example_of("coverage", args, kwargs))

    def example_of(self, who: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
        """The shapes of these inputs; without any the example that :func:`jaxfa.nn.attach` was given."""
        if args or kwargs:
            return Example.of(args, kwargs)
        if self.example is None:
            raise ValueError(f"{who}() traces the model: give attach() an example=, or this call one batch of inputs.")
        return self.example

    def refine(self, key: jax.Array, *args: Any, **kwargs: Any) -> None:
        """Runs the rule's own phase on the feedback, in place: the weight mirror's noise; nothing for most rules.

        Args:
          key: a PRNG key; it is consumed.
          *args: one batch of inputs, as for the model.
          **kwargs: likewise.
        """
        if self.rule.refine is keep:
            return
        if not (args or kwargs):
            raise ValueError("This rule's own phase runs the model: give refine(key, x) one batch of inputs.")
        taps = {path: tap for path, tap in taps_of(self.model).items() if tap.feedback is not None}
        layers = contractions_of(self.model) | by_path(own_of(self))
        parts = taps if is_direct(self.rule) else layers
        if is_direct(self.rule):
            run, moved = shifted_forward(self, args, kwargs), partial(moved_by_weights, self, args, kwargs)
            forward: Any = ForwardPass(run, moved)
        else:
            forward = layers_of(self, args, kwargs)
        if isinstance(forward, dict):  # a layer that this forward pass does not use has nothing to mirror
            parts = {path: parts[path] for path in forward}
        feedback = {path: part.feedback.get_value() for path, part in parts.items()}
        for path, value in self.rule.refine(forward, feedback, key).items():
            parts[path].feedback.set_value(value)
        if self.phase is not None:
            self.phase.is_settled = True


def plain(attached: Attached) -> Any:
    """The same network with true gradients and forward mode, for measuring and calibrating.

    An attached model has a backward pass alone: ``jax.jvp`` of it is refused, inside of a ``jit`` in JAX's own words,
    "can't apply forward-mode autodiff (jvp) to a custom_vjp function".

    Args:
      attached: what :func:`jaxfa.nn.attach` returned.

    Returns:
      A model of the user's own class that shares ``attached``'s variables: a step on the one is a step on the other.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> attached = jaxfa.nn.attach(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jaxfa.fa(), rngs=nnx.Rngs(1))
      >>> jaxfa.nn.plain(attached).kernel is attached.model.kernel
      True
    """
    return plain_of(attached.model)


def alignment(attached: Attached, loss: Any) -> dict[str, Alignment]:
    """How well the rule's pseudo-gradient is aligned with the true gradient, for every parameter.

    Args:
      attached: what :func:`jaxfa.nn.attach` returned; its state is not changed.
      loss: ``model -> scalar``, called with a copy of ``attached`` and of its plain twin.

    Returns:
      ``{"path/of/kernel": Alignment(angle in degrees, norm_ratio)}``; for a stack of layers, arrays of them. An angle
      is NaN where one of the two gradients is zero: a parameter that does not learn, by the rule or at all.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> attached = jaxfa.nn.attach(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jaxfa.fa(), rngs=nnx.Rngs(1))
      >>> float(jaxfa.nn.alignment(attached, lambda model: model(jnp.ones((5, 4))).sum())["kernel"].angle)
      0.0

    Source: as :func:`jaxfa.diagnostics.angle`.
    """
    pseudo = nnx.to_flat_state(nnx.grad(loss)(quiet(attached))["model"])
    true = nnx.to_flat_state(nnx.grad(loss)(nnx.clone(plain(attached))))
    sites = sites_of(plain(attached)).items()
    stacks = {path: site.stack(module.kernel.get_value()) for path, (module, site) in sites}
    found = {}
    for (path, ours), (_, theirs) in zip(pseudo, true, strict=True):
        measure = compare
        for _ in stacks.get("/".join(map(str, path[:-1])), ()):
            measure = jax.vmap(measure)
        found["/".join(map(str, path))] = measure(*(_as_array(one.get_value()) for one in (ours, theirs)))
    return found


def weight_angles(attached: Attached) -> dict[str, jax.Array]:
    """The angle between each layer's weights and the matrix through which its errors return.

    Args:
      attached: what :func:`jaxfa.nn.attach` returned with a layer-wise rule.

    Returns:
      ``{"path/of/layer": degrees}``, for a stack of layers an array of them; empty for direct rules, whose matrices
      have the shape of no layer's weights.

    Example:
      >>> import jax.numpy as jnp, jaxfa.nn
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 3, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
      >>> attached = jaxfa.nn.attach(model, jaxfa.usf(), rngs=nnx.Rngs(1))
      >>> {path: round(float(angle), 3) for path, angle in jaxfa.nn.weight_angles(attached).items()}
      {'': 0.0}

    Source: as :func:`jaxfa.diagnostics.angle`.
    """
    sites = sites_of(plain(attached))
    found = {}
    for path, contraction in contractions_of(attached.model).items():
        kernel, site = sites[path][0].kernel.get_value(), contraction.site
        measure = weight_angle
        for _ in site.layers(kernel):
            measure = jax.vmap(measure)
        found[path] = measure(site.matrices(kernel), contraction.feedback.get_value())
    for path, one, contracted in own_at(attached, attached.example):
        w, measure = weights_of(contracted, one.site), weight_angle
        for _ in range(len(one.site.levels) + one.site.view.batch):
            measure = jax.vmap(measure)
        found[path] = measure(w, one.feedback.get_value())
    return found


def _as_array(value: Any) -> jax.Array:
    """A parameter as one array; several, such as factors, as one vector."""
    return value if jax.tree_util.all_leaves([value]) else ravel_pytree(value)[0]
