"""Direct rules: a tap on a module's output, or on a layer's input, to which the output error is delivered."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxfa.delivery import other_size, receive, receive_for_all, send, undifferentiated
from jaxfa.nn.model.leaves import at_leaves, first_input
from jaxfa.nn.model.program import is_transformed
from jaxfa.nn.model.variables import REFUSAL, intercept, modules_of, release
from jaxfa.nn.weights.contraction import restore
from jaxfa.nn.weights.convolution import restore_convolution
from jaxfa.ops import ACTIVATION


class Channel:
    """What the taps of one run read the error from. Hashed by identity, so that a tap may hold it as an attribute.

    Attributes:
      ref: holds the error in the backward pass; None where nothing is differentiated.
      source: the type of the activation at the rule's source, once the run has come there.
      last: the path of the last tap that the run has come to.
    """

    def __init__(self, ref: Any) -> None:
        self.ref = ref
        self.source: Any = None
        self.last = ""


class Place(NamedTuple):
    """Where a tap is: at the ``"output"`` or ``"input"`` of the module at a path, or at the ``"parameter"`` there."""

    kind: str
    path: str

    def __str__(self) -> str:
        """As ``at=`` names it."""
        return f"input of {self.path}" if self.kind == "input" else self.path

    def describe(self, leaf: str) -> str:
        """As a table names it."""
        return " ".join(filter(None, (self.kind, leaf, "of" if self.kind != "parameter" else "", self.path)))


class Tap(nnx.Module):
    """What a tapped module carries: its feedback and, in a run that may be differentiated, the error's channel.

    In a model that streams it has the walk that runs its module (``stream.py``).

    Attributes:
      path: its own name. A module that is tapped once lends it its path.
      place: where it is.
      follows: the tap that delivers the error to the same activation, if there is one; none comes from here then.
      leaves: of what the module returns, or is given, the arrays that are tapped; ``("",)`` where it is one array. Then
        the feedback's value is one feedback, else one for each of them, by its name.
    """

    def __init__(self, place: Place, path: str) -> None:
        self.path = path
        self.place = nnx.static(place)
        self.leaves: tuple[str, ...] = ()
        self.sizes: tuple[tuple[str, tuple[int, ...]], ...] = nnx.static(())
        self.feedback = nnx.data(None)
        self.is_source = False
        self.follows: str | None = None
        self.shift = nnx.data(None)
        self.channel: Channel | None = None
        self.walk: Any = None

    @property
    def at_input(self) -> bool:
        """Whether it is below a module, so that what is above it is no block."""
        return bool(self.place.kind != "output")

    @property
    def is_receiver(self) -> bool:
        """Whether an error is delivered here."""
        return not (self.is_source or self.follows)

    def scope(self, leaf: str) -> str:
        """The name scope of a delivery, in which a slash would start another."""
        return (f"{self.path}:{leaf}" if leaf else self.path).replace("/", ".")

    def feedbacks(self) -> dict[str, Any]:
        """The feedback of every tapped leaf."""
        return {} if self.feedback is None else self.named(self.feedback.get_value())

    def named(self, value: Any) -> dict[str, Any]:
        """One value for each tapped leaf: those in a dictionary, or this one for all."""
        return value if isinstance(value, dict) else dict.fromkeys(self.leaves, value)

    def __call__(self, h: Any) -> Any:
        """Passes ``h`` on unchanged; its error will come from the output."""
        return at_leaves(h, self._functions() if self.walk is None else self.walk.entering(self))

    def _functions(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """What is done at the leaves; each is the identity but for its derivative, or for a shift."""
        if self.shift is not None:
            adding = _adding_all if self.place.kind == "parameter" else _adding
            return {name: adding(one) for name, one in self.named(self.shift.get_value()).items()}
        if self.channel is None:
            refuse = partial(undifferentiated, REFUSAL.format(f"the tap at {self.path!r}"))
            return dict.fromkeys(self.leaves, refuse) if is_transformed() else {}
        if self.follows:
            return dict.fromkeys(self.leaves, lax.stop_gradient)
        if self.is_source:
            return dict.fromkeys(self.leaves, self._send)
        if self.channel.ref is None:
            return {}
        return {name: self._receiving(name, one) for name, one in self.feedbacks().items()}

    def _send(self, leaf: jax.Array) -> jax.Array:
        assert self.channel is not None
        self.channel.source = jax.typeof(leaf)
        return leaf if self.channel.ref is None else send(leaf, self.channel.ref)

    def _receiving(self, name: str, feedback: Any) -> Callable[[jax.Array], jax.Array]:
        def run(leaf: jax.Array) -> jax.Array:
            assert self.channel is not None
            self.channel.last = self.path
            hint = other_size(leaf.shape[1:], dict(self.sizes).get(name))
            deliver = receive_for_all if self.place.kind == "parameter" and not feedback.common else receive
            with jax.named_scope(f"tap[{self.scope(name)}]"):
                return deliver(leaf, feedback, self.channel.ref, self.path, hint)

        return run


def _adding(shift: jax.Array) -> Callable[[jax.Array], jax.Array]:
    def add(leaf: jax.Array) -> jax.Array:
        try:
            return leaf + shift.astype(leaf.dtype)
        except TypeError as error:
            raise ValueError(other_size(leaf.shape[1:], shift.shape[1:])) from error

    return add


def _adding_all(shift: jax.Array) -> Callable[[jax.Array], jax.Array]:
    # One value is there for all examples. Their shifts are independent, so that each finds its own in the sum.
    total = shift.sum(0) if shift.ndim else shift
    return lambda leaf: leaf + (total.reshape(leaf.shape) if shift.ndim else total).astype(leaf.dtype)


def place_tap(modules: dict[str, Any], place: Place) -> None:
    """Taps the output or the input of one of a model's modules, or a parameter."""
    owner, _, name = place.path.rpartition("/")
    module = modules[owner if place.kind == "parameter" else place.path]
    if isinstance(module, nnx.bridge.ToNNX):
        raise TypeError(
            f"{place.path!r} is a Linen module (nnx.bridge.ToNNX), whose attributes are its own: hold it in an "
            f"nnx.Module that calls it, and name that one in at=."
        )
    own = own_taps(module)
    is_other = any(tap.path == place.path for tap in own.values())
    attribute = f"feedback_tap_{name}" if place.kind == "parameter" else "feedback_tap_at_input" if is_other else _TAP
    setattr(module, attribute, nnx.data(Tap(place, str(place) if is_other else place.path)))
    if place.kind != "parameter" and not any(tap.place.kind != "parameter" for tap in own.values()):
        intercept(module, _tapped)


