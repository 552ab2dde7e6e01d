"""Results as data: what was run, on what, and what came of every arm, in one JSON file to be committed.

``python -m experiments results`` makes of all such files the README of each paper's folder, the figures beside it, the
page of results and the numbers in the main README, where nobody types one.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common import readme, records, rows, strips
from experiments.common.experiment import Experiment
from experiments.common.findings import findings, full_title
from experiments.common.metrics import METRICS, Estimate
from experiments.common.published import as_published, changed
from experiments.common.spent import together, took
from experiments.common.verdicts import glance, not_run, verdict

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
_HEAD = """# Results

What was run, by which command, with seeds, spread, versions and device. `make results` makes this page of the data in
`experiments/*/results/`. The order counts the pairs of arms that stand as published, beyond their error, in each table
in turn. Another set-up than the published one has fewer or other images, a smaller network or few epochs: numbers do
not compare then, an order may. Read as plain Markdown, this page is the table alone; the rest is in the READMEs of the
folders of `experiments/`.
"""
_QUESTIONS = """| question | does the claim hold here? | order |
| --- | --- | --- |"""
# The results that the main README shows beside the rules.
COLUMNS = {
    "400 digits, MLP": "compare/results/compare-cpu.json",
    "ResNet-20, CIFAR-100": "grape/results/resnet20-gpu15.json",
}


def write(folder: Path, experiments: Mapping[str, Experiment], name: str) -> Path:
    """Writes ``experiments/PAPER/results/EXPERIMENT-NAME.json`` from what a run's folder holds.

    Args:
      folder: what an experiment filled.
      experiments: every experiment by its name.
      name: what the run is called, such as its preset.

    Returns:
      The path of the file.
    """
    config, starts = records.read_json(folder / "config.json"), records.read_json(folder / "environment.json")
    experiment = experiments[config["experiment"]]
    page, study = records.read_json(folder / "sweep.json"), folder / "study.json"
    found: dict[str, Any] = {
        "experiment": experiment.name,
        "name": name,
        "config": {key: value for key, value in config.items() if key != "experiment"},
        "seeds": list(range(config.get("seed", 0), config.get("seed", 0) + config.get("seeds", 1))),
        "runs": [_known(start) for start in starts],
        "metric": page["metric"],
        "published": page["published"],
        "as_published": as_published(experiment, config),
        "diverged": rows.diverged(folder),
        "cut": rows.unfinished(folder),
    }
    if page["arms"]:
        # What came of arms is told when pages are made of them, so that it is never older than what tells it.
        found["arms"] = {row.name: rows.told(row, METRICS[page["metric"]]) for row in rows.read(folder, stated=True)}
    if study.exists():
        shown = records.read_json(study)
        found |= {key: shown[key] for key in ("findings", "caption", "tables", "numbers")}
    path = FOLDER / experiment.paper / "results" / f"{experiment.module.rpartition('.')[2]}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(path, found)
    if study.exists():
        records.replace(path.with_suffix(".svg"), strips.standing(records.read_json(study)["figure"]))
    return path


def pages(experiments: Iterable[Experiment]) -> dict[Path, str]:
    """Everything that is made of results: the text of each file by its path."""
    made: dict[Path, str] = {}
    papers: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        papers.setdefault(experiment.paper, []).append(experiment)
    for paper, members in papers.items():
        sections = [_section(experiment, made) for experiment in members]
        made[FOLDER / paper / "README.md"] = "\n".join([_title(paper), *sections])
    columns = {one: records.read_json(FOLDER / path) for one, path in COLUMNS.items() if (FOLDER / path).exists()}
    made[ROOT / "docs" / "results.md"] = _all(papers)
    made[ROOT / "README.md"] = readme.fill((ROOT / "README.md").read_text(), columns)
    return made


def _all(papers: Mapping[str, Sequence[Experiment]]) -> str:
    """The page of all results: every question with its answer, then the papers' own pages, the benchmarks' last."""
    every = [found for members in papers.values() for one in members for _, found in _results(one)]
    lines = [_HEAD, f"{together(every)}\n", _QUESTIONS]
    last = sorted(papers, key=lambda paper: paper == "benchmarks")
    for experiment in (one for paper in last for one in papers[paper] if one.verdict):
        lines.append(glance(experiment, (found for _, found in _results(experiment))))
    for paper in last:
        include = f"{{include}} {os.path.relpath(FOLDER / paper / 'README.md', ROOT / 'docs')}"
        lines.append(f"\n```{include}\n:heading-offset: 1\n:relative-images:\n```")
    return "\n".join([*lines, ""])


def _results(experiment: Experiment) -> list[tuple[Path, dict[str, Any]]]:
    """An experiment's files and what they hold."""
    folder, stem = FOLDER / experiment.paper / "results", experiment.module.rpartition(".")[2]
    # A name may begin with another's: resnet20-cpu with none, so that the dash tells them apart.
    return [(path, records.read_json(path)) for path in sorted(folder.glob(f"{stem}-*.json"))]


def _fair(experiment: Experiment, found: dict[str, Any]) -> dict[str, Any]:
    """What a file holds, without published numbers where its set-up is smaller: they stand apart from ours there."""
    if "arms" not in found or as_published(experiment, found["config"]):
        return found
    arms = {name: {key: arm[key] for key in arm if key != "published"} for name, arm in found["arms"].items()}
    return found | {"arms": arms}


