"""What both families need of Flax: the variable that holds feedback, and ways to reach into a model."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.tree_util import DictKey

from jaxfa.base import Rule
from jaxfa.paths import path_name

REFUSAL = (
    "The gradient of the model inside jaxfa.nn.attach's was asked for, past {}: call the attached model, attach with "
    "method= for another method than __call__, or take jaxfa.nn.plain(attached) for true gradients."
)


class Feedback(nnx.Variable):
    """The variable type of all feedback, so that ``nnx.split`` tells it from parameters and state.

    Its value is the rule's feedback, a small dataclass of arrays.
    """


def init_at(rule: Rule, **known: Any) -> Callable[..., Any]:
    """The rule's ``init`` with what it asks for, by keyword, of what is known of the layer; most ask for nothing."""
    return functools.partial(rule.init, **{name: value for name, value in known.items() if asks(rule, name)})


def asks(rule: Rule, name: str) -> bool:
    """Whether the rule's ``init`` asks for something by this keyword."""
    return name in inspect.signature(rule.init).parameters


def init_stack(init: Callable[..., Any], key: jax.Array, stack: tuple[int, ...], *args: Any) -> Any:
    """``init(key, *args)``, or, for layers stacked on leading axes, one for each of them."""
    for _ in stack:
        init = jax.vmap(init)
    return init(jax.random.split(key, stack) if stack else key, *args)


def drawing(rule: Rule) -> Callable[[str, tuple[int, ...]], Callable[..., Any]]:
    """Of a layer's path and its leading axes what draws its feedback, ``(key, w) -> feedback``.

    Layers that are alike have one such function in common, which JAX traces once.
    """

    @functools.cache
    def known(path: str, layers: tuple[int, ...]) -> Callable[..., Any]:
        return lambda key, w: init_stack(init_at(rule, path=path), key, layers, w)

    return lambda path, layers: known(path if asks(rule, "path") else "", layers)


class Recorder:
    """Collects what modules see during one abstract forward pass. Hashable, so that it may be a static attribute."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        self.calls: dict[str, list[Any]] = {}
        self.sources: dict[str, list[Any]] = {}
        self.end: Any = None  # where an error is taken

    def record(self, path: str, value: Any, source: Any = None) -> None:
        """Keeps what is seen at a path: the first thing as what it is made for, and every call's."""
        self.seen.setdefault(path, value)
        self.calls.setdefault(path, []).append(value)
        self.sources.setdefault(path, []).append(source)  # all of them, since two are told apart by their identities


def modules_of(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Every module of a model with its path, such as ``("blocks/0/conv1", module)``; a shared one comes once."""
    for path, module in nnx.iter_modules(model):
        yield "/".join(map(str, path)), module


def intercept(module: Any, call: Callable[..., Any]) -> None:
    """Makes ``module(...)`` run ``call(module, its own __call__, ...)``.

    The module becomes one of a subclass of its class: it keeps its type, attributes, state and paths. Only ever done to
    modules of our own copy of a model.
    """
    cls: Any = type(module)
    object.__setattr__(module, "__class__", _intercepted(cls, call))


def release(module: Any) -> None:
    """Undoes :func:`intercept`."""
    if hasattr(type(module), "intercepted_by"):
        object.__setattr__(module, "__class__", type(module).__base__)


@functools.cache
def _intercepted(cls: type, call: Callable[..., Any]) -> type:
    # Cached, so that the same model attached twice has the same graph and nothing is traced again.
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, cls.__call__, *args, **kwargs)

    body = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__call__": run, "intercepted_by": call}
    return type(cls)(cls.__name__, (cls,), body)


@contextlib.contextmanager
def written_whole(modules: Iterable[Any]) -> Iterator[None]:
    """Lets variables of our own copy of a model be written quickly while it is traced.

    Flax compares the shardings of ``variable[...] = value`` first. A traced value has none, and JAX then searches the
    whole program for the reason: half of the time that it takes to trace a ResNet.
    """
    held = [value for module in modules for value in vars(module).values() if isinstance(value, nnx.Variable)]
    state: dict[int, Any] = {id(one): (one, type(one)) for one in held if not isinstance(one, nnx.Param | Feedback)}
    for one, cls in state.values():
        object.__setattr__(one, "__class__", _written_whole(cls))
    yield
    for one, cls in state.values():
        object.__setattr__(one, "__class__", cls)


@functools.cache
def _written_whole(cls: Any) -> Any:
    def set_item(self: Any, index: Any, value: Any) -> None:
        old = self.get_raw_value()
        is_whole = index is Ellipsis and isinstance(value, jax.core.Tracer) and isinstance(old, jax.Array)
        if is_whole and (value.shape, value.dtype) == (old.shape, old.dtype):
            self.set_value(value)
        else:
            cls.__setitem__(self, index, value)

    return type(cls)(cls.__name__, (cls,), {"__module__": cls.__module__, "__setitem__": set_item})


def structs(tree: Any) -> Any:
    """The shapes and dtypes of a tree's arrays; what is no array, such as a flag, stays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_array(leaf) else leaf, tree)


def leaf_name(path: Any) -> str:
    """The path of an array in a model, from that of a leaf in a program's state."""
    return path_name(key.key for key in path[1:] if isinstance(key, DictKey))


def value_of(leaf: Any) -> Any:
    """The value of a leaf of a state, a variable or a plain array."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
