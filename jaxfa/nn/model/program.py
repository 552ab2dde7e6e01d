"""A call of a model as a function of the arrays in it, whatever the model is called with and whatever it returns."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, get_opaque_trace_state, jaxpr_as_fun

from jaxfa.jaxprs.versions import constants, opened
from jaxfa.nn.model.leaves import is_node
from jaxfa.nn.model.variables import Feedback, structs, written_whole

with jax.ensure_compile_time_eval():
    _OUTSIDE = get_opaque_trace_state()


def is_transformed() -> bool:
    """Whether this runs inside a transformation, of which one may be a gradient."""
    return bool(get_opaque_trace_state() != _OUTSIDE)


def at_once(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, compiled as one program, and quickly: it runs once for each of some layers.

    Feedback is drawn in this way. Layers of the same shape, and models that come later, have the program in common.
    """
    if is_transformed():
        return function(*args)  # JAX takes options at the outermost jit alone
    traced, returned = jax.make_jaxpr(function, return_shape=True)(*args)
    program = _Equations(str(traced), tuple(map(id, constants(opened(traced)))), opened(traced))
    return jax.tree.unflatten(jax.tree.structure(returned), _run(program, traced.consts, jax.tree.leaves(args)))


@dataclasses.dataclass(frozen=True)
class _Equations:
    """A traced program, which is that of another function, too, such as an equal rule's, if it is the same in words.

    Attributes:
      words: the program as JAX writes it.
      constants: which arrays the programs nested in it have; the words don't tell.
      jaxpr: the program.
    """

    words: str
    constants: tuple[int, ...]
    jaxpr: Any = dataclasses.field(compare=False)


@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 1})
def _run(program: _Equations, consts: list[Any], values: list[Any]) -> list[Any]:
    return jaxpr_as_fun(ClosedJaxpr(program.jaxpr, consts))(*values)


def method_of(name: str) -> Callable[..., Any]:
    """The function ``(model, ...)`` that calls a model's method."""
    return lambda model, *args, **kwargs: getattr(model, name)(*args, **kwargs)


class Program:
    """A function of a model and its arguments, modules among them, as one of their state.

    Attributes:
      states: the arrays of all, sorted by filters as ``nnx.split`` does; the model's paths begin with 0.
    """

    def __init__(self, model: nnx.Module, call: Callable[..., Any], args: Any, kwargs: Any, *filters: Any) -> None:
        self.nodes = (model, args, kwargs)
        self.call = call
        self.graphdef, *self.states = nnx.split(self.nodes, *filters, ...)
        self.result: Any = None

    def run(self, *states: Any, prepare: Callable[[Any], None] = lambda model: None) -> tuple[Any, Any]:
        """The arrays of what it returns and of attributes that it sets, and the state that is other than before.

        Nothing outside is changed.

        Args:
          *states: shaped as :attr:`states`.
          prepare: what to do to the copy of the model that is run.
        """
        # JAX hands literals over as NumPy's arrays, in which Flax would write in place.
        states = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), states)
        model, args, kwargs = nnx.merge(self.graphdef, *states, copy=True)
        prepare(model)
        attributes, before = _Attributes((model, args, kwargs)), arrays_of((model, args, kwargs))
        with written_whole(module for _, module, _ in attributes.before):
            returned = self.call(model, *args, **kwargs)
        self.result, outputs = nnx.split((returned, attributes.changed()))
        return outputs, changed_state((model, args, kwargs), before)

    def returned(self, outputs: Any) -> Any:
        """What it returned, with these arrays in it."""
        return nnx.merge(self.result, outputs)[0]

    def finish(self, outputs: Any, changed: Any) -> Any:
        """Gives the model and its arguments their new state; what it returned."""
        nnx.update(self.nodes, changed)
        returned, attributes = nnx.merge(self.result, outputs)
        if attributes:
            modules = dict(nnx.iter_modules(self.nodes))
            for (path, name), value in attributes.items():
                setattr(modules[path], name, value)
        return returned

    def abstractly(self, of: Callable[[Any], Any], prepare: Callable[[Any], None] = lambda model: None) -> Any:
        """The shapes of a function of what it returns."""

        def run(*states: Any) -> Any:
            return of(self.returned(self.run(*states, prepare=prepare)[0]))

        return jax.eval_shape(run, *structs(self.states))


