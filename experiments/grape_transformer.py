"""GrAPE in a language model: perplexity with direct feedback between blocks, calibrated by few true gradients or none.

Claim (Caillon et al. 2026, WikiText-103): learned feedback is ahead of fixed (perplexity 42.3 against 52.0), one
mini-batch of backpropagation per epoch helps both (33.1 and 42.7), and brings GrAPE close to backpropagation (29.8).

Command: ``python -m experiments run grape_transformer`` (``--preset paper`` for the published text).

Inside a block the backward is exact; every block, and the embedding, gets its error from the output alone ("macro", of
Launay et al. 2020). The head and the normalisation before it have their true gradient under every rule. The control
that the paper lacks stands beside: as many steps of backpropagation as the calibrated arms have, and no others.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import optax
from flax import nnx

import jaxfa
from experiments import data, records, sweep, text
from experiments.gpt import GPT
from experiments.trainer import Task

PUBLISHED_BP = 29.8
PUBLISHED = {("dfa", 0): 52.0, ("dfa", 1): 42.7, ("grape", 0): 42.3, ("grape", 1): 33.1}
AXIS = "true gradients per epoch"
TAPS = ("embedding", "blocks/*")
WARMUP = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(sweep.Config):
    """The text, the network, and for how long."""

    corpus: text.TextName = "wikitext103"
    """What to learn: shakespeare by characters, the others by words."""
    vocabulary: int | None = None
    """How many of the most frequent words to keep, <unk> among them; by default all."""
    context: int = 256
    """Tokens of a window."""
    width: int = 512
    """Features of a token."""
    depth: int = 6
    """How many blocks."""
    heads: int = 8
    """Of each attention."""
    dropout: float = 0.0
    """Rate of every dropout, that of whole branches included."""
    steps: int | None = None
    """Steps of an epoch; by default as many as its windows fill."""
    calibrations: tuple[int, ...] = (0, 1)
    """Steps of an epoch that take the true gradient, one arm for each number."""
    dfa_rate: float = 1e-3
    """Of Adam under DFA."""
    grape_rate: float = 1e-3
    """Of Adam under GrAPE."""
    control_rate: float = 1e-3
    """Of Adam under a few steps of backpropagation alone."""
    feedback_rate: float = 0.05
    """Of GrAPE's feedback."""
    out: Path = Path("runs/grape_transformer")
    """The folder of the results."""

    arms = ("calibrations",)

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_below_one(self, "steps", "context")
        if min(self.calibrations, default=-1) < 0:
            raise ValueError(f"calibrations must be one or more numbers from 0 per epoch, got {self.calibrations}.")


PRESETS = {
    "cpu": Config(
        corpus="shakespeare",
        context=64,
        width=64,
        depth=4,
        heads=4,
        epochs=16,
        steps=50,
        test_images=512,
        batch=16,
        learning_rate=3e-3,
        dfa_rate=3e-3,
        grape_rate=3e-3,
        control_rate=1e-2,
        seeds=1,
    ),
    "paper": Config(
        vocabulary=32_000,
        dropout=0.1,
        epochs=20,
        batch=64,
        learning_rate=3e-4,
        dfa_rate=1e-4,
        grape_rate=1e-4,
        control_rate=1e-3,
        seeds=1,
        out=Path("runs/grape_transformer-paper"),
    ),
}
PAGE = sweep.Page(
    "How much backpropagation does a language model need?",
    "Direct feedback between the blocks of a causal transformer, exact gradients inside them, and at few steps or none "
    "the true gradient of all. The paper, by words on WikiText-103: BP 29.8, DFA 52.0, calibrated 42.7; GrAPE 42.3, "
    "calibrated 33.1. Perplexities of other texts and vocabularies do not compare with these; their order does.",
    "Caillon et al. 2026, WikiText-103",
    metric="perplexity",
    course=True,
)


def run(config: Config) -> Path:
    """Trains every arm and writes the report.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.
    """
    found = text.load(config.corpus, config.data, context=config.context, vocabulary=config.vocabulary)
    return sweep.run(config, PAGE, list(_arms(config, sweep.prepare(config, found))))


def _arms(config: Config, dataset: data.Dataset) -> Iterator[sweep.Arm]:
    same = config.corpus == "wikitext103"
    epoch = min(filter(None, (config.steps, len(dataset.train_labels) // config.batch)))
    if any(epoch % count for count in filter(None, config.calibrations)):
        # Else the control would have another number of them.
        raise ValueError(f"calibrations must divide an epoch's {epoch} steps (--steps), got {config.calibrations}.")
    bp = _task(config, dataset, config.learning_rate, epoch)
    yield sweep.Arm("bp", "Backpropagation", None, bp, PUBLISHED_BP if same else None)
    grape = jaxfa.grape(learning_rate=config.feedback_rate)
    rules = {"dfa": ("DFA", jaxfa.dfa(), config.dfa_rate), "grape": ("GrAPE", grape, config.grape_rate)}
    for name, (title, rule, rate) in rules.items():
        plain = _task(config, dataset, rate, epoch)._replace(rule=rule, at=TAPS)
        for count in config.calibrations:
            task = plain._replace(calibrate=partial(jaxfa.calibrate, every=epoch // count)) if count else plain
            published = PUBLISHED.get((name, count)) if same else None
            yield sweep.Arm(f"{name}-{count}", title, count, task, published, axis=AXIS)
    for count in filter(None, config.calibrations):
        task = _task(config, dataset, config.control_rate, count)
        yield sweep.Arm(f"alone-{count}", "As many steps of backpropagation alone", count, task, axis=AXIS)


def _task(config: Config, dataset: data.Dataset, rate: float, steps: int) -> Task:
    """Backpropagation for so many steps an epoch."""
    total = config.epochs * steps
    warmup = round(WARMUP * total)
    # Not from zero: a control of few steps would lose its first one.
    schedule = optax.warmup_cosine_decay_schedule(rate / max(1, warmup), rate, warmup, total)

    def make(rngs: nnx.Rngs) -> GPT:
        return GPT(
            dataset.classes,
            context=config.context,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            dropout=config.dropout,
            rngs=rngs,
        )

    return Task(
        make, jaxfa.backprop(), optax.adam(schedule), dataset, config.batch, inputs=lambda tokens: tokens, steps=steps
    )
