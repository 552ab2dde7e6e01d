"""A pretrained transformer is fine-tuned through LoRA, by feedback alignment, DFA and GrAPE beside backpropagation.

It learns to write as Shakespeare did, letter by letter and by backpropagation; then small adapters beside its frozen
layers learn the English of an encyclopedia. ``python -m experiments.examples.lora`` takes three minutes on a CPU,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The network, and for how long."""

    width: int = 64
    """How many features a token has."""
    depth: int = 2
    """How many blocks the network has."""
    context: int = 64
    """How many letters it sees."""
    rank: int = 4
    """The rank of every adapter."""
    batch: int = 32
    """How many windows a step has."""
    pretraining: int = 500
    """How many steps of backpropagation come first."""
    steps: int = 200
    """How many steps each rule has."""
    learning_rate: float = 3e-3
    """The learning rate of Adam in pretraining."""
    adapter_rate: float = 1e-3
    """The learning rate of Adam for the adapters."""
    seed: int = 0
    """Everything is drawn from it."""
    data: Path | None = None
    """The folder of the texts; None is the one that JAXFA_DATA names, else ./data."""
    out: Path = Path("experiments/examples/lora.json")
    """The file of the results."""


PRESETS = {"tiny": Config(width=8, depth=1, context=8, batch=4, pretraining=2, steps=2), "cpu": Config()}


def letters(config: Config) -> tuple[text.Corpus, text.Corpus]:
    """Shakespeare, and an encyclopedia in the letters that Shakespeare has."""
    play, words = text.read("shakespeare", config.data), text.read("wikitext2_small", config.data)

    def spelled(part: np.ndarray) -> np.ndarray:
        given = np.array(list(" ".join(words.vocabulary[part]).replace(text.UNKNOWN, "").replace(text.END, "\n")))
        given = given[np.isin(given, play.vocabulary)]
        return np.searchsorted(play.vocabulary, given).astype(play.train.dtype)

    return play, text.Corpus(spelled(words.train), spelled(words.test), play.vocabulary)


def windows(part: Any, rng: np.random.Generator, config: Config, count: int) -> tuple[jax.Array, jax.Array]:
    """Windows of a text that begin anywhere, and the same one letter later."""
    starts = rng.integers(len(part) - config.context, size=(count, 1))
    tokens = part[starts + np.arange(config.context + 1)].astype(np.int32)
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


def train(model: Any, optimizer: nnx.Optimizer, corpus: text.Corpus, steps: int, config: Config) -> list[float]:
    """Trains a model in place; its losses."""

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        if isinstance(model, jaxfa.nn.Attached):
            model.refine(key, x)
        loss = nnx.value_and_grad(lambda model: cross_entropy(model(x), y), argnums=nnx.DiffState(0, optimizer.wrt))
        value, gradients = loss(model)
        optimizer.update(model, gradients)
        return value

    rng, key = np.random.default_rng(config.seed), jax.random.key(config.seed)
    batches = (windows(corpus.train, rng, config, config.batch) for _ in range(steps))
    return [float(step(model, optimizer, jax.random.fold_in(key, i), *batch)) for i, batch in enumerate(batches)]


def run(config: Config) -> dict[str, Any]:
    """Trains and tests all; what is written."""
    play, encyclopedia = letters(config)
    size: dict[str, Any] = {"context": config.context, "width": config.width, "depth": config.depth, "heads": 2}
    model = GPT(len(play.vocabulary), rngs=nnx.Rngs(config.seed), **size)
    optimizer = nnx.Optimizer(model, optax.adam(config.learning_rate), wrt=nnx.Param)
    before = train(model, optimizer, play, config.pretraining, config)
    tests = {
        name: windows(corpus.test, np.random.default_rng(1), config, 256)
        for name, corpus in (("play", play), ("encyclopedia", encyclopedia))
    }

    @nnx.jit
    def perplexity(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.exp(cross_entropy(model(x), y))

    def row(model: Any) -> dict[str, float]:
        return {name: round(float(perplexity(model, *test)), 3) for name, test in tests.items()}

    found: dict[str, Any] = {"pretrained": row(model) | {"loss": round(before[-1], 3)}}
    for name, (rule, at) in RULES.items():
        adapted = with_adapters(model, config.rank, nnx.Rngs(config.seed + 1))
        example, rngs = tests["play"][0][: config.batch], nnx.Rngs(config.seed + 2)
        attached = jaxfa.nn.attach(adapted, rule, rngs=rngs, at=at, example=example)
        tx = jaxfa.optimizer(optax.adam(config.adapter_rate), rule)
        start = time.perf_counter()
        losses = train(attached, nnx.Optimizer(attached, tx, wrt=ADAPTERS), encyclopedia, config.steps, config)
        seconds = round(time.perf_counter() - start, 1)
        found[name] = row(attached) | {"loss": round(losses[-1], 3), "seconds": seconds}
    return found


def main(args: list[str]) -> None:
    """Runs it, prints the table and writes the file."""
    config = tyro.extras.overridable_config_cli({name: (name, config) for name, config in PRESETS.items()}, args=args)
    found = run(config)
    print(f"{'perplexity of letters':<24}{'Shakespeare':>12}{'encyclopedia':>14}{'seconds':>9}")
    for name, row in found.items():
        print(f"{name:<24}{row['play']:>12.2f}{row['encyclopedia']:>14.2f}{row.get('seconds', ''):>9}")
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("data", "out")}
    machine = records.environment() | {"command": f"python -m experiments.examples.lora {args[0]}"}
    records.write_json(config.out, {"config": options, "run": machine, "arms": found})


if __name__ == "__main__":
    main(sys.argv[1:])
