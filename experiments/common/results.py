"""Results as data: what was run, on what, and what came of every arm, in one JSON file to be committed.

``python -m experiments results`` makes of all such files the README of each paper's folder, the figures beside it, the
page of results and the numbers in the main README, where nobody types one.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import readme, records, rows, strips
from experiments.common.experiment import Experiment
from experiments.common.metrics import METRICS, Estimate
from experiments.common.rows import Row
from experiments.common.verdicts import full_title, glance, not_run, verdict

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
OLDER = "older measurement"
_HEAD = """# Results

What was run, by which command, with seeds, spread, versions and device. `make results` makes this page of the data in
`experiments/*/results/`. The order counts the pairs of arms that stand as published, in each table in turn.

| question | does the claim hold here? | order |
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
        "kind": "run",
        "name": name,
        "config": {key: value for key, value in config.items() if key != "experiment"},
        "seeds": list(range(config.get("seed", 0), config.get("seed", 0) + config.get("seeds", 1))),
        "runs": [_known(start) for start in starts],
        "metric": page["metric"],
        "published": page["published"],
        "diverged": rows.diverged(folder),
        "cut": rows.unfinished(folder),
    }
    if study.exists():
        shown = records.read_json(study)
        found |= {key: shown[key] for key in ("findings", "caption", "tables", "numbers")}
    else:
        read = rows.read(folder)
        found["findings"] = rows.findings(read, METRICS[page["metric"]])
        found["arms"] = {row.name: _arm(row, same=name == "paper", metric=page["metric"]) for row in read}
    path = FOLDER / experiment.paper / "results" / f"{experiment.module.rpartition('.')[2]}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(path, found)
    if study.exists():
        records.replace(path.with_suffix(".svg"), strips.standing(records.read_json(study)["figure"]))
    return path


def _arm(row: Row, *, same: bool, metric: str) -> dict[str, Any]:
    values = METRICS[metric].values(row.history)
    arm = {key: row.arm[key] for key in ("group", "x", "axis", "reference", "note")} | {"title": row.title}
    if row.arm["published"] is not None:
        set_up = "the paper's set-up" if same else "another set-up"
        arm["published"] = {"value": row.arm["published"], "from": row.arm["origin"], "ours": set_up}
    return arm | {
        "color": row.color,
        "last": _spread(row.last, values[-1]),
        "best": _spread(row.best, METRICS[metric].best(values[1:])),
        "epochs": row.history[-1]["epoch"],
        "seconds": round(sum(record["seconds"] for record in row.history), 1),
        "angle": None if row.angle is None or np.isnan(row.angle.mean) else _spread(row.angle),
        "layers": {layer: round(angle, 1) for layer, angle in row.layers.items() if not np.isnan(angle)},
        "step": row.step and {key: round(value, 3) for key, value in row.step.items()},
        "course": [_moment(record, found) for record, found in zip(row.history, values, strict=True)],
    }


def _moment(record: dict[str, Any], found: Any) -> list[float | None]:
    """The epoch, every seed's value, and the mean angle of all parts but the last."""
    hidden = np.array(list(record["angle"].values())[:-1], float)
    angle = round(float(np.nanmean(hidden)), 2) if np.isfinite(hidden).any() else None
    return [record["epoch"], *(round(float(value), 2) for value in found), angle]


def _spread(found: Estimate, values: Any = ()) -> dict[str, Any]:
    """The mean, the standard deviation where there are several seeds, and every seed's value."""
    std = None if found.std is None else round(found.std, 3)
    return {"mean": round(found.mean, 3), "std": std} | (
        {"seeds": [round(float(v), 3) for v in values]} if len(values) else {}
    )


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
    lines = [_HEAD]
    last = sorted(papers, key=lambda paper: paper == "benchmarks")
    for experiment in (one for paper in last for one in papers[paper] if one.verdict):
        lines.append(glance(experiment, (found for _, found in _results(experiment) if found["kind"] != OLDER)))
    for paper in last:
        include = f"{{include}} {os.path.relpath(FOLDER / paper / 'README.md', ROOT / 'docs')}"
        lines.append(f"\n```{include}\n:heading-offset: 1\n:relative-images:\n```")
    return "\n".join([*lines, ""])


