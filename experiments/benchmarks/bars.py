"""Rules as bars beside plain Flax's, one under the other."""

from matplotlib.axes import Axes

from experiments.benchmarks.workloads import PLAIN
from experiments.common import plots


def draw(axes: Axes, ratios: dict[str, dict[str, float]], title: str) -> None:
    """Draws multiples of plain Flax's.

    Args:
      axes: where to draw.
      ratios: of each name its ``ratio``, and the quartiles ``low`` and ``high`` if it was timed.
      title: what was counted.
    """
    for i, (name, one) in enumerate(ratios.items()):
        bars = [[max(one["ratio"] - one.get("low", one["ratio"]), 0)], [max(one.get("high", 0) - one["ratio"], 0)]]
        color = (
            plots.GREY if name == PLAIN else plots.ORANGE if name.startswith(("PyTorch", "BioTorch")) else plots.BLUE
        )
        axes.barh(-i, one["ratio"], 0.4, xerr=bars, color=color, error_kw={"linewidth": 0.8})
        axes.annotate(f"{name}: {one['ratio']:.2f}", (0, -i + 0.24), fontsize=6.6, va="bottom")
    axes.set_yticks([])
    axes.set_ylim(0.75 - len(ratios), 0.9)
    axes.axvline(1, color=plots.GREY, linewidth=0.9)
    axes.set_title(title)
