"""The networks, rules and training steps that ``steps`` and ``starts`` time."""

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.common.programs import jit_step
from experiments.common.task import cross_entropy
from experiments.models.gpt import GPT
from experiments.models.networks import MLP, LeNet, ResNet
from experiments.models.vgg import VGG

CLASSES, VOCABULARY, CONTEXT = 10, 65, 64
PLAIN, EXACT = "plain Flax", "backpropagation"
BLOCKS = ("stem", "blocks/*")
Measured = dict[str, dict[str, Any]]


class Workload(NamedTuple):
    """A network and the shape of its inputs.

    Attributes:
      make: ``rngs -> module``.
      inputs: of one example; of tokens their number.
      batch: examples of a step.
      at: what direct rules tap.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    inputs: tuple[int, ...]
    batch: int
    at: tuple[str, ...] | None = None

    def data(self) -> tuple[jax.Array, jax.Array]:
        """Random inputs and labels of a step."""
        keys = jax.random.split(jax.random.key(0))
        shape = (self.batch, *self.inputs)
        if len(self.inputs) == 1:
            return jax.random.randint(keys[0], shape, 0, VOCABULARY), jax.random.randint(keys[1], shape, 0, VOCABULARY)
        return jax.random.normal(keys[0], shape), jax.random.randint(keys[1], (self.batch,), 0, CLASSES)


def _mlp(width: int, depth: int, batch: int) -> Workload:
    shape = (28, 28, 1)
    return Workload(lambda rngs: MLP(shape, CLASSES, (width,) * depth, rngs=rngs), shape, batch)


def _resnet(repeats: int, batch: int = 128, **sizes: Any) -> Workload:
    shape = (32, 32, 3)
    return Workload(lambda rngs: ResNet(shape, CLASSES, repeats=repeats, **sizes, rngs=rngs), shape, batch, BLOCKS)


def _vgg(widths: tuple[int, ...]) -> Workload:
    shape = (32, 32, 3)
    return Workload(lambda rngs: VGG(shape, CLASSES, widths=widths, rngs=rngs), shape, 128, ("blocks/*", "classifier"))


def _decoder(width: int, heads: int, context: int) -> Workload:
    sizes = {"context": context, "width": width, "depth": 12, "heads": heads}
    return Workload(lambda rngs: GPT(VOCABULARY, **sizes, rngs=rngs), (context,), 16, ("embedding", "blocks/*"))


WORKLOADS = {
    "mlp": _mlp(1024, 4, batch=256),
    "lenet": Workload(lambda rngs: LeNet((28, 28, 1), CLASSES, rngs=rngs), (28, 28, 1), batch=256),
    "resnet20": _resnet(3),
    "resnet56": _resnet(9),
    "decoder": _decoder(128, 4, CONTEXT),
    "vgg13": _vgg((64, 128, 256, 512, 512)),
    # What fills a large GPU.
    "mlp-4096": _mlp(4096, 8, batch=4096),
    "resnet20-256": _resnet(3, batch=256),
    "resnet18": _resnet(2, batch=256, widths=(64, 128, 256, 512)),
    "decoder-768": _decoder(768, 12, 256),
}


class Setting(NamedTuple):
    """A rule, None for plain Flax, and the schedule by which it runs."""

    rule: jaxfa.Rule | None
    schedule: jaxfa.stacks.Schedule = jaxfa.stacks.stored


RULES = {
    PLAIN: Setting(None),
    EXACT: Setting(jaxfa.backprop()),
    "FA": Setting(jaxfa.fa()),
    "Kolen-Pollack": Setting(jaxfa.kolen_pollack()),
    "LDFA, 3n/4": Setting(jaxfa.ldfa(0.75)),
    "LDFA, n/4": Setting(jaxfa.ldfa(0.25)),
    "LDFA, n/16": Setting(jaxfa.ldfa(0.0625)),
    "DFA": Setting(jaxfa.dfa()),
    "DFA, shared": Setting(jaxfa.dfa(shared=True)),
    "DFA, hashed": Setting(jaxfa.dfa(shared=True, buckets=256)),
    "DFA, streamed": Setting(jaxfa.dfa(), jaxfa.stacks.stream),
    "GrAPE": Setting(jaxfa.grape()),
    "GrAPE, Kalman": Setting(jaxfa.grape(averaging=jaxfa.rules.kalman())),
}


class Started(NamedTuple):
    """A compiled training step.

    Attributes:
      run: takes one step and returns its seconds.
      seconds: of ``attach``, ``trace`` and ``compile``.
      flops: operations of a step, by XLA's count.
      moved: bytes that a step reads and writes, by XLA's count.
      temporary: bytes that the program allocates beside inputs and outputs.
      given: bytes of its inputs.
    """

    run: Callable[[], float]
    seconds: dict[str, float]
    flops: float
    moved: float
    temporary: int
    given: int


def runs(workload: Workload, setting: Setting) -> bool:
    """Whether a network can have a rule: a stream needs blocks to run."""
    return setting.schedule == jaxfa.stacks.stored or workload.at is not None


def put(workload: Workload, setting: Setting, model: nnx.Module, example: jax.Array) -> nnx.Module:
    """A network with a rule on it, for such inputs; plain Flax's has none."""
    rule, schedule = setting
    if rule is None:
        return model
    # What makes factors of weights taps the layers that have them.
    at = workload.at if isinstance(rule, jaxfa.DirectRule) and rule.weights is None else None
    return jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), example=example, at=at, schedule=schedule)