class _Attributes:
    """The attributes of all modules, from before a call: a count, say. Arrays and variables are state instead."""

    def __init__(self, nodes: Any) -> None:
        self.before = [(path, module, dict(vars(module))) for path, module in nnx.iter_modules(nodes)]

    def changed(self) -> dict[Any, Any]:
        """What the call has set since, by the module's path and the attribute's name.

        Traced arrays are among them: Flax takes them for constants where an attribute is new.
        """
        found = {}
        for path, module, before in self.before:
            for name, value in vars(module).items():
                if name.startswith("_pytree__") or (name in before and before[name] is value):
                    continue
                if isinstance(value, nnx.Module) and name not in before:
                    raise ValueError(
                        f"The forward pass makes a new module, {name!r} of {type(module).__name__}, that no rule can "
                        f"teach yet: call the model once before attach(), or make the module in __init__."
                    )
                if name not in nnx.state(module):
                    found[path, name] = value
        return found


def arrays_of(node: Any) -> dict[Any, list[Any]]:
    """The arrays of a node's state by path."""
    return {path: jax.tree.leaves(leaf) for path, leaf in nnx.to_flat_state(nnx.state(node))}


def changed_state(node: Any, old: dict[Any, list[Any]]) -> Any:
    """What of a node's state is not as it was; the rest may be of an outer trace, in which no one may write it."""
    known = {id(one) for leaves in old.values() for one in leaves}

    def is_new(path: Any, leaf: Any) -> bool:
        leaves = jax.tree.leaves(leaf)
        if path in old and len(leaves) == len(old[path]):
            return any(one is not other for one, other in zip(leaves, old[path], strict=True))
        return any(id(one) not in known for one in leaves)  # else it is what was there, by another path

    state = nnx.to_flat_state(nnx.state(node, nnx.Not(Feedback)))
    return nnx.from_flat_state([(path, leaf) for path, leaf in state if is_new(path, leaf)])


class Example(NamedTuple):
    """Arguments by their shapes: arrays, trees, modules. Hashable, so that a module may hold it as an attribute."""

    graphdef: Any
    structure: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Example":
        """The example of these arguments, arrays or their shapes."""
        blank = jax.tree.map(_blank, (args, kwargs), is_leaf=is_node)
        graphdef, state = nnx.split(blank)
        leaves, structure = jax.tree.flatten(state)
        return cls(graphdef, structure, tuple(map(_describe, leaves)))

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, with blank arrays that take no memory."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.structure, list(map(_blank, self.leaves))))

    def marked(self, axis: int, factor: int) -> "Example":
        """The same with a batch ``factor`` times as large, if the batch is on that axis."""
        sizes = [leaf.shape[axis] for leaf in self.leaves if len(leaf.shape) > axis]

        def mark(leaf: Any) -> Any:
            if len(leaf.shape) <= axis or leaf.shape[axis] != sizes[0] or not isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf
            shape = (*leaf.shape[:axis], sizes[0] * factor, *leaf.shape[axis + 1 :])
            return jax.ShapeDtypeStruct(shape, leaf.dtype)

        return self._replace(leaves=tuple(map(mark, self.leaves)))


class _Keys(NamedTuple):
    """What makes an array of PRNG keys from numbers."""

    shape: tuple[int, ...]
    impl: Any


def _describe(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _Keys(leaf.shape, jax.random.key_impl(leaf))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _blank(leaf: Any) -> Any:
    if isinstance(leaf, _Keys):
        key = jax.random.key(0, impl=leaf.impl)
        return jax.random.split(key, leaf.shape) if leaf.shape else key
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return leaf