def _title(paper: str) -> str:
    first = (FOLDER / paper / "__init__.py").read_text().split('"""')[1].strip().splitlines()[0]
    return (
        f"# {first.rstrip('.')}\n\nMade by `make results` from `results/*.json`, which hold seeds, versions, commit "
        "and every arm's course; those of studies hold their tables, too. Accuracies are of the last epoch on the "
        "test images.\n"
    )


def _section(experiment: Experiment, made: dict[Path, str]) -> str:
    first, claim, command, *_ = experiment.paragraphs()
    said = f"Verdict: {experiment.verdict}\n" if experiment.verdict else ""
    parts = [f"## {experiment.name}\n\n{first}\n\n{claim}\n\n{command}\n\n{said}".replace("``", "`")]
    every = _results(experiment)
    for path, found in every:
        parts.append(_result(experiment, found, path.with_suffix(".svg")))
        if found.get("arms") and "tables" not in found:
            made[path.with_suffix(".svg")] = strips.figure(_fair(experiment, found))
    if not every:
        parts.append("Not measured.\n")
    parts.append(not_run(experiment, (found["name"] for _, found in every)))
    return "\n".join(parts)


def _result(experiment: Experiment, found: dict[str, Any], figure: Path) -> str:
    fair = _fair(experiment, found)
    lines = [f"### {experiment.page.title} ({found['name']})", ""]
    told = _findings(experiment, fair)
    lines += [*(f"- **{number}** {sentence}" for number, sentence in told), *([""] if told else [])]
    lines += [f"![{experiment.page.title}](results/{figure.name})", ""]
    best = experiment.page.epoch == "best"
    lines += [f"{_cells(table)}\n" for table in found["tables"]] if "tables" in found else [_table(fair, best=best)]
    lines += [
        "",
        *verdict(experiment, found),
        *(f"- {name} {note}" for name, note in found["diverged"].items()),
        *(f"- {sentence}" for sentence in found["cut"]),
    ]
    return "\n".join(
        [*lines, "", f"{_origin(found)} {changed(experiment, found['name'], found['config'])}".rstrip(), ""]
    )


def _findings(experiment: Experiment, found: dict[str, Any]) -> Sequence[Sequence[str]]:
    """What came of it: told of arms anew, of a study as it is stored."""
    if "tables" in found:
        return found["findings"]
    return findings(found["arms"], METRICS[found["metric"]], experiment.page.epoch)


def _table(found: dict[str, Any], *, best: bool = False) -> str:
    """Every arm's numbers, with those of its best epoch where it is asked for."""
    metric = METRICS[found["metric"]]
    known, taken = (any(key in arm for arm in found["arms"].values()) for key in ("published", "calibrations"))
    best = best or known
    head = ["", f"{metric.name},{metric.unit}" if metric.unit else metric.name, "angle to backpropagation", "step"]
    more = (("true gradients", taken), ("best epoch", best), ("published", known))
    lines = [[*head, *(title for title, there in more if there)]]
    for arm in found["arms"].values():
        angle = f"{arm['angle']['mean']:.0f}°" if arm["angle"] else ""
        cells = [full_title(arm), _shown(arm["last"], metric.digits), angle]
        cells.append(f"{arm['step']['ratio']:.2f} x" if arm["step"] else "")
        if taken:
            cells.append(f"{arm['calibrations']:g}" if "calibrations" in arm else "")
        if best:
            cells.append(_shown(arm["best"], metric.digits))
        if known:
            cells.append(f"{arm['published']['value']:.{metric.digits}f}" if "published" in arm else "")
        lines.append(cells)
    return _cells({"title": "", "rows": lines})


def _cells(table: dict[str, Any]) -> str:
    head, *body = table["rows"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    title = [f"{table['title']}:\n"] if table["title"] else []
    return "\n".join([*title, *("| " + " | ".join(line) + " |" for line in lines)])


def _shown(value: dict[str, Any], digits: int) -> str:
    return str(Estimate(value["mean"], value["std"], digits))


def _origin(found: dict[str, Any]) -> str:
    first = found["runs"][0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("jax", "flax", "optax"))
    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(one["command"] for one in found["runs"]))
    commits = " and ".join(dict.fromkeys(one["commit"] for one in found["runs"]))
    seeds = f"seed {found['seeds'][0]}" if len(found["seeds"]) == 1 else f"{len(found['seeds'])} seeds"
    cores = f"{first['cores']} core{'s' if first['cores'] > 1 else ''} of {first['processor']}"
    device = cores if first["backend"] == "cpu" else first["device"]
    where = f"{device}, {versions}, commit {commits}"
    return f"{commands}: {seeds}, {where}, {first['time'].split()[0]}{took(found)}."


def _known(start: dict[str, Any]) -> dict[str, Any]:
    """An environment, whether the tree was clean, and the command without where its files went."""
    command = "python -m experiments " + re.sub(r" --(out|data) \S+", "", start["command"].partition(" ")[2])
    tree = "changed" if start["commit"].endswith("-dirty") else "clean"
    return start | {"tree": tree, "command": command}
