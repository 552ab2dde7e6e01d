"""A pretrained transformer is fine-tuned through LoRA, by feedback alignment, DFA and GrAPE beside backpropagation.

It learns to write as Shakespeare did, letter by letter and by backpropagation; then small adapters beside its frozen
layers learn the English of an encyclopedia. ``python -m experiments.examples.lora`` takes some minutes on a CPU,
prints a table and writes it to ``lora.json``.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.common import records, text
from experiments.common.task import cross_entropy
from experiments.models.gpt import GPT

ADAPTERS = nnx.Any(nnx.LoRAParam, jaxfa.nn.Feedback)
TAPS = ("embedding", "blocks/*")
RULES = {
    "backpropagation": (jaxfa.backprop(), None),
    "fa": (jaxfa.fa(), None),
    "sign symmetric": (jaxfa.usf(), None),
    "dfa": (jaxfa.dfa(), TAPS),
    "grape": (jaxfa.grape(), TAPS),
}


WIDTH, DEPTH, CONTEXT, RANK, BATCH = 64, 2, 64, 4, 32
RATE, ADAPTER_RATE = 3e-3, 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """For how long, and where the files are."""

    pretraining: int = 500
    """How many steps of backpropagation come first."""
    steps: int = 200
    """How many steps each rule has."""
    data: Path | None = None
    """The folder of the texts; None is the one that JAXFA_DATA names, else ./data."""
    out: Path = Path("experiments/examples/lora.json")
    """The file of the results."""


def letters(folder: Path | None) -> tuple[text.Corpus, text.Corpus]:
    """Shakespeare, and an encyclopedia in the letters that Shakespeare has."""
    play, words = text.read("shakespeare", folder), text.read("wikitext2_small", folder)

    def spelled(part: np.ndarray) -> np.ndarray:
        given = np.array(list(" ".join(words.vocabulary[part]).replace(text.UNKNOWN, "").replace(text.END, "\n")))
        given = given[np.isin(given, play.vocabulary)]
        return np.searchsorted(play.vocabulary, given).astype(play.train.dtype)

    return play, text.Corpus(spelled(words.train), spelled(words.test), play.vocabulary)


def windows(part: Any, rng: np.random.Generator, count: int) -> tuple[jax.Array, jax.Array]:
    """Windows of a text that begin anywhere, and the same one letter later."""
    starts = rng.integers(len(part) - CONTEXT, size=(count, 1))
    tokens = part[starts + np.arange(CONTEXT + 1)].astype(np.int32)
    return jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])


def with_adapters(model: GPT, rank: int, rngs: nnx.Rngs) -> GPT:
    """The model with an adapter beside both layers of every block; at first they add nothing."""
    model = nnx.clone(model)
    for block in model.blocks:
        for name in ("fc1", "fc2"):
            layer = getattr(block, name)
            adapted = nnx.LoRA(layer.in_features, rank, layer.out_features, base_module=layer, rngs=rngs)
            setattr(block, name, adapted)
    return model


def train(model: Any, optimizer: nnx.Optimizer, corpus: text.Corpus, steps: int) -> list[float]:
    """Trains a model in place; its losses."""

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        if isinstance(model, jaxfa.nn.Attached):
            model.refine(key, x)
        loss = nnx.value_and_grad(lambda model: cross_entropy(model(x), y), argnums=nnx.DiffState(0, optimizer.wrt))
        value, gradients = loss(model)
        optimizer.update(model, gradients)
        return value

    rng, key = np.random.default_rng(0), jax.random.key(0)
    batches = (windows(corpus.train, rng, BATCH) for _ in range(steps))
    return [float(step(model, optimizer, jax.random.fold_in(key, i), *batch)) for i, batch in enumerate(batches)]


def run(config: Config) -> dict[str, Any]:
    """Trains and tests all; what is written."""
    play, encyclopedia = letters(config.data)
    size: dict[str, Any] = {"context": CONTEXT, "width": WIDTH, "depth": DEPTH, "heads": 2}
    model = GPT(len(play.vocabulary), rngs=nnx.Rngs(0), **size)
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)
    before = train(model, optimizer, play, config.pretraining)
    tests = {
        name: windows(corpus.test, np.random.default_rng(1), 256)
        for name, corpus in (("play", play), ("encyclopedia", encyclopedia))
    }

    @nnx.jit
    def perplexity(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.exp(cross_entropy(model(x), y))

    def row(model: Any) -> dict[str, float]:
        return {name: round(float(perplexity(model, *test)), 3) for name, test in tests.items()}

    found: dict[str, Any] = {"pretrained": row(model) | {"loss": round(before[-1], 3)}}
    for name, (rule, at) in RULES.items():
        adapted = with_adapters(model, RANK, nnx.Rngs(1))
        example, rngs = tests["play"][0][:BATCH], nnx.Rngs(2)
        attached = jaxfa.nn.attach(adapted, rule, rngs=rngs, at=at, example=example)
        tx = jaxfa.optimizer(optax.adam(ADAPTER_RATE), rule)
        start = time.perf_counter()
        losses = train(attached, nnx.Optimizer(attached, tx, wrt=ADAPTERS), encyclopedia, config.steps)
        seconds = round(time.perf_counter() - start, 1)
        found[name] = row(attached) | {"loss": round(losses[-1], 3), "seconds": seconds}
    return found


def main(args: list[str]) -> None:
    """Runs it, prints the table and writes the file."""
    config = tyro.cli(Config, args=args, prog="python -m experiments.examples.lora", description=__doc__)
    found = run(config)
    print(f"{'perplexity of letters':<24}{'Shakespeare':>12}{'encyclopedia':>14}{'seconds':>9}")
    for name, row in found.items():
        print(f"{name:<24}{row['play']:>12.2f}{row['encyclopedia']:>14.2f}{row.get('seconds', ''):>9}")
    options = {"pretraining": config.pretraining, "steps": config.steps}
    machine = records.environment() | {"command": "python -m experiments.examples.lora"}
    records.write_json(config.out, {"config": options, "run": machine, "arms": found})


if __name__ == "__main__":
    main(sys.argv[1:])
