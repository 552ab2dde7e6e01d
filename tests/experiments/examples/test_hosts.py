"""Several processes: they learn what one learns, their checkpoints fit other meshes, and a death loses no bit."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import chex
import jax
import pytest

from experiments.common import checkpoint
from experiments.examples import hosts, hosts_worker
from jaxfa.stacks import parallel

STEPS, EVERY, HEARTBEAT, BOUND = 24, 4, 10, 120
ROOT = Path(__file__).parents[3]


def errors_of(out, number):
    return out.with_name(f"{out.name}-{number}.txt")


def start(out, devices, layer, *options, number=0):
    """A process of its own group: it and what it starts die together, as on a host that fails."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    same = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [
        sys.executable,
        "-m",
        "experiments.examples.hosts",
        "--out",
        str(out),
        "--layer",
        str(layer),
        "--every",
        str(EVERY),
    ]
    with errors_of(out, number).open("w") as errors:
        return subprocess.Popen(
            [*command, "--steps", str(STEPS), *options], env=os.environ | same | {"XLA_FLAGS": flags}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def running(processes):
    """Ends all, whatever happens, and if it takes too long."""
    alarms = [threading.Timer(BOUND, kill, [process]) for process in processes]
    try:
        for alarm in alarms:
            alarm.start()
        yield processes
    finally:
        for process, alarm in zip(processes, alarms, strict=True):
            alarm.cancel()
            kill(process)
            process.wait()
            process.stdout.close()


def pair(out, layer):
    """Two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    options = "--coordinator", where, "--processes", "2", "--heartbeat", str(HEARTBEAT)
    return running([start(out, 2, layer, *options, "--process", str(number), number=number) for number in range(2)])


def said(process):
    return (json.loads(line) for line in process.stdout if line.startswith("{"))


def finished(processes):
    """What the first says, by step, once all have ended well."""
    records = {record["step"]: record for record in said(processes[0])}
    assert [process.wait(BOUND) for process in processes] == [0] * len(processes)
    return records


def restored(out, data, layer, **options):
    config, mesh = hosts.Config(out=out, layer=layer, **options), parallel.mesh(data=data, layer=layer)
    with checkpoint.checkpoints(out) as manager:
        step, state = checkpoint.restore_placed(manager, hosts_worker.abstract(config, mesh))
    assert step == STEPS
    return state, hosts_worker.fingerprint(state, mesh)


def check_death(out, layer, victim):
    """Kills one in mid-run; the other ends by itself, and says what to do."""
    with pair(out, layer) as processes:
        survivor = processes[1 - victim]
        assert any(record["step"] == EVERY for record in said(processes[0]))
        kill(processes[victim])
        died = time.monotonic()
        assert survivor.wait(BOUND) == 1
        assert time.monotonic() - died < HEARTBEAT + 20
    message = errors_of(out, 1 - victim).read_text()
    assert f"Process {1 - victim} of 2 stopped" in message
    assert "another process died" in message
    assert "start every process again with the same command to go on from there" in message
    assert f"python -m experiments.examples.hosts --out {out}" in message


@pytest.mark.long
# Between the processes go the sums over the batch, or the pipeline's messages; process 0 is the others' coordinator.
@pytest.mark.parametrize(("layer", "victim"), [(2, 1), (4, 0)])
def test_two_processes_learn_what_one_does_and_go_on_after_a_death(layer, victim, tmp_path, x64):
    with running([start(tmp_path / "one", 4, layer)]) as processes:
        alone = finished(processes)
    with pair(tmp_path / "two", layer) as processes:
        whole = finished(processes)
    assert list(whole) == list(alone) == list(range(0, STEPS + 1, EVERY))
    assert len({record["sha256"] for record in whole.values()}) == len(whole)
    assert whole[0]["sha256"] == alone[0]["sha256"]

    # Both on meshes that neither was written from; the second over more devices than wrote it.
    state, bits = restored(tmp_path / "two", 2, 4)
    chex.assert_trees_all_close(state, restored(tmp_path / "one", 8, 1)[0], rtol=1e-12, atol=1e-12)
    assert bits == whole[STEPS]["sha256"]
    (params, _) = state["learned"]
    assert {shard.data.shape[0] for shard in params["stack"].addressable_shards} == {8 // 4}
    with pytest.raises(ValueError, match=r"not of this run: .* is float64\[64, 10\], expected float64\[32, 10\]"):
        restored(tmp_path / "two", 2, 4, width=32)

    check_death(tmp_path / "killed", layer, victim)
    with pair(tmp_path / "killed", layer) as processes:
        resumed = finished(processes)
    first = min(resumed)
    assert 0 < first < STEPS
    assert resumed.pop(first) == whole[first] | {"loss": None}
    assert resumed == {step: record for step, record in whole.items() if step > first}


def test_wrong_use_is_refused(capfd):
    with pytest.raises(SystemExit, match="2"):
        hosts.main(["--processes", "2"])
    assert "need --coordinator HOST:PORT" in capfd.readouterr().err
    with pytest.raises(ValueError, match="not both"):
        hosts.Config(cluster=True, coordinator="here:1")
    with pytest.raises(ValueError, match="below --processes"):
        hosts.Config(coordinator="here:1", processes=2, process=2)
    with pytest.raises(ValueError, match="8 devices cannot be divided into --layer 3 stages"):
        hosts_worker.mesh_of(hosts.Config(layer=3))
    assert jax.process_count() == 1