def step_of(rule: jaxfa.Rule | None, model: nnx.Module) -> tuple[Callable[..., Any], Any]:
    """A training step ``(arrays, batch) -> arrays`` of a network with a rule on it, and its first arrays."""
    tx = optax.adam(1e-3)
    learned = nnx.Param if rule is None else (nnx.Param, jaxfa.nn.Feedback)
    optimizer = nnx.Optimizer(model, tx if rule is None else jaxfa.optimizer(tx, rule), wrt=learned)
    graph, arrays = nnx.split((model, optimizer))
    return partial(_step, graph, learned, rule is not None), arrays


def start(workload: Workload, setting: Setting) -> Started | None:
    """Makes a network and compiles one of its training steps; None where it can't have the rule."""
    return begin(workload, setting, workload.make(nnx.Rngs(0))) if runs(workload, setting) else None


def begin(workload: Workload, setting: Setting, model: nnx.Module) -> Started:
    """Puts the rule on a network and compiles one of its training steps, timed.

    Raises:
      ValueError: if the network can't have the rule.
    """
    batch = *workload.data(), jax.random.key(2)
    gc.collect()  # what is left of an earlier start
    clock = time.perf_counter()
    model = put(workload, setting, model, batch[0])
    seconds = {"attach": time.perf_counter() - clock}
    function, arrays = step_of(setting.rule, model)
    step = jit_step(function)
    clock = time.perf_counter()
    traced = step.trace(arrays, batch)
    seconds["trace"], clock = time.perf_counter() - clock, time.perf_counter()
    compiled = traced.lower().compile()
    seconds["compile"] = time.perf_counter() - clock
    state = [arrays]

    def run() -> float:
        started = time.perf_counter()
        state[0] = jax.block_until_ready(compiled(state[0], batch))
        return time.perf_counter() - started

    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    counted = cost.get("flops", 0.0), cost.get("bytes accessed", 0.0)
    return Started(run, seconds, *counted, memory.temp_size_in_bytes, memory.argument_size_in_bytes)


def _step(graph: Any, learned: Any, refines: bool, arrays: Any, batch: Any) -> Any:
    x, labels, key = batch
    model, optimizer = nnx.merge(graph, arrays, copy=True)
    model.train()
    if refines:
        model.refine(key, x)
    grads = nnx.grad(lambda model: cross_entropy(model(x), labels), argnums=nnx.DiffState(0, learned))(model)
    optimizer.update(model, grads)
    return nnx.state((model, optimizer))
