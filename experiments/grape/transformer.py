"""GrAPE in a language model: perplexity with direct feedback between blocks, calibrated by few true gradients or none.

Claim (Caillon et al. 2026, WikiText-103): learned feedback is ahead of fixed (perplexity 42.3 against 52.0), one
mini-batch of backpropagation per epoch helps both (33.1 and 42.7), and brings GrAPE close to backpropagation (29.8).

Command: ``python -m experiments run grape_transformer``; ``--preset gpu15`` for a decoder of 11 million weights on the
same text, a quarter of an hour on one H100; ``--preset paper`` for the published text.

Inside a block the backward is exact; every block, and the embedding, gets its error from the output alone ("macro").
The head has its true gradient under every rule. The control that the paper lacks stands beside: as many steps of
backpropagation as the calibrated arms have, and no others. A true gradient goes through the same Adam as the rule's.
The paper does not give its network, tokens, rates or schedule: those of the preset ``paper`` are ours. Perplexities of
other texts and vocabularies do not compare with the published ones; their order does.

Blocks end in their normalisation. Where it stands at the start of each branch instead, the sum along the network is
held by nothing, and grows under direct feedback: with GrAPE the blocks' updates were then tens of times as large as the
true gradient, and the validation perplexity higher.

Verdict: the order holds on this text: learned feedback is ahead of fixed, to the letter and in our form alike. One true
gradient an epoch changes nothing beyond the error, ten help every rule, and as many alone teach far less, so that what
is published of a single one is not seen, most likely since there are few epochs, and so few of them. No arm comes close
to backpropagation.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Annotated

import optax
from flax import nnx

import jaxfa
from experiments.common import data, experiment, text
from experiments.common.bounds import FROM_ZERO
from experiments.common.experiment import Arm, Experiment, Page
from experiments.common.task import Task
from experiments.models.gpt import GPT

PUBLISHED_BP = 29.8
PUBLISHED = {("dfa", 0): 52.0, ("dfa", 1): 42.7, ("letter", 0): 42.3, ("letter", 1): 33.1}
AXIS = "true gradients per epoch"
TAPS = ("embedding", "blocks/*")
WARMUP = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """The text, the network, and for how long."""

    corpus: text.TextName = "wikitext103"
    """The text to learn: shakespeare by characters, the others by words."""
    vocabulary: int | None = None
    """How many of the most frequent words to keep, <unk> among them; None keeps all."""
    context: int = 256
    """How many tokens a window has."""
    width: int = 512
    """How many features a token has."""
    depth: int = 6
    """How many blocks the network has."""
    heads: int = 8
    """How many heads each attention has."""
    dropout: Annotated[float, FROM_ZERO] = 0.0
    """The rate of every dropout, that of whole branches included."""
    steps: int | None = None
    """How many steps an epoch has; None takes as many as its windows fill."""
    calibrations: Annotated[tuple[int, ...], FROM_ZERO] = (0, 1)
    """How many steps of an epoch take the true gradient, one arm for each number."""
    dfa_rate: float = 1e-3
    """The learning rate of Adam under DFA."""
    grape_rate: float = 1e-3
    """The learning rate of Adam under GrAPE."""
    control_rate: float = 1e-3
    """The learning rate of Adam where a few steps of backpropagation are all there is."""
    feedback_rate: float = 0.05
    """The learning rate of GrAPE's feedback."""

    arms = ("calibrations",)

    def unread(self) -> tuple[str, ...]:
        """Without calibration there is no control."""
        return (*super().unread(), *(() if any(self.calibrations) else ("control_rate",)))


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation; both rules at every number of calibrations; those steps alone."""
    found = text.load(config.corpus, config.data, context=config.context, vocabulary=config.vocabulary)
    dataset = experiment.prepare(config, found)
    epoch = min(filter(None, (config.steps, len(dataset.train_labels) // config.batch)))
    if any(epoch % count for count in filter(None, config.calibrations)):
        # Else the control would have another number of them.
        raise ValueError(f"calibrations must divide an epoch's {epoch} steps (--steps), got {config.calibrations}.")
    bp = _task(config, dataset, config.learning_rate, epoch)
    yield Arm("bp", "Backpropagation", None, bp, PUBLISHED_BP)
    letter, ours = (rule(learning_rate=config.feedback_rate) for rule in (jaxfa.rules.published_grape, jaxfa.grape))
    rules = {
        "dfa": ("DFA", jaxfa.dfa(), config.dfa_rate),
        "letter": ("GrAPE to the letter", letter, config.grape_rate),
        "grape": ("GrAPE, scaled", ours, config.grape_rate),
    }
    for name, (title, rule, rate) in rules.items():
        plain = _task(config, dataset, rate, epoch)._replace(rule=rule, at=TAPS)
        for count in config.calibrations:
            task = plain._replace(calibrate=partial(jaxfa.calibrate, every=epoch // count)) if count else plain
            yield Arm(f"{name}-{count}", title, count, task, PUBLISHED.get((name, count)), axis=AXIS)
    for count in filter(None, config.calibrations):
        task = _task(config, dataset, config.control_rate, count)
        yield Arm(f"alone-{count}", "These steps alone", count, task, axis=AXIS)


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


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(
            corpus="shakespeare",
            context=64,
            width=64,
            depth=4,
            heads=4,
            epochs=16,
            steps=50,
            calibrations=(0, 1, 10),
            test_images=512,
            batch=16,
            learning_rate=3e-3,
            dfa_rate=3e-3,
            grape_rate=3e-3,
            control_rate=1e-2,
        ),
        # A step of 64 x 256 tokens is some 11 ms on an H100, where 16 x 256 take 20.9 in a network twice as deep and
        # twice as wide; learned feedback adds a fifth. 4000 steps of the seven arms that take all are some 6 minutes.
        "gpu15": Config(
            corpus="shakespeare",
            width=384,
            heads=6,
            dropout=0.1,
            epochs=80,
            steps=50,
            seeds=1,
            apart=True,
            save_every=1,
            minutes=11.0,
        ),
        "paper": Config(
            vocabulary=32_000,
            dropout=0.1,
            epochs=20,
            learning_rate=3e-4,
            dfa_rate=1e-4,
            grape_rate=1e-4,
            seeds=1,
        ),
    },
    Page(
        "How much backpropagation does a language model need?",
        "Caillon et al. 2026, WikiText-103",
        metric="perplexity",
        epoch="last",
    ),
    arms,
    size=("corpus", "vocabulary", "context", "width", "depth", "heads", "steps"),
)
