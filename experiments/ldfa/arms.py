"""What the LDFA experiments share: the variants of the rule, arms by variant and rank, the fully connected network."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jaxfa
from experiments.common import experiment
from experiments.common.augment import crop_and_flip, flip_and_rotate
from experiments.common.bounds import FROM_ZERO
from experiments.common.data import Dataset
from experiments.common.experiment import Arm
from experiments.common.optimizers import adam
from experiments.common.task import Task
from experiments.models.networks import MLP, Shape
from jaxfa.base import is_layer

# The rate of P: of .01, .1, .3 and .5 the best at rank 10 by accuracy on the validation split (width 256, 8000 images,
# 6 epochs, batch 128); at rank 4 all but .01 are level. The last layer's P does better by errors than by labels.
FEEDBACK_RATE = 0.5
REBUILDING = 0.1  # how much of what is missing Q rebuilds in a step; ours

Make = Callable[[Shape, int, nnx.Rngs], nnx.Module]
Augment = Callable[[jax.Array, jax.Array], jax.Array]
VariantName = Literal["both", "local", "hebbian", "rebuilt", "fixed", "normative"]


class Variant(NamedTuple):
    """A way for the factors to learn, or a place for them.

    Attributes:
      title: what the report calls it.
      rule: ``(rank, rate of P) -> rule``.
      at: where the rule goes.
      allow: the layers that may stay with backpropagation.
      most: the largest rank that there can be; None where layers set it.
    """

    title: str
    rule: Callable[[Any, float], jaxfa.Rule]
    at: tuple[str, ...] | None = None
    allow: tuple[str, ...] = ()
    most: int | None = None


def low_rank(rank: Any, rate: float = FEEDBACK_RATE, **options: Any) -> jaxfa.Rule:
    """Low-rank feedback whose decay is the optimizer's L2 penalty, for Q as for the weights, so that it adds none."""
    return jaxfa.ldfa(rank, learning_rate=rate, weight_decay=0.0, **options)


def rebuilt(rank: Any, rate: float = FEEDBACK_RATE, *, step: float = REBUILDING) -> jaxfa.Rule:
    """``P`` by Oja's rule and ``Q`` by reconstruction: of noise at the layer's input, from ``P``'s view of its output.

    ``min_q |x - q p^T w^T x|^2`` by gradient steps, divided by the power of ``p^T w^T x``, before each step of the
    weights. Its solution is ``q = w p (p^T w^T w p)^-1``, the pseudo-inverse of what ``P`` sees, not the transpose.
    """
    rule = low_rank(rank, rate, learn_q=False)

    def follow(layer: jaxfa.Layer, feedback: Any, key: jax.Array) -> Any:
        x = jax.random.normal(key, layer.x.shape, layer.x.dtype)
        y = layer.op(x, layer.w)
        power = jnp.sum((y @ feedback.p) ** 2) * feedback.q.size / (feedback.p.shape[-1] * x.shape[-1])

        def missing(q: jax.Array) -> jax.Array:
            return jnp.sum((x - dataclasses.replace(feedback, q=q).transport(layer.op, x, layer.w, y)) ** 2) / 2

        return dataclasses.replace(feedback, q=feedback.q - step / power * jax.grad(missing)(feedback.q))

    def refine(forward: Any, feedback: Any, key: jax.Array) -> Any:
        keys = iter(jax.random.split(key, len(jax.tree.leaves(forward, is_leaf=is_layer))))
        return jax.tree.map(lambda one, b: follow(one, b, next(keys)), forward, feedback, is_leaf=is_layer)

    return dataclasses.replace(rule, refine=refine)


VARIANTS: dict[str, Variant] = {
    "both": Variant("P and Q learned", low_rank),
    "local": Variant("P learned, Q fixed", partial(low_rank, learn_q=False)),
    "hebbian": Variant("Q learned, P fixed", partial(low_rank, learn_p=False)),
    "rebuilt": Variant("P learned, Q by reconstruction", rebuilt),
    "fixed": Variant("Both fixed", partial(low_rank, learn_p=False, learn_q=False)),
    "normative": Variant("Fitted to the weights", lambda rank, rate: jaxfa.normative_ldfa(rank)),
}

