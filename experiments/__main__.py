"""The command line: ``python -m experiments list | run NAME [--preset NAME] [options] | report FOLDER | results``."""

import argparse
import sys
from pathlib import Path
from types import ModuleType

import tyro
from rich.console import Console

from experiments.benchmarks import memory, pipeline
from experiments.common import apart, records, report, results, sweep_report
from experiments.compare import compare, readme
from experiments.conservation import conservation
from experiments.grape import ablation as grape_ablation
from experiments.grape import deep as grape_deep
from experiments.grape import resnet20 as grape_resnet20
from experiments.grape import schedule as grape_schedule
from experiments.grape import shallow as grape_shallow
from experiments.grape import transformer as grape_transformer
from experiments.ldfa import cost as ldfa_cost
from experiments.ldfa import linear as ldfa_linear
from experiments.ldfa import rank_mlp as ldfa_rank_mlp
from experiments.ldfa import retina as ldfa_retina
from experiments.ldfa import subsets as ldfa_subsets
from experiments.ldfa import vgg as ldfa_vgg
from experiments.ldfa import vit as ldfa_vit
from experiments.rank_collapse import rank_collapse
from experiments.ssa import ablation as ssa_ablation
from experiments.ssa import alignment as ssa_alignment
from experiments.ssa import cifar10 as ssa_cifar10
from experiments.ssa import cost as ssa_cost

EXPERIMENTS = {
    "compare": compare,
    "conservation": conservation,
    "grape_ablation": grape_ablation,
    "grape_deep": grape_deep,
    "grape_resnet20": grape_resnet20,
    "grape_schedule": grape_schedule,
    "grape_shallow": grape_shallow,
    "grape_transformer": grape_transformer,
    "ldfa_cost": ldfa_cost,
    "ldfa_linear": ldfa_linear,
    "ldfa_rank_mlp": ldfa_rank_mlp,
    "ldfa_retina": ldfa_retina,
    "ldfa_subsets": ldfa_subsets,
    "ldfa_vgg": ldfa_vgg,
    "ldfa_vit": ldfa_vit,
    "memory": memory,
    "pipeline": pipeline,
    "rank_collapse": rank_collapse,
    "ssa_ablation": ssa_ablation,
    "ssa_cifar10": ssa_cifar10,
    "ssa_alignment": ssa_alignment,
    "ssa_cost": ssa_cost,
}
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
            for name, experiment in EXPERIMENTS.items():
                print(f"{name:<18} {(experiment.__doc__ or '').splitlines()[0]}")
        case ["run", name, *options] if name in EXPERIMENTS:
            _run(name, options)
        case ["run", *names]:
            given = f"Unknown experiment {names[0]!r}" if names else "No experiment given"
            raise ValueError(f"{given}; choose one of {', '.join(EXPERIMENTS)}.")
        case ["results"]:
            records.replace(results.PAGE, results.page())
            readme.write([records.read_json(path) for path in results.FOLDER.glob("*/results/*.json")])
            print(f"Results: {results.PAGE}")
        case ["report", *options]:
            tyro.cli(_report, args=options, prog="python -m experiments report")
        case ["-h" | "--help"]:
            print((__doc__ or "").replace("``", ""))
        case _:
            given = f"Unknown command {args[0]!r}" if args else "No command given"
            raise ValueError(f"{given}; choose one of {', '.join(_COMMANDS)}.")


def _run(name: str, options: list[str]) -> None:
    experiment = EXPERIMENTS[name]
    parser = argparse.ArgumentParser(prog=f"python -m experiments run {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=experiment.PRESETS, default="cpu")
    chosen, rest = parser.parse_known_args(options)
    default = experiment.PRESETS[chosen.preset]
    config = tyro.cli(experiment.Config, default=default, args=rest, prog=parser.prog, description=_about(experiment))
    unread = config.unread() if hasattr(config, "unread") else ()
    idle = [field for field in unread if getattr(config, field) != getattr(default, field)]
    if idle:
        names = ", ".join(f"--{field.replace('_', '-')}" for field in idle)
        raise ValueError(f"No arm of this run reads {names}: leave it out, or choose an arm that does.")
    if getattr(config, "apart", False):
        apart.share_device()
    print(f"Report: {experiment.run(config).resolve()}")
    diverged = records.diverged(config.out)
    if diverged:
        raise FloatingPointError(
            f"Some trainings diverged, and are not in the report's figures: {', '.join(diverged)}."
        )


def _about(experiment: ModuleType) -> str:
    """What the help says before the options: the docstring's first line and its claim, and what the presets are."""
    first, claim, *_ = (experiment.__doc__ or "").replace("``", "").split("\n\n")
    presets = f"--preset {{{','.join(experiment.PRESETS)}}} sets the defaults below; without it they are those of cpu."
    return "\n\n".join((first, " ".join(claim.split()), presets))


def _report(folder: tyro.conf.Positional[Path] = Path("runs/compare"), save: str | None = None) -> None:
    """Writes report.html from the runs in a folder, and prints where it lies.

    Args:
      folder: The folder that a run filled.
      save: PAPER/NAME, under which a sweep's results are kept as data: experiments/PAPER/results/NAME.json.
    """
    if save:
        print(f"Results: {results.write(folder, save).resolve()}")
    page = sweep_report if (folder / "sweep.json").exists() else report
    print(f"Report: {page.write(folder).resolve()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
