"""Several processes, one training: layers over the devices of all hosts, checkpoints that every process writes.

Alone, with all devices of one machine: ``python -m experiments.examples.hosts --layer 2``. As process I of N, each of
which sees devices of its own: the same with ``--coordinator HOST:PORT --processes N --process I``, where process 0 is
on ``HOST``; with ``--cluster`` where SLURM, Open MPI or a TPU pod says so itself. ``--out`` is a folder that all
processes see.

A residual network learns digits by direct feedback alignment on a mesh of ``data x layer`` devices. Process 0 prints a
line of JSON at every checkpoint: the batch's loss, and a hash of all parameters. The same command resumes, on the same
devices bit for bit; on others the state is restored as it was, and goes on to the rounding of another order of sums.

This file holds no JAX: it watches the process that does (``hosts_worker``). When one process dies, JAX
ends the others, by an exception out of a collective or, at the latest after ``--heartbeat`` seconds, by ``abort``; what
happened, and how to go on, is said here. If the watching process dies, the other ends with it.
"""

import dataclasses
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import tyro

REFUSED = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and where.

    Attributes:
      out: The folder of the checkpoints, the same for all processes.
      steps: How many steps there are in all.
      every: How many steps lie between two checkpoints.
      fresh: The checkpoints in the folder are deleted first.
      layer: How many stages the pipeline has; the devices divided by it are the parts of a batch.
      layers: How many layers the stack has.
      width: How many units a layer has.
      batch: How many examples a batch has.
      microbatches: How many microbatches a batch goes through the pipeline in.
      learning_rate: The learning rate of SGD with momentum 0.9.
      seed: The seed of the weights, the feedback and the order of the examples.
      coordinator: The address of process 0, HOST:PORT.
      processes: How many processes there are.
      process: The number of this process, from 0.
      cluster: JAX asks the cluster for --coordinator, --processes and --process.
      heartbeat: After so many seconds without a sign of life a process counts as dead.
    """

    out: Path = Path("runs/hosts")
    steps: int = 200
    every: int = 50
    fresh: bool = False
    layer: int = 1
    layers: int = 8
    width: int = 64
    batch: int = 64
    microbatches: int = 2
    learning_rate: float = 0.05
    seed: int = 0
    coordinator: str | None = None
    processes: int = 1
    process: int = 0
    cluster: bool = False
    heartbeat: int = 60

    def __post_init__(self) -> None:
        if self.processes > 1 and not self.coordinator:
            raise ValueError(f"{self.processes} processes need --coordinator HOST:PORT, the address of process 0.")
        if self.cluster and self.coordinator:
            raise ValueError("Give --cluster, or --coordinator with --processes and --process; not both.")
        if min(self.steps, self.every, self.layer) < 1 or not 0 <= self.process < self.processes:
            raise ValueError(
                f"--steps, --every and --layer are from 1, --process is from 0 and below --processes; got {self}."
            )


def main(args: list[str]) -> int:
    """Runs the worker with the same arguments until it ends, and says why if it failed.

    Args:
      args: the command line, without the program's name.

    Returns:
      The exit status: 0, 1 if the run stopped, or 2 if the command was refused.
    """
    config = tyro.cli(Config, args=args, prog="python -m experiments.examples.hosts", description=__doc__)
    # The worker's end of this pipe closes when this process ends, however it does.
    command = [sys.executable, "-m", "experiments.examples.hosts_worker", *args]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as worker:
        try:
            status = worker.wait()
        except KeyboardInterrupt:
            worker.kill()
            raise
    if status in (0, REFUSED):
        return status
    print(_why(config, args, status), file=sys.stderr, flush=True)
    return 1


def _why(config: Config, args: list[str], status: int) -> str:
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    which = "A process of the cluster" if config.cluster else f"Process {config.process} of {config.processes}"
    alone = config.processes == 1 and not config.cluster
    folder = config.out / "checkpoints"
    complete = [int(one.name) for one in folder.glob("*") if one.name.isdigit()]
    again = shlex.join(one for one in args if one != "--fresh")
    found = f"The last checkpoint in {folder} is of step {max(complete)}" if complete else f"{folder} has no checkpoint"
    return (
        f"Error: {which} stopped {how}; what it wrote stands above."
        f"{'' if alone else ' It may be that another process died: none can go on without all others.'} "
        f"{found}: start {'it' if alone else 'every process'} again with the same command to go on from there, here: "
        f"python -m experiments.examples.hosts {again}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
