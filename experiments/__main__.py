"""The command line: ``python -m experiments list | run NAME [--preset NAME] [options] | report FOLDER | results``.

``run all [--preset NAME]`` runs every experiment that has the preset, one after the other, and keeps the results.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import tyro
from rich.console import Console

from experiments.common import apart, page, records, results, rows, sweep
from experiments.common.experiment import Experiment, identity
from experiments.common.programs import keep_memory

# Every experiment, the names of its file and of its folder: a new one is one more.
_FILES = {
    "compare": ("compare", "lenet"),
    "conservation": ("aligned_start", "angle_against_depth", "conservation"),
    "grape": ("bound", "deep", "first_layer", "gates", "resnet20", "shallow", "transformer"),
    "ldfa": ("autoencoder", "cnn", "cost", "linear", "rank_mlp", "representations", "retina", "rnn", "vgg", "vit"),
    "benchmarks": ("growth", "memory", "pipeline", "starts", "steps"),
    "rank_collapse": ("rank_collapse",),
    "ssa": ("ablation", "networks", "transformer"),
}
_MODULES = [import_module(f"experiments.{folder}.{file}") for folder, files in _FILES.items() for file in files]
EXPERIMENTS: dict[str, Experiment] = {module.EXPERIMENT.name: module.EXPERIMENT for module in _MODULES}
_COMMANDS = ("list", "run", "report", "results")


def main(args: list[str]) -> int:
    """Runs one command.

    Args:
      args: the command line, without the program's name.

    Returns:
      The exit status: 0; 1 if a training diverged; 2 if the command was refused.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        _dispatch(args)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        console.print("Error:", style="bold red", end=" ")
        console.print(str(error), markup=False)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


def _dispatch(args: list[str]) -> None:
    match args:
        case ["list"]:
            width = max(map(len, EXPERIMENTS))
            for name, experiment in EXPERIMENTS.items():
                print(f"{name:<{width}} {experiment.paragraphs()[0]}")
        case ["run", name, *options] if name in EXPERIMENTS:
            _run(EXPERIMENTS[name], options)
        case ["run", "all", *options]:
            run_all(options)
        case ["run", *names]:
            given = f"Unknown experiment {names[0]!r}" if names else "No experiment given"
            raise ValueError(f"{given}; choose all, or one of {', '.join(EXPERIMENTS)}.")
        case ["results"]:
            for path, text in results.pages(EXPERIMENTS.values()).items():
                records.replace(path, text)
                print(f"Results: {path}")
        case ["report", *options]:
            tyro.cli(_report, args=options, prog="python -m experiments report")
        case ["-h" | "--help"]:
            print((__doc__ or "").replace("``", ""))
        case _:
            given = f"Unknown command {args[0]!r}" if args else "No command given"
            raise ValueError(f"{given}; choose one of {', '.join(_COMMANDS)}.")


def _run(experiment: Experiment, options: list[str]) -> None:
    prog = f"python -m experiments run {experiment.name}"
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=experiment.presets, default="cpu")
    chosen, rest = parser.parse_known_args(options)
    default = experiment.preset(chosen.preset)
    config = tyro.cli(type(default), default=default, args=rest, prog=prog, description=_about(experiment))
    idle = [field for field in config.unread() if getattr(config, field) != getattr(default, field)]
    if idle:
        names = ", ".join(f"--{field.replace('_', '-')}" for field in idle)
        raise ValueError(f"No arm of this run reads {names}: leave it out, or choose an arm that does.")
    if getattr(config, "apart", False):
        apart.share_device()
    print(f"Report: {sweep.run(experiment, config).resolve()}")
    diverged = records.diverged(config.out)
    if diverged:
        raise FloatingPointError(
            f"Some trainings diverged, and are not in the report's figures: {', '.join(diverged)}."
        )


def _apart(name: str, preset: str) -> int:
    return subprocess.run([*apart.COMMAND, "run", name, "--preset", preset], check=False).returncode


def run_all(options: list[str], run: Callable[[str, str], int] = _apart) -> None:
    """Runs every experiment that has a preset, each in a process of its own; those that are done are left out.

    Args:
      options: the command line after ``run all``.
      run: what runs an experiment, by its name and preset, and returns the exit status.

    Raises:
      ValueError: if no experiment has the preset.
      FloatingPointError: if an experiment failed or was cut; the same command goes on with it.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments run all", allow_abbrev=False)
    parser.add_argument("--preset", default="cpu", help="the preset to run of every experiment that has it")
    preset = parser.parse_args(options).preset
    chosen = [experiment for experiment in EXPERIMENTS.values() if preset in experiment.presets]
    if not chosen:
        raise ValueError(f"No experiment has the preset {preset!r}; cpu is every one's.")
    left = []
    for experiment in chosen:
        folder = experiment.preset(preset).out
        status = 0 if _is_done(experiment, preset) else run(experiment.name, preset)
        if _is_done(experiment, preset):
            print(f"Results: {results.write(folder, EXPERIMENTS, preset)}")
        else:
            left.append(f"{experiment.name} (exit status {status})")
    if left:
        raise FloatingPointError(f"Not done: {', '.join(left)}. The same command goes on with them.")


def _is_done(experiment: Experiment, preset: str) -> bool:
    """Whether a run of this preset, as it is today, came to its report, with nothing cut."""
    folder, known = experiment.preset(preset).out, identity(experiment.name, experiment.presets[preset])
    done = (folder / "report.html").exists() and records.read_json(folder / "config.json") == known
    return done and not rows.unfinished(folder)


def _about(experiment: Experiment) -> str:
    """What the help says before the options: the docstring's first line and its claim, and what the presets are."""
    first, claim, *_ = experiment.paragraphs()
    presets = f"--preset {{{','.join(experiment.presets)}}} sets the defaults below; without it they are those of cpu."
    return "\n\n".join((first, claim, presets)).replace("``", "")


def _report(folder: tyro.conf.Positional[Path], save: str | None = None) -> None:
    """Writes report.html from the runs in a folder, and prints where it lies.

    Args:
      folder: The folder that a run filled.
      save: The name, such as cpu, under which the results are kept: experiments/PAPER/results/EXPERIMENT-NAME.json.
    """
    print(f"Report: {page.write(folder).resolve()}")
    if save:
        print(f"Results: {results.write(folder, EXPERIMENTS, save).resolve()}")


if __name__ == "__main__":
    keep_memory()
    sys.exit(main(sys.argv[1:]))
