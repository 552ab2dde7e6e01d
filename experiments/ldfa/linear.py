"""Low-dimensional feedback in a two-layer linear network: which of the teacher's modes a student finds.

Claim (Hanut and Kadmon 2025): with a teacher of rank ``d``, learned feedback of rank ``r >= d`` recovers it as
backpropagation does; ``r < d`` recovers the leading modes alone; a fixed projection gets stuck at spurious solutions.

Command: ``python -m experiments run ldfa_linear`` (no data needed).

The paper's set-up: 128 inputs, 64 hidden units, 64 outputs, ``d = 2``, learning rate 2.5e-3, decay 1e-5, weights of
deviation 1/64, 5000 iterations. Ours differs in three points: inputs are exactly white and the batch is all of them, so
that nothing but the feedback matters; ``P`` and ``Q`` start from the library's random projection, not from the
weights' singular vectors; ``P`` learns at a constant 1e-3 from the covariance divided by its trace, where the paper
has 1e-3 times 0.999 per iteration and the covariance itself. We train on past iteration 5000, where slow and stuck look
alike.

A mode's factor is its rate of learning as a multiple of backpropagation's in the same student, ``(B u_i)^T (W_2 u_i)``
over ``|W_2 u_i|^2`` for the feedback ``B = Q P^T`` and the mode's direction ``u_i`` at the output. Its share is
``|P^T u_i|^2``, what the projection keeps of it.

A fixed projection is not stuck, since where the second layer has learned what it can, the error is
``E = (1 - H) V S U^T``, ``H`` projecting on what the hidden layer sees. So ``E P = 0`` means ``E = 0`` as soon as
``U^T P`` has rank ``d``, as it has for almost every ``P`` of rank ``d`` or more. Below ``d`` there are such points:
mixtures of the modes.

Verdict: the first two parts hold where the paper stops, at rank 1 within wide errors. The third does not as said: a
fixed projection is slow, since its factors, the rates at which modes are learned beside backpropagation's, stay near
zero while a learned one's grow with its share.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.nn import initializers
from matplotlib.figure import Figure

import jaxfa
from experiments.common import plots, records
from experiments.common.bounds import FROM_ZERO, between
from experiments.common.experiment import Experiment, Histories, Page, Seeds, Study, Table
from experiments.common.metrics import shown

INPUTS, HIDDEN, OUTPUTS = 128, 64, 64
PUBLISHED = 5000  # where the paper stops
POINTS = 300
BACKPROP = "backpropagation"
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "P and Q learned": ({}, plots.BLUE),
    "P fixed, Q learned": ({"learn_p": False}, plots.VERMILLION),
    "P and Q fixed": ({"learn_p": False, "learn_q": False}, plots.PURPLE),
}
CLAIMS = {
    ("full", "P and Q learned"): "recovers the teacher",
    ("enough", "P and Q learned"): "recovers the teacher",
    ("few", "P and Q learned"): "the leading mode alone",
    ("enough", "P and Q fixed"): "stuck",
    ("few", "P and Q fixed"): "stuck",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Seeds):
    """The teacher, the ranks, and for how long."""

    ranks: Annotated[tuple[int, ...], between(1, OUTPUTS)] = (64, 2, 1)
    """Ranks of the feedback, one panel each."""
    strengths: tuple[float, ...] = (2.0, 1.0)
    """The teacher's singular values, from the largest; their number is its rank."""
    iterations: int = 15_000
    """Steps of gradient descent."""
    learning_rate: float = 2.5e-3
    """The learning rate of the weights and of Q."""
    feedback_rate: Annotated[float, FROM_ZERO] = 1e-3
    """The learning rate of P, the projection of the error."""
    weight_decay: Annotated[float, FROM_ZERO] = 1e-5
    """The decay of Q and of the weights at each step."""
    seeds: int = 5
    """How many trainings each arm has, side by side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.strengths) > OUTPUTS:
            raise ValueError(f"strengths must be at most {OUTPUTS} numbers, got {self.strengths}.")


def study(config: Config, histories: Histories) -> Study:
    """Trains every student."""
    del histories
    found = {(0, BACKPROP): modes(config, jaxfa.backprop())}
    for rank in config.ranks:
        for name in VARIANTS:
            found[rank, name] = modes(config, rule(config, rank, name))
    for (rank, name), values in found.items():
        if not np.isfinite(values).all():
            folder = config.out / f"{name}, rank {rank}"
            folder.mkdir(exist_ok=True)
            records.replace(folder / records.DIVERGED, "diverged: the overlap with a mode is no finite number")
    steps = _interval(config) * np.arange(1, config.iterations // _interval(config) + 1)
    caption = (
        f"Overlap of the student with each of the teacher's modes, 1 when it is learned; thick, the mean of "
        f"{config.seeds} seeds, thin, each of them. The dotted line is where the paper stops."
    )
    last = {f"{rank} {name}": values[:, -1, 0].tolist() for (rank, name), values in found.items()}
    tables = [Table("Overlaps with the modes", table(config, steps, found)), Table("Factors", factors(found))]
    return Study(figure(config, steps, found), caption, tables, findings(config, steps, found), last)


def rule(config: Config, rank: int, name: str) -> jaxfa.Rule:
    """The rule of one student."""
    return jaxfa.ldfa(
        rank,
        **VARIANTS[name][0],
        learning_rate=config.feedback_rate,
        weight_decay=config.weight_decay,
        # As wide as the weights themselves: fixed feedback then starts on backpropagation's scale.
        distribution=initializers.normal(1 / HIDDEN),
    )


def modes(config: Config, rule: jaxfa.Rule) -> np.ndarray:
    """How much of each of the teacher's modes a student has learned, ``v_i^T W_1 W_2 u_i / s_i``; factors, shares.

    Args:
      config: a :class:`Config`.
      rule: of the second layer, which sends the error to the first.

    Returns:
      ``(seeds, points, 3, modes)`` over training.
    """
    keys = jnp.stack([jax.random.key(seed) for seed in range(config.seed, config.seed + config.seeds)])
    return np.asarray(jax.jit(jax.vmap(lambda key: _train(config, rule, key)))(keys))


def _train(config: Config, rule: jaxfa.Rule, key: jax.Array) -> jax.Array:
    v_key, u_key, first_key, second_key, feedback_key = jax.random.split(key, 5)
    strengths = jnp.array(config.strengths)
    v = initializers.orthogonal()(v_key, (INPUTS, len(strengths)))
    u = initializers.orthogonal()(u_key, (OUTPUTS, len(strengths)))
    x = jnp.sqrt(INPUTS) * jnp.eye(INPUTS)
    y = x @ (v * strengths[None]) @ u.T
    first = initializers.normal(1 / OUTPUTS)(first_key, (INPUTS, HIDDEN))
    second = initializers.normal(1 / HIDDEN)(second_key, (HIDDEN, OUTPUTS))
    learned = ((first, second), rule.init(feedback_key, second))
    tx = jaxfa.optimizer(optax.sgd(config.learning_rate), rule)

    def loss(learned: Any) -> jax.Array:
        (first, second), feedback = learned
        return 0.5 * jnp.sum((jaxfa.linear(jaxfa.linear(x, first), second, feedback) - y) ** 2) / INPUTS

    def step(state: Any, _: None) -> tuple[Any, None]:
        learned, optimizer = state
        updates, optimizer = tx.update(jax.grad(loss)(learned), optimizer, learned)
        return (optax.apply_updates(learned, updates), optimizer), None

    def record(state: Any, _: None) -> tuple[Any, jax.Array]:
        state, _ = lax.scan(step, state, length=_interval(config))
        (first, second), feedback = state[0]
        b = second if feedback is None else feedback.matrix(second)
        share = jnp.ones(len(strengths)) if feedback is None else jnp.sum((feedback.p.T @ u) ** 2, 0)
        factor = jnp.sum((b @ u) * (second @ u), 0) / jnp.sum((second @ u) ** 2, 0)
        return state, jnp.stack([jnp.sum(v * (first @ second @ u), 0) / strengths, factor, share])

    return lax.scan(record, (learned, tx.init(learned)), length=config.iterations // _interval(config))[1]


def _interval(config: Config) -> int:
    """Iterations from one point of the figure to the next."""
    return max(1, config.iterations // POINTS)


def table(config: Config, steps: np.ndarray, found: dict[tuple[int, str], np.ndarray]) -> list[list[str]]:
    """The overlaps where the paper stops and at the end, beside what the paper says."""
    stops = sorted({int(np.argmin(abs(steps - PUBLISHED))), len(steps) - 1})
    rows = [["rank", "feedback", *(f"modes, iteration {steps[stop]}" for stop in stops), "the paper"]]
    for (rank, name), values in found.items():
        cells = [", ".join(map(shown, values[:, stop, 0].T)) for stop in stops]
        rows.append([str(rank or ""), name, *cells, CLAIMS.get((_case(config, rank), name), "")])
    return rows


def findings(config: Config, steps: np.ndarray, found: dict[tuple[int, str], np.ndarray]) -> list[tuple[str, str]]:
    """At every rank how much of the weakest mode is learned where the paper stops."""
    stop, told = int(np.argmin(abs(steps - PUBLISHED))), []
    for rank in config.ranks:
        weakest = {name: f"{found[rank, name][:, stop, 0, -1].mean():.2f}" for name in VARIANTS}
        first, *others = weakest
        said = f"of the weakest mode is learned by iteration {steps[stop]} through feedback of rank {rank}, {first}"
        told.append((weakest[first], "; ".join([said, *(f"{name}: {weakest[name]}" for name in others)]) + "."))
    return told


def factors(found: dict[tuple[int, str], np.ndarray]) -> list[list[str]]:
    """Each mode's factor early and at the end, and its share in ``P``."""
    rows = [["rank", "feedback", "factors at first", "factors at the end", "shares at the end"]]
    for (rank, name), values in found.items():
        cells = [values[:, 0, 1], values[:, -1, 1], values[:, -1, 2]]
        rows.append([str(rank or ""), name, *(", ".join(map(shown, cell.T)) for cell in cells)])
    return rows