_TAP = "feedback_tap"


def own_taps(module: Any) -> dict[str, Tap]:
    """The taps that a module carries, by attribute."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Tap)}


class Held(NamedTuple):
    """A tap of a model with the module that carries it, as the attribute of this name."""

    module: Any
    name: str
    tap: Tap

    @property
    def parameter(self) -> Any:
        """The parameter that it is at; None elsewhere."""
        return getattr(self.module, self.name.removeprefix(f"{_TAP}_")) if self.tap.place.kind == "parameter" else None


def held_taps(model: nnx.Module) -> dict[str, Held]:
    """The taps of a model by path, with the modules that carry them."""
    held = [Held(module, *item) for _, module in modules_of(model) for item in own_taps(module).items()]
    return {one.tap.path: one for one in sorted(held, key=lambda one: one.tap.path)}


def taps_of(model: nnx.Module) -> dict[str, Tap]:
    """The taps of a model by path."""
    return {path: one.tap for path, one in held_taps(model).items()}


def remove_taps(held: dict[str, Held], paths: Iterable[str]) -> None:
    """Undoes :func:`place_tap`."""
    for module, name, _ in map(held.pop, paths):
        _untap(module, name)


def _untap(module: Any, name: str) -> None:
    delattr(module, name)
    if all(other.place.kind == "parameter" for other in own_taps(module).values()):
        release(module)


def set_taps(model: nnx.Module, act: Callable[[Tap], None]) -> None:
    """Does something to all taps of a copy of a model that is to run, and puts those between that are at parameters."""
    for one in held_taps(model).values():
        act(one.tap)
        if one.parameter is not None:
            # Named, lest an audit take it for weights.
            one.parameter.set_value(one.tap(checkpoint_name(one.parameter.get_value(), ACTIVATION)))


def _tapped(self: Any, own_call: Any, *args: Any, **kwargs: Any) -> Any:
    output = None
    for tap in own_taps(self).values():
        if tap.place.kind == "input":
            args, kwargs = first_input(own_call, args, kwargs, tap)
        elif tap.place.kind == "output":
            output = tap
    if output is None:
        return own_call(self, *args, **kwargs)
    if output.walk is not None and output.feedback is not None:
        return output.walk.visit(output, self, own_call, args, kwargs)
    return output(own_call(self, *args, **kwargs))


def plain_of(model: nnx.Module) -> Any:
    """A model without the rule that was put on it, which shares its variables."""
    model = nnx.clone(model, variables=False)
    for _, module in list(modules_of(model)):
        restore(module)
        restore_convolution(module)
        if hasattr(module, "unseen_path"):
            del module.unseen_path
            release(module)
        for name in own_taps(module):
            _untap(module, name)
    return model