def _results(experiment: Experiment) -> list[tuple[Path, dict[str, Any]]]:
    """An experiment's files and what they hold."""
    folder, stem = FOLDER / experiment.paper / "results", experiment.module.rpartition(".")[2]
    # A name may begin with another's: resnet20-cpu with none, so that the dash tells them apart.
    return [(path, records.read_json(path)) for path in sorted(folder.glob(f"{stem}-*.json"))]


def _title(paper: str) -> str:
    first = (FOLDER / paper / "__init__.py").read_text().split('"""')[1].strip().splitlines()[0]
    return (
        f"# {first.rstrip('.')}\n\nMade by `make results` from `results/*.json`, which hold every arm's course, seeds, "
        "versions and commit. Accuracies are of the last epoch on the test images.\n"
    )


def _section(experiment: Experiment, made: dict[Path, str]) -> str:
    first, claim, command, *_ = experiment.paragraphs()
    said = f"Verdict: {experiment.verdict}\n" if experiment.verdict else ""
    parts = [f"## {experiment.name}\n\n{first}\n\n{claim}\n\n{command}\n\n{said}".replace("``", "`")]
    every = _results(experiment)
    for path, found in every:
        if found["kind"] == OLDER:
            parts.append(_older(found))
            continue
        parts.append(_result(experiment, found, path.with_suffix(".svg")))
        if "arms" in found:
            made[path.with_suffix(".svg")] = strips.figure(found)
    if not every:
        parts.append("Not measured.\n")
    parts.append(not_run(experiment, (found["name"] for _, found in every if found["kind"] != OLDER)))
    return "\n".join(parts)


def _result(experiment: Experiment, found: dict[str, Any], figure: Path) -> str:
    lines = [f"### {experiment.page.title} ({found['name']})\n"]
    lines += [f"- **{number}** {sentence}" for number, sentence in found["findings"]]
    lines += ["", f"![{experiment.page.title}](results/{figure.name})", ""]
    lines += [_table(found)] if "arms" in found else [f"{_cells(table)}\n" for table in found["tables"]]
    lines += [
        "",
        *verdict(found, experiment.page.epoch),
        *(f"- {name} {note}" for name, note in found["diverged"].items()),
        *(f"- {sentence}" for sentence in found["cut"]),
    ]
    return "\n".join([*lines, "", _origin(found), ""])


def _older(found: dict[str, Any]) -> str:
    """A measurement that was typed before results were data."""
    lines = [f"### An older measurement (commit {found['commit']}, {found['date']})\n"]
    for note in found["notes"]:
        table = re.fullmatch(r"\[table (\d+)\]", note)
        lines += [_cells(found["tables"][int(table[1]) - 1]) if table else note.replace("``", "`"), ""]
    return "\n".join(lines)


def _table(found: dict[str, Any]) -> str:
    """Every arm's numbers."""
    metric = METRICS[found["metric"]]
    known = any("published" in arm for arm in found["arms"].values())
    head = ["", f"{metric.name},{metric.unit}" if metric.unit else metric.name, "angle to backpropagation", "step"]
    lines = [[*head, *(["best epoch", "published"] if known else [])]]
    for arm in found["arms"].values():
        angle = f"{arm['angle']['mean']:.0f}°" if arm["angle"] else ""
        cells = [full_title(arm), _shown(arm["last"], metric.digits), angle]
        cells.append(f"{arm['step']['ratio']:.2f} x" if arm["step"] else "")
        if known:
            published = f"{arm['published']['value']:.{metric.digits}f}" if "published" in arm else ""
            cells += [_shown(arm["best"], metric.digits), published]
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
    seconds = sum(arm["seconds"] for arm in found.get("arms", {}).values())
    took = f", {seconds:.0f} s of training" if seconds else ""
    seeds = f"seed {found['seeds'][0]}" if len(found["seeds"]) == 1 else f"{len(found['seeds'])} seeds"
    where = f"{first['device']}, {versions}, commit {commits}"
    return f"{commands}: {seeds}, {where}, {first['time'].split()[0]}{took}."


def _known(start: dict[str, Any]) -> dict[str, Any]:
    """An environment, whether the tree was clean, and the command without where its files went."""
    command = "python -m experiments " + re.sub(r" --(out|data) \S+", "", start["command"].partition(" ")[2])
    tree = "changed" if start["commit"].endswith("-dirty") else "clean"
    return start | {"tree": tree, "command": command}
