"""What ``pipeline`` runs in processes of its own, each with as many CPU devices and cores as it is given."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import Any

import jax

from experiments.benchmarks import collectives, pipeline_steps
from experiments.benchmarks.pipeline_steps import Network
from jaxfa import stacks

_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@contextlib.contextmanager
def process(work: Callable[..., None], *args: Any, devices: int, cores: int | None = None) -> Iterator[Any]:
    """A process that runs ``work(connection, *args)`` on so many devices; yields the other end of the connection."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_begin, args=(work, theirs, args, devices, cores), daemon=True)
    child.start()
    theirs.close()
    with ours:
        yield ours
    child.join()


def _begin(work: Callable[..., None], connection: Any, args: Any, devices: int, cores: int | None) -> None:
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_ONE_THREAD}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    work(connection, *args)


def count(connection: Any, network: Network, points: list[tuple[int, int]]) -> None:
    """Compiles every pipeline for every ``(S, M)``; sends what each sends and keeps."""
    shapes = jax.eval_shape(lambda: pipeline_steps.arguments(network))
    for stages, microbatches in points:
        mesh = stacks.mesh(layer=stages)
        where = jax.tree.broadcast(pipeline_steps.shardings(mesh), shapes)
        placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)
        for arm, loss in pipeline_steps.arms(mesh, microbatches).items():
            compiled = pipeline_steps.step_of(loss).lower(*placed).compile()
            kept = compiled.memory_analysis().temp_size_in_bytes
            sent = collectives.sent(compiled.as_text(), stages)
            connection.send({"arm": arm, "stages": stages, "microbatches": microbatches, "sent": sent, "kept": kept})


def rounds(connection: Any, network: Network, arm: str, microbatches: int, steps: int) -> None:
    """Compiles one step for all devices; for each message runs a round of steps and sends the seconds of one."""
    params, *rest = pipeline_steps.arguments(network)
    loss = pipeline_steps.BASES[arm]
    if jax.device_count() > 1:
        mesh = stacks.mesh(layer=jax.device_count())
        loss = pipeline_steps.arms(mesh, microbatches)[arm]
        params, *rest = jax.device_put((params, *rest), pipeline_steps.shardings(mesh))
    step = pipeline_steps.step_of(loss)
    with contextlib.suppress(EOFError):  # the other end has closed
        while connection.recv():
            started = time.perf_counter()
            for _ in range(steps):
                params = step(params, *rest)
            jax.block_until_ready(params)
            connection.send((time.perf_counter() - started) / steps)
