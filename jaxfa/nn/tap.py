"""Direct rules: a tap on a module's output, or on a layer's input, to which the output error is delivered."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import lax

from jaxfa.delivery import receive, send, undifferentiated
from jaxfa.nn.contraction import restore
from jaxfa.nn.leaves import at_leaves, named_floats
from jaxfa.nn.program import is_transformed
from jaxfa.nn.variables import REFUSAL, Recorder, intercept, modules_of, release


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


class Tap(nnx.Module):
    """What a tapped module carries: its feedback and, in a run that may be differentiated, the error's channel.

    In a model that streams it has the walk that runs its module (``stream.py``).

    Attributes:
      follows: the tap that delivers the error to the same activation, if there is one; none comes from here then.
      leaves: of what the module returns, or is given, the arrays that are tapped; ``("",)`` where it is one array. Then
        the feedback's value is one feedback, else one for each of them, by its name.
    """

    def __init__(self, path: str, *, at_input: bool) -> None:
        self.path = path
        self.at_input = at_input
        self.leaves: tuple[str, ...] = ()
        self.feedback = nnx.data(None)
        self.is_source = False
        self.follows: str | None = None
        self.shift = nnx.data(None)
        self.channel: Channel | None = None
        self.recorder: Recorder | None = None
        self.walk: Any = None

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
        if self.recorder is not None:
            self.recorder.record(self.path, {name: _struct(leaf) for name, leaf in named_floats(h).items()}, h)
            return h
        return at_leaves(h, self._functions())

    def _functions(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """What is done at the leaves; each is the identity but for its derivative, or for a shift."""
        if self.shift is not None:
            return {name: _adding(one) for name, one in self.named(self.shift.get_value()).items()}
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
            with jax.named_scope(f"tap[{self.scope(name)}]"):
                return receive(leaf, feedback, self.channel.ref)

        return run


def _adding(shift: jax.Array) -> Callable[[jax.Array], jax.Array]:
    return lambda leaf: leaf + shift.astype(leaf.dtype)


def _struct(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def place_tap(module: Any, path: str, *, at_input: bool) -> None:
    """Taps a module's output, or its input."""
    if isinstance(module, nnx.bridge.ToNNX):
        raise TypeError(
            f"{path!r} is a Linen module (nnx.bridge.ToNNX), whose attributes are its own: hold it in an nnx.Module "
            f"that calls it, and name that one in at=."
        )
    module.feedback_tap = nnx.data(Tap(path, at_input=at_input))
    intercept(module, _tapped_input if at_input else _tapped_output)


def remove_tap(module: Any) -> None:
    """Undoes :func:`place_tap` or :func:`refuse_calls`, where it was done."""
    if hasattr(module, "feedback_tap"):
        del module.feedback_tap
        release(module)
    elif hasattr(module, "unseen_path"):
        del module.unseen_path
        release(module)


def refuse_calls(module: Any, path: str) -> None:
    """Lets a module that the example's call does not come to refuse the gradient of a call that does."""
    module.unseen_path = path
    intercept(module, _unseen)


def _unseen(self: Any, own_call: Any, *args: Any, **kwargs: Any) -> Any:
    h = own_call(self, *args, **kwargs)
    reason = (
        f"This call comes to {self.unseen_path!r}, which the example of attach() does not, so that it would learn by "
        f"backpropagation: give attach() an example of this call, or allow={self.unseen_path!r}."
    )
    return at_leaves(h, dict.fromkeys(named_floats(h), partial(undifferentiated, reason))) if is_transformed() else h


def _tapped_input(self: Any, own_call: Any, *args: Any, **kwargs: Any) -> Any:
    if args:
        return own_call(self, self.feedback_tap(args[0]), *args[1:], **kwargs)
    name = next(name for name in inspect.signature(own_call).parameters if name in kwargs)
    return own_call(self, **kwargs | {name: self.feedback_tap(kwargs[name])})


def _tapped_output(self: Any, own_call: Any, *args: Any, **kwargs: Any) -> Any:
    tap = self.feedback_tap
    if tap.walk is not None and tap.feedback is not None:
        return tap.walk.visit(tap, self, own_call, args, kwargs)
    return self.feedback_tap(own_call(self, *args, **kwargs))


def taps_of(model: nnx.Module) -> dict[str, Tap]:
    """The taps of a model by path."""
    found = [module.feedback_tap for _, module in modules_of(model) if hasattr(module, "feedback_tap")]
    return {tap.path: tap for tap in sorted(found, key=lambda tap: tap.path)}


def plain_of(model: nnx.Module) -> Any:
    """A model without the rule that was put on it, which shares its variables."""
    model = nnx.clone(model, variables=False)
    for _, module in list(modules_of(model)):
        restore(module)
        remove_tap(module)
    return model
