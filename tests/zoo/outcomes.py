"""What works with what: the data, and the page of the documentation that is made of it."""

import json
import pathlib

from tests.zoo import FAMILIES, MODELS
from tests.zoo.cell import COLUMNS

WORKS = "works"
DATA = pathlib.Path(__file__).with_name("outcomes.json")
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# What works with what

Small models in the architectures and idioms that people use (`tests/zoo`), none of which knows jaxfa,
each with rules of every kind. "yes" means: the forward pass is the plain model's, bit for bit (to rounding with
`ssa`, whose layers are factors, and where blocks stream, since the compiler fuses other operations there), what it
writes into its state, too; every parameter that backpropagation teaches learns; the gradients are those of the same
model as a plain Python loop, where there is one and nothing is drawn; the table of `coverage()` is true; a training
step works. Local losses, `local_classifier`, `predsim` and `auglocal`, learn from the cross-entropy of labels, which
tells them their targets, all others from squares. A number is a refusal in words, below, with the reason and the way
round. Tests hold every cell of this page, which `python -m tests.zoo` writes.
"""

Outcomes = dict[str, dict[str, str]]


def read() -> Outcomes:
    """The outcome of every cell, by model and column."""
    return json.loads(DATA.read_text()) if DATA.exists() else {}


def write(found: Outcomes) -> None:
    """Writes data and page."""
    DATA.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(found))


def page(found: Outcomes) -> str:
    """The page of the documentation."""
    notes: dict[str, list[str]] = {}
    for name, row in found.items():
        for column, outcome in row.items():
            if outcome != WORKS:
                notes.setdefault(outcome, []).append(f"{name}: `{column}`")
    numbers = {outcome: i for i, outcome in enumerate(notes, 1)}
    parts = [HEAD, *(table(family, found, numbers) for family in FAMILIES), "## Refusals\n"]
    total = {column: sum(row[column] == WORKS for row in found.values()) for column in COLUMNS}
    parts.insert(1, ", ".join(f"`{column}` {count} of {len(found)}" for column, count in total.items()) + ".\n")
    return "\n".join([*parts, *(note(numbers[outcome], cells, outcome) for outcome, cells in notes.items())]) + "\n"


def table(family: object, found: Outcomes, numbers: dict[str, int]) -> str:
    """The rows of one family."""
    title = (family.__doc__ or "").strip().rstrip(".")
    taps = {name: ", ".join(f"`{glob}`" for glob in MODELS[name].at) for name in found}
    head = ["model", *(f"`{column}`" for column in COLUMNS), "where `at=` taps"]
    rows = [
        [name, *("yes" if one == WORKS else str(numbers[one]) for one in found[name].values()), taps[name]]
        for name in (model.name for model in family.MODELS)
        if name in found
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([f"## {title}\n", *("| " + " | ".join(line) + " |" for line in lines), ""])


def note(number: int, cells: list[str], words: str) -> str:
    """A refusal, and where it comes."""
    return f"{number}. ({'; '.join(cells)}) {words}"
