"""Figures of their own, as in a paper: one look, saved as SVG, as PNG, and in a page with its table."""

import contextlib
import html
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from experiments.common import records

# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
GREY, INK = "#9aa0a6", "#3c4043"

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxfa",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": "#c8ccd1",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#eceff1",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:{ink}}}
table{{border-collapse:collapse}}td,th{{padding:.2em .9em;text-align:right;border-bottom:1px solid #eceff1}}
td:first-child,th:first-child{{text-align:left}}svg{{width:100%;height:auto}}</style>
<h1>{title}</h1>{figure}<p>{caption}</p><table>{rows}</table></html>
"""


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of every figure made inside the ``with`` statement."""
    with mpl.rc_context(_STYLE):
        yield


def lines(axes: Axes, x: Any, values: np.ndarray, color: str, label: str) -> None:
    """A thin line per seed, ``values`` being ``(seeds, points)``, and a thick one at their mean."""
    axes.plot(x, values.T, color=color, linewidth=0.6, alpha=0.45)
    axes.plot(x, values.mean(0), color=color, linewidth=1.8, label=label)


def estimate(values: np.ndarray, digits: int = 2) -> str:
    """A mean and its standard deviation, as tables show them."""
    values = np.asarray(values)
    spread = f" ± {values.std(ddof=1):.{digits}f}" if values.size > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def refuse_nothing(folder: Path, histories: Sized) -> None:
    """Raises a ``FloatingPointError`` if trainings diverged and nothing is left to draw."""
    if not histories:
        raise FloatingPointError(
            f"Nothing in {folder} is left to draw: {'; '.join(map(' '.join, records.diverged(folder).items()))}."
        )


def write(folder: Path, figure: Figure, *, title: str, caption: str, table: Sequence[Sequence[str]]) -> Path:
    """Saves ``figure.svg``, ``figure.png`` and ``report.html``, which holds the figure and the table; prints the table.

    Args:
      folder: where to, a run's.
      figure: the figure, made inside :func:`style`.
      title: the page's.
      caption: what the figure shows.
      table: rows of cells, the first of them the header; trainings that diverged get another one each.

    Returns:
      The path of the page.
    """
    with style():
        figure.savefig(folder / "figure.svg", metadata={"Date": None})
        figure.savefig(folder / "figure.png", dpi=160)
    drawing = (folder / "figure.svg").read_text()
    table = [*table, *map(list, records.diverged(folder).items())]
    shown = Table(*(Column(head, overflow="fold") for head in table[0]))
    for row in table[1:]:
        shown.add_row(*row)
    Console().print(shown)
    head, *body = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table)
    rows = "".join(f"<tr>{row}</tr>" for row in [head.replace("td>", "th>"), *body])
    page = _PAGE.format(
        title=html.escape(title),
        ink=INK,
        figure=drawing[drawing.index("<svg") :],
        caption=html.escape(caption),
        rows=rows,
    )
    records.replace(folder / "report.html", page)
    return folder / "report.html"
