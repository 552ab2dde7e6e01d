"""The picture of the comparison, as SVG: every rule's accuracy and its angle to the true gradient, by family."""

from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from experiments.common.methods import DIRECT, EXACT, LAYERWISE, METHODS

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLORS = {EXACT: "#4d5156", LAYERWISE: "#0072b2", DIRECT: "#d55e00"}
INK = "#202124"
_WIDTH, _ROW, _TOP, _LABELS, _PANEL = 680, 25, 58, 150, 190
_ACCURACY, _ANGLE = _LABELS + 16, _LABELS + 286


class Axis(NamedTuple):
    """A horizontal axis.

    Attributes:
      left: where it begins, in pixels.
      low: its least value.
      high: its greatest value.
      unit: what follows a number.
    """

    left: float
    low: float
    high: float
    unit: str

    def at(self, value: float) -> float:
        """The place of a value, in pixels."""
        return round(self.left + _PANEL * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low), 1)


def draw(found: dict[str, Any]) -> str:
    """Draws a comparison.

    Args:
      found: the result of ``compare``.

    Returns:
      A whole SVG document, with a background of its own, so that it is legible on a dark page.
    """
    arms = {name: arm for name, arm in found["arms"].items() if "last" in arm}
    groups = {family: [name for name in arms if METHODS[name].family == family] for family in COLORS}
    lowest = min(arm["last"]["mean"] - (arm["last"]["std"] or 0) for arm in arms.values())
    accuracy = Axis(_ACCURACY, max(0.0, 10 * (lowest // 10)), 100.0, "%")
    angle = Axis(_ANGLE, 0.0, max(90.0, *(arm["angle"] for arm in arms.values())), "°")
    bottom = _TOP + _ROW * (len(arms) + 0.6 * len(groups))
    parts = [*_axis(accuracy, "test accuracy", bottom), *_axis(angle, "angle to the true gradient", bottom)]
    y = float(_TOP)
    for family, names in groups.items():
        y += 0.6 * _ROW
        for name in sorted(names, key=lambda name: arms[name]["angle"]):
            parts += _row(METHODS[name].title, arms[name], (accuracy, angle), y + _ROW / 2, COLORS[family])
            y += _ROW
    for i, (family, color) in enumerate(COLORS.items()):
        parts.append(f'<circle cx="{16 + 150 * i}" cy="18" r="5" fill="{color}"/>' + _text(26 + 150 * i, 22, family))
    parts.append(_text(_LABELS, bottom + 44, _caption(found["config"]), color="#5f6368"))
    return _document(parts, bottom + 60)


def _caption(config: dict[str, Any]) -> str:
    network = f"{config['dataset']}, {config['model']}, {config['epochs']} epochs"
    return f"{network}. Dots are means of {config['seeds']} seeds, lines standard deviations."


def _row(title: str, arm: dict[str, Any], axes: tuple[Axis, Axis], y: float, color: str) -> list[str]:
    accuracy, angle = axes
    mean, std = arm["last"]["mean"], arm["last"]["std"] or 0.0
    whisker = f'<path d="M{accuracy.at(mean - std)} {y}H{accuracy.at(mean + std)}" stroke="{color}" stroke-width="2"/>'
    dots = [f'<circle cx="{axis.at(value)}" cy="{y}" r="5" fill="{color}"/>' for axis, value in
            ((accuracy, mean), (angle, arm["angle"]))]  # fmt: skip
    numbers = [_text(_ACCURACY + _PANEL + 50, y + 4, f"{mean:.1f}", "end", color=color),
               _text(_ANGLE + _PANEL + 40, y + 4, f"{arm['angle']:.0f}°", "end", color=color)]  # fmt: skip
    return [_text(_LABELS, y + 4, title, "end"), whisker, *dots, *numbers]


def _axis(axis: Axis, title: str, bottom: float) -> list[str]:
    ticks = [axis.low + (axis.high - axis.low) * part for part in (0, 0.5, 1)]
    lines = [f'<path d="M{axis.at(tick)} {_TOP}V{bottom}" stroke="#dadce0"/>' for tick in ticks]
    labels = [_text(axis.at(tick), bottom + 18, f"{tick:.0f}{axis.unit}", "middle", color="#5f6368") for tick in ticks]
    return [*lines, *labels, _text(axis.left, _TOP - 8, title, more='font-weight="600"')]


def _text(x: float, y: float, text: str, anchor: str = "start", *, color: str = INK, more: str = "") -> str:
    return f'<text x="{x}" y="{y:g}" text-anchor="{anchor}" fill="{color}" {more}>{escape(text)}</text>'


def _document(parts: list[str], height: float) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}" font-size="13"'
    fonts = "font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\""
    body = "\n".join([f'<rect width="{_WIDTH}" height="{height:g}" rx="8" fill="#ffffff"/>', *parts])
    return f"{head} {fonts}>\n{body}\n</svg>\n"
