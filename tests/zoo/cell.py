"""The cells of the zoo: a model learns by a rule, or is refused in words."""

import contextlib
import functools
import pathlib
import re
import traceback
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxfa
import jaxfa.nn
from jaxfa.base import is_direct, keep
from jaxfa.nn.model.leaves import error_in
from tests.zoo.model import Model, Penalty

LIBRARY = str(pathlib.Path(jaxfa.__file__).parent)
TRAINED = (nnx.Param, jaxfa.nn.Feedback)


class Column(NamedTuple):
    """How a model learns.

    Attributes:
      rule: the rule.
      at: whether it taps where the model's row says.
      schedule: of :func:`jaxfa.nn.attach`.
      classes: whether the loss is the cross-entropy of hard labels, which alone tells a local loss its targets.
    """

    rule: jaxfa.Rule
    at: bool = False
    schedule: jaxfa.stacks.Schedule = jaxfa.stacks.stored
    classes: bool = False


COLUMNS = {
    "fa": Column(jaxfa.fa()),
    "kolen_pollack": Column(jaxfa.kolen_pollack()),
    "ldfa": Column(jaxfa.ldfa(2)),
    "ssa": Column(jaxfa.ssa()),
    "ssa(parallel=False)": Column(jaxfa.ssa(parallel=False)),
    "dfa()": Column(jaxfa.dfa()),
    "dfa(at=)": Column(jaxfa.dfa(), at=True),
    "grape(at=)": Column(jaxfa.grape(), at=True),
    "streamed dfa(at=)": Column(jaxfa.dfa(), at=True, schedule=jaxfa.stacks.stream),
    "forward_gradient(at=)": Column(jaxfa.forward_gradient(), at=True),
    # By less than that both passes of the VQ-VAE find the same codes, and nothing behind them learns.
    "pepita(scale=3)": Column(jaxfa.pepita(scale=3.0)),
    "local_classifier(at=)": Column(jaxfa.local_classifier(), at=True, classes=True),
    "predsim(at=)": Column(jaxfa.predsim(), at=True, classes=True),
    "auglocal(at=)": Column(jaxfa.auglocal(), at=True, classes=True),
}
PLAIN = {False: "plain", True: "plain, classes"}


class Learnt(NamedTuple):
    """What a model comes to.

    Attributes:
      outputs: what it returned, while it was differentiated.
      written: its state after the forward pass, parameters and feedback apart.
      gradients: of parameters and feedback, by path.
      step: by how much a step moves the parameters, by path.
    """

    outputs: Any
    written: dict[str, Any]
    gradients: dict[str, Any]
    step: dict[str, Any]


class Cell(NamedTuple):
    """A model that a rule has taught.

    Attributes:
      learnt: what it came to.
      reference: what the same model as a plain loop came to, where there is one.
      outputs: what the model returned, undifferentiated.
      aligned: the model before.
    """

    learnt: Learnt
    reference: Learnt | None = None
    outputs: Any = None
    aligned: Any = None


@functools.cache
def plain(row: Model) -> Any:
    """The row's model in double precision, which nobody may change."""
    graphdef, state = nnx.split(row.make(nnx.Rngs(0)))
    return nnx.merge(graphdef, jax.tree.map(_double, state))


def _double(a: jax.Array) -> jax.Array:
    return a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a


def attach(row: Model, column: Column) -> Any:
    """The row's model with the column's rule; what the row does not name, its users do not, either."""
    named = {"example_kwargs": row.kwargs(), "allow": row.allow, "at": row.at if column.at else None}
    if row.method != "__call__":
        named["method"] = row.method
    if row.logits is not None and is_direct(column.rule):
        named["logits"] = row.logits
    named = {name: value for name, value in named.items() if value}
    example = {"rngs": nnx.Rngs(1), "example": row.args(), "schedule": column.schedule}
    return jaxfa.nn.attach(plain(row), column.rule, **example, **named)


def refusal(error: BaseException) -> str | None:
    """The words of a refusal, first the reason and then the way round; of any other error, None."""
    where = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if not isinstance(error, TypeError | ValueError) or not where.is_relative_to(LIBRARY):
        return None
    lines = str(error).splitlines()
    reason = next((line for line in lines if line.startswith("- ")), lines[0]).removeprefix("- ")
    advice = [line for line in lines if re.match(r"(No )?at=.* (would do|names what)", line)]
    return " ".join(" ".join([reason, *advice]).split())