# What presets share.
CPU: dict[str, Any] = {"shrink": 2, "epochs": 6, "images": 8000, "test_images": 2000}
RATELESS = {"fixed", "hebbian", "normative"}  # where P does not learn at a rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """The ranks, how the factors learn, and at what rate."""

    ranks: tuple[float, ...]
    """Ranks of the feedback; with a point, as fractions of each layer's outputs."""
    variants: tuple[str, ...]
    """How the factors learn."""
    feedback_rate: Annotated[float, FROM_ZERO] = FEEDBACK_RATE
    """The learning rate of P, the projection of the error; it was tuned in ldfa_rank_mlp alone."""
    shrink: int = 1
    """The side of the squares of pixels that are averaged."""

    arms: ClassVar[tuple[str, ...]] = ("ranks", "variants")

    def unread(self) -> tuple[str, ...]:
        """Where no P learns, it does so at no rate."""
        return (*super().unread(), *(() if {*self.variants} - RATELESS else ("feedback_rate",)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Varied(Config):
    """The same, of the variants that every network can have."""

    variants: tuple[VariantName, ...] = ("both", "local", "hebbian", "rebuilt", "fixed")
    """How P and Q learn: both; P alone, the local rule; Q alone, hebbian; Q by reconstruction; neither; or fitted."""


def by_rank(
    config: Config,
    plain: Task,
    *,
    variants: Mapping[str, Variant] = VARIANTS,
    published: Mapping[str, Mapping[float, float]] | None = None,
    at: tuple[str, ...] | None = None,
    allow: tuple[str, ...] = (),
    group: str = "",
    axis: str = "rank",
) -> Iterator[Arm]:
    """Arms for every variant and rank of a configuration, after the same training by backpropagation.

    Args:
      config: the ranks and variants.
      plain: the training by backpropagation.
      variants: what the configuration's names mean.
      published: the published number of each rank, by variant.
      at: where the rule goes, if the variant does not say.
      allow: the layers that may stay with backpropagation, likewise.
      group: what all arms are called, if not by their variants; their names begin with it.
      axis: what a rank counts.
    """
    start = f"{group}-".replace(" ", "-") if group else ""
    yield Arm(f"{start}bp", group or "Backpropagation", None, plain, (published or {}).get("bp", {}).get(0))
    for name in config.variants:
        chosen = variants[name]
        numbers = (published or {}).get(name, {})
        for rank in (rank for rank in config.ranks if rank <= (chosen.most or rank)):
            rate = FEEDBACK_RATE if name in RATELESS else config.feedback_rate
            rule = chosen.rule(rank if axis != "rank" else int(rank), rate)
            task = plain._replace(rule=rule, at=chosen.at or at, allow=chosen.allow or allow)
            title = group or chosen.title
            # Where all have one rank, it tells none of them apart.
            called = title if len(config.ranks) == 1 else ""
            yield Arm(f"{start}{name}-{rank:g}", title, rank, task, numbers.get(rank), f"{start}bp", axis, called)


def bp(
    config: experiment.Config, dataset: Dataset, make: Make, *, augment: Augment = crop_and_flip, **options: Any
) -> Task:
    """Backpropagation in a network ``make(shape, classes, rngs)`` by the paper's :func:`adam` with these options."""
    shape, classes = dataset.train_images.shape[1:], dataset.classes
    optimizer = adam(config.learning_rate, steps=len(dataset.train_labels) // config.batch, **options)
    return Task(partial(make, shape, classes), jaxfa.backprop(), optimizer, dataset, config.batch, augment=augment)


def mlp(config: experiment.Config, dataset: Dataset, *, width: int, degrees: float) -> Task:
    """Backpropagation in the paper's fully connected network, three hidden layers of a width, images turned."""
    made = partial(wide, width)
    turned = partial(flip_and_rotate, degrees=degrees)
    return bp(config, dataset, made, weight_decay=4e-4, decay=0.975, amsgrad=True, augment=turned)


def wide(width: int, shape: Shape, classes: int, rngs: nnx.Rngs) -> MLP:
    """Three normalised hidden layers."""
    return MLP(shape, classes, (width,) * 3, normalised=True, rngs=rngs)
