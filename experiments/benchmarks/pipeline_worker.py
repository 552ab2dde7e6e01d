"""Processes of ``pipeline``, each with as many CPU devices and cores as its task says.

``python -m experiments.benchmarks.pipeline_worker TASK`` with a task as JSON: counts what one step sends and keeps, or
compiles one step and then runs a round of steps for each line that it reads.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

_DEVICES = "--xla_force_host_platform_device_count={}"
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def count(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Compiles every pipeline for every ``(S, M)`` in a process of its own; yields what each sends and keeps."""
    devices = max(stages for stages, _ in task["points"])
    with _started({"name": "count"} | task, devices) as process:
        for line in process.stdout or ():
            yield json.loads(line)
    if process.returncode:
        raise ValueError(f"Counting stopped with status {process.returncode}: what it wrote stands above.")


@contextlib.contextmanager
def timed(task: dict[str, Any], devices: int) -> Iterator[Any]:
    """A process that holds one compiled step, alone on as many cores as devices.

    Yields:
      A function without arguments that runs a round of steps and returns ``(seconds, CPU seconds)`` of a step.
    """
    with _started({"name": "time", "cores": devices} | task, devices) as process:
        assert process.stdin
        assert process.stdout

        def run() -> tuple[float, float]:
            assert process.stdin
            assert process.stdout
            process.stdin.write("go\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise ValueError(f"The process that times {task['arm']!r} stopped: what it wrote stands above.")
            seconds, cpu = json.loads(answer)
            return seconds, cpu

        yield run
        process.stdin.close()


@contextlib.contextmanager
def _started(task: dict[str, Any], devices: int) -> Iterator[subprocess.Popen[str]]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES.format(devices)} {_ONE_THREAD}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.benchmarks.pipeline_worker", json.dumps(task)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def _count(task: dict[str, Any]) -> None:
    import jax  # noqa: PLC0415 - after the number of devices is set

    from experiments.benchmarks import collectives, pipeline_steps  # noqa: PLC0415
    from jaxfa import stacks  # noqa: PLC0415

    network = pipeline_steps.Network(**task["network"])
    shapes = jax.eval_shape(lambda: pipeline_steps.arguments(network))
    for stages, microbatches in task["points"]:
        mesh = stacks.mesh(layer=stages)
        where = jax.tree.broadcast(pipeline_steps.shardings(mesh), shapes)
        placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)
        for arm, loss in pipeline_steps.arms(mesh, microbatches).items():
            compiled = pipeline_steps.step_of(loss).lower(*placed).compile()
            kept = compiled.memory_analysis().temp_size_in_bytes
            sent = collectives.sent(compiled.as_text(), stages)
            found = {"arm": arm, "stages": stages, "microbatches": microbatches, "sent": sent, "kept": kept}
            print(json.dumps(found), flush=True)


def _time(task: dict[str, Any]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["cores"]])
    import jax  # noqa: PLC0415

    from experiments.benchmarks import pipeline_steps  # noqa: PLC0415
    from jaxfa import stacks  # noqa: PLC0415

    params, *rest = pipeline_steps.arguments(pipeline_steps.Network(**task["network"]))
    loss = pipeline_steps.BASES.get(task["arm"])
    if task["cores"] > 1:
        mesh = stacks.mesh(layer=task["cores"])
        loss = pipeline_steps.arms(mesh, task["microbatches"])[task["arm"]]
        params, *rest = jax.device_put((params, *rest), pipeline_steps.shardings(mesh))
    assert loss
    step = pipeline_steps.step_of(loss)
    params = jax.block_until_ready(step(params, *rest))
    for _ in sys.stdin:
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(task["steps"]):
            params = step(params, *rest)
        jax.block_until_ready(params)
        spent = time.perf_counter() - started, time.process_time() - cpu
        print(json.dumps([one / task["steps"] for one in spent]), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    {"count": _count, "time": _time}[given["name"]](given)