def loss_of(row: Model, model: Any, method: str, *, classes: bool = False) -> Any:
    """A number: every output has a target, and the model's own penalties count; what the model returned, too."""
    outputs = getattr(model, method)(*row.args(), **row.kwargs())
    if classes:
        logits = error_in(outputs, row.logits)
        labels = jnp.arange(logits[..., 0].size).reshape(logits.shape[:-1]) % logits.shape[-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + penalties(model), outputs
    leaves = map(jnp.asarray, jax.tree.leaves(outputs if row.logits is None else row.logits(outputs)))
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(jnp.mean((leaf - 1) ** 2) for leaf in floats) + penalties(model), outputs


def penalties(model: Any) -> Any:
    """The sum of the terms that a model has written down in its forward pass."""
    return sum(map(jnp.sum, jax.tree.leaves(nnx.pop(model, Penalty))))


def learn(row: Model, model: Any, column: Column | None = None, *, classes: bool = False) -> Learnt:
    """Gradients and a step, of a copy, to be traced."""
    model, rule = nnx.clone(model), column and column.rule
    if rule is not None and rule.refine is not keep:
        model.refine(jax.random.key(0), *row.args(), **row.kwargs())
    loss = functools.partial(loss_of, classes=column.classes if column else classes)
    grad = nnx.grad(loss, argnums=nnx.DiffState(1, TRAINED), has_aux=True)
    gradients, outputs = grad(row, model, row.method if rule is None else "__call__")
    written = flat(nnx.state(model if rule is None else model.model, nnx.Not(nnx.Any(*TRAINED))))
    before = flat(nnx.state(model, nnx.Param))
    tx = optax.adam(1e-2) if rule is None else jaxfa.optimizer(optax.adam(1e-2), rule)
    nnx.Optimizer(model, tx, wrt=TRAINED).update(model, gradients)
    step = jax.tree.map(jnp.subtract, flat(nnx.state(model, nnx.Param)), before)
    return Learnt(outputs, written, flat(gradients), step)


def flat(state: Any) -> dict[str, Any]:
    """Values by path, keys as numbers; an attached model's paths are the model's."""
    leaves = {"/".join(map(str, path)).removeprefix("model/"): leaf for path, leaf in nnx.to_flat_state(state)}
    values = {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in leaves.items()}
    return {path: jax.random.key_data(value) if _is_key(value) else value for path, value in values.items()}


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def unstacked(values: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """The same at the paths of a reference, whose lists of blocks are stacked in the model itself."""
    found = {}
    for path in paths:
        segments = path.split("/")
        index = next((i for i, segment in enumerate(segments) if path not in values and segment.isdigit()), None)
        if index is None:
            found[path] = values[path]
        else:
            stack = values["/".join(segments[:index] + segments[index + 1 :])]
            found[path] = jax.tree.map(lambda a, i=int(segments[index]): a[i], stack)
    return found


def twin(row: Model, column: Column, aligned: Any) -> Any:
    """The row's reference with the column's rule and the parameters and feedback of the row's model."""
    make, at = row.reference
    other = attach(row._replace(make=make, at=at, reference=None), column)
    graphdef, ours, rest = nnx.split(other, nnx.Any(*TRAINED), ...)
    values = unstacked(flat(nnx.state(aligned, TRAINED)), flat(ours))
    leaves = [
        (path, leaf.replace(value))
        for (path, leaf), value in zip(nnx.to_flat_state(ours), values.values(), strict=True)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves), rest)


def study(row: Model, names: Iterable[str]) -> dict[str, str | Cell]:
    """For each column the words of its refusal, or what the model has learnt; the plain model is there, by each loss.

    All is two programs, since most time goes to compiling.
    """
    refusals: dict[str, Any] = {}
    attached: dict[str, tuple[Any, Any]] = {}
    for name in names:
        with refused(refusals, name):
            aligned = attach(row, COLUMNS[name])
            attached[name] = aligned, row.reference and twin(row, COLUMNS[name], aligned)

    def forward() -> dict[str, Any]:
        own = loss_of(row, nnx.clone(plain(row)), row.method)[1]
        outputs = {name: own for name in PLAIN.values() if name in found}
        models = {name: nnx.clone(attached[name][0]) for name in found if name in attached}
        return outputs | {name: loss_of(row, model, "__call__")[1] for name, model in models.items()}

    def program() -> dict[str, Any]:
        losses = {False} | {COLUMNS[name].classes for name in attached}
        learnt = {PLAIN[classes]: Cell(learn(row, plain(row), classes=classes)) for classes in sorted(losses)}
        for name, models in attached.items():
            with refused(refusals, name):
                learnt[name] = Cell(*(model and learn(row, model, COLUMNS[name]) for model in models))
        return learnt

    found = jax.jit(program)()
    outputs = jax.jit(forward)()
    return refusals | {
        name: cell._replace(outputs=outputs[name], aligned=attached.get(name, (None,))[0])
        for name, cell in found.items()
    }


@contextlib.contextmanager
def refused(refusals: dict[str, Any], name: str) -> Iterator[None]:
    """Writes the words of a refusal down; any other error is one."""
    try:
        yield
    except Exception as error:
        words = refusal(error)
        if words is None:
            error.add_note(f"in the zoo's column {name}")
            raise
        refusals[name] = words
