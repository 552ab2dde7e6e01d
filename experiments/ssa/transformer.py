"""SSA in a transformer, attention's projections factored too: perplexity of text by characters.

Claim (Roy, Apolinario, Das Biswas and Roy 2025): none; transformers are the paper's future work.

Command: ``python -m experiments run ssa_transformer``.

Every linear layer of the blocks and the head are factors, and so are attention's four projections. Read sequentially,
errors go from layer to layer through factored feedback, and through attention's own softmax and products exactly.
In parallel, each layer's input gets the output error, and errors go on by the shortcuts; DFA delivers to the embedding
and to the blocks' outputs, below which it is exact.

Verdict: only the sequential reading whose alignment pulls the feedback, which is weight transport, is ahead of DFA, and
close to SVD training by backpropagation. The literal pull, of the weights to random matrices, aligns the sequential
reading well, and still leaves either reading behind DFA and worse off than no alignment does, most likely since weights
that serve the pull serve the task less.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

import optax
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.common import experiment, text
from experiments.common.bounds import FROM_ZERO
from experiments.common.experiment import Arm, Experiment, Page
from experiments.common.task import Task
from experiments.models.gpt import GPT
from experiments.ssa import arms as ssa_arms

TAPS = ("embedding", "blocks/*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """The network, for how long, and the weight of the alignment."""

    corpus: text.TextName = "shakespeare"
    """The text to learn: shakespeare by characters, the others by words."""
    context: int = 64
    """How many tokens a window has."""
    width: int = 64
    """How many features a token has."""
    depth: int = 2
    """How many blocks the network has."""
    heads: int = 4
    """How many heads each attention has."""
    steps: int = 100
    """How many steps an epoch has."""
    beta: Annotated[float, FROM_ZERO] = 0.1
    """The weight of the alignment loss."""


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation, dense and factored; DFA between the blocks; all readings of SSA, without alignment, too."""
    dataset = experiment.prepare(config, text.load(config.corpus, config.data, context=config.context, vocabulary=None))

    def make(rngs: nnx.Rngs) -> GPT:
        sizes: dict[str, Any] = {"width": config.width, "depth": config.depth, "heads": config.heads}
        return GPT(dataset.classes, context=config.context, **sizes, rngs=rngs)

    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.epochs * config.steps))
    bp = Task(
        make=make,
        rule=jaxfa.backprop(),
        optimizer=optimizer,
        data=dataset,
        batch=config.batch,
        steps=config.steps,
        inputs=lambda tokens: tokens,
    )
    yield Arm("bp", "Backpropagation", None, bp)
    yield Arm("svd_bp", "SVD, backpropagation", None, ssa_arms.on_manifold(bp))
    yield Arm("dfa", "DFA", None, bp._replace(rule=jaxfa.dfa(), at=TAPS))
    for name, (title, rule) in (ssa_arms.readings(0.0) | ssa_arms.readings(config.beta)).items():
        yield Arm(name, title, None, bp._replace(rule=rule, allow=TAPS))


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(epochs=5, batch=16, test_images=256, learning_rate=3e-3)},
    Page("Can a transformer learn in SVD space?", metric="perplexity"),
    arms,
)