def _case(config: Config, rank: int) -> str:
    """Whether a rank is below the teacher's, reaches it, or is that of the outputs."""
    if rank == OUTPUTS:
        return "full"
    return "enough" if rank >= len(config.strengths) else "few"


def figure(config: Config, steps: np.ndarray, found: dict[tuple[int, str], np.ndarray]) -> Figure:
    """One row per mode, one column per rank."""
    modes = len(config.strengths)
    drawn = Figure(figsize=(2.6 * len(config.ranks) + 0.3, 1.75 * modes + 0.7), layout="constrained")
    grid = drawn.subplots(modes, len(config.ranks), sharex=True, sharey=True, squeeze=False)
    for row, mode in zip(grid, range(modes), strict=True):
        for axes, rank in zip(row, config.ranks, strict=True):
            plots.lines(axes, steps, found[0, BACKPROP][..., 0, mode], plots.GREY, BACKPROP)
            for name, (_, color) in VARIANTS.items():
                plots.lines(axes, steps, found[rank, name][..., 0, mode], color, name)
            axes.axvline(PUBLISHED, color=plots.INK, linewidth=0.8, linestyle=":")
            axes.set_xscale("log")
            axes.set_ylim(-0.05, 1.1)
            axes.grid(axis="y")
        row[0].set_ylabel(f"overlap with mode {mode + 1}\n(strength {config.strengths[mode]:g})")
    for axes, rank in zip(grid[0], config.ranks, strict=True):
        relation = {"full": "full rank", "enough": "$r ≥ d$", "few": "$r < d$"}[_case(config, rank)]
        axes.set_title(f"rank {rank}: {relation}", color=plots.INK)
    for axes in grid[-1]:
        axes.set_xlabel("iterations")
    plots.legend_below(drawn, 4)
    return drawn


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(), "paper": Config(iterations=PUBLISHED, seeds=20)},
    Page("Which modes does low-rank feedback find?", "Hanut and Kadmon 2025, after 5000 iterations"),
    study=study,
)
