"""A result's figure: a row for every arm with its metric and its angle, as SVG of a few shapes, the same everywhere."""

from typing import Any
from xml.sax.saxutils import escape

from experiments.common.metrics import METRICS

_ROW, _TOP, _WIDTH, _GAP = 22, 46, 250, 90
_LETTER = 6.6  # a letter's width at this size, as browsers draw the widest of these fonts
_FONT = "font-family='system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif'"


def figure(found: dict[str, Any]) -> str:
    """The figure of a result.

    Args:
      found: a file of results, as :func:`experiments.common.results.write` made it.

    Returns:
      A file's text.
    """
    metric, arms = METRICS[found["metric"]], list(found["arms"].values())
    angles = [arm["angle"]["mean"] for arm in arms if arm["angle"]]
    ends = [arm[key]["mean"] for arm in arms for key in ("last", "best")]
    ends += [arm["published"]["value"] for arm in arms if "published" in arm]
    low, high = (0.0, 100.0) if metric.sign > 0 else (0.0, 1.1 * max(ends))
    if metric.sign > 0:
        low, high = max(0.0, 10 * (min(ends) // 10)), min(100.0, 10 * (max(ends) // 10 + 1))
    titles = [_title(arm) for arm in arms]
    left = round(24 + _LETTER * max(map(len, titles)))
    second = left + _WIDTH + _GAP
    shapes = [
        *_axis(left, (low, high), f"{metric.name}, last epoch", metric.unit, count=len(arms)),
        *(_axis(second, (0, 90), "angle to backpropagation", "°", count=len(arms)) if angles else []),
    ]
    for i, (arm, title) in enumerate(zip(arms, titles, strict=True)):
        y = _TOP + _ROW * i + _ROW / 2
        shapes.append(_text(left - 12, y + 4, title, anchor="end"))
        shapes += _mark(left, (low, high), y, arm["last"], color=arm["color"], form=f"{{:.{metric.digits}f}}")
        if "published" in arm:
            x = _place(left, (low, high), arm["published"]["value"])
            shapes.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='none' stroke='{arm['color']}'/>")
        if arm["angle"] and angles:
            shapes += _mark(second, (0.0, 90.0), y, arm["angle"], color=arm["color"], form="{:.0f}°")
    width, height = (second if angles else left) + _WIDTH + _GAP - 20, _TOP + _ROW * len(arms) + 12
    return "\n".join([
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' {_FONT} font-size='12'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        *shapes,
        "</svg>\n",
    ])  # fmt: skip


def _title(arm: dict[str, Any]) -> str:
    return arm["title"] if arm["note"] or arm["title"] == arm["group"] else f"{arm['group']}, {arm['title']}"


def standing(element: str) -> str:
    """An ``<svg>`` element of a page as a file of its own, on white."""
    return element.replace("<svg", "<svg xmlns='http://www.w3.org/2000/svg' style='background:white'", 1).replace(
        "<svg", "<svg xmlns:xlink='http://www.w3.org/1999/xlink'", 1
    )


def _place(left: float, scale: tuple[float, float], value: float) -> float:
    low, high = scale
    return left + _WIDTH * (min(max(value, low), high) - low) / (high - low)


def _axis(left: float, scale: tuple[float, float], title: str, unit: str, *, count: int) -> list[str]:
    (low, high), bottom = scale, _TOP + _ROW * count
    shapes = [_text(left, 16, title, weight="600")]
    for tick in (low, (low + high) / 2, high):
        x = _place(left, scale, tick)
        shapes.append(f"<path d='M{x:.1f} {_TOP - 6}V{bottom}' stroke='#e4e7ea'/>")
        shapes.append(_text(x, _TOP - 11, f"{tick:g}{unit}", anchor="middle", color="#5f6368"))
    return shapes


def _mark(
    left: float, scale: tuple[float, float], y: float, value: dict[str, Any], *, color: str, form: str
) -> list[str]:
    """A dot at the mean, a bar of one deviation either way, and the number."""
    spread = value["std"] or 0.0
    x, low, high = (_place(left, scale, value["mean"] + sign * spread) for sign in (0, -1, 1))
    return [
        f"<path d='M{low:.1f} {y:.1f}H{high:.1f}' stroke='{color}' stroke-width='3' opacity='.45'/>",
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='{color}'/>",
        _text(left + _WIDTH + 14, y + 4, form.format(value["mean"])),
    ]


def _text(x: float, y: float, text: str, *, anchor: str = "start", color: str = "#202124", weight: str = "400") -> str:
    style = f"text-anchor='{anchor}' fill='{color}' font-weight='{weight}'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{escape(text)}</text>"
