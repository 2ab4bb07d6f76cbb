"""Plots as SVG text that stands in a page: no file beside it, colours from the page's light or dark theme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

# Each names a colour of page.css, and what it is where there is none.
INK, MUTED, GRID = "var(--ink,#333333)", "var(--muted,#767676)", "var(--grid,#e4e4e4)"
BLUE, ORANGE = "var(--blue,#2a6fb0)", "var(--orange,#d9822b)"
PAPER = "var(--paper,#ffffff)"
CLASSES = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f", "#edc948", "#76b7b2", "#ff9da7", "#8a8a8a"),
)


@dataclass(frozen=True)
class Dot:
    """A line of a dot plot.

    Attributes:
        name, value: what is written left and right of it.
        mean: the dot.
        bar: ends of its error bar, or None.
        seeds: small dots.
        before: where it started, a ring.
        best: whether to stress it.
    """

    name: str
    value: str
    mean: float
    bar: tuple[float, float] | None = None
    seeds: Sequence[float] = ()
    before: float | None = None
    best: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that cover ``low`` to ``high``."""
    span = max(high - low, 1e-9 * max(1.0, abs(low), abs(high)))
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if span / (step * power) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def dots(rows: Sequence[Dot], title: str, lines: dict[str, float], unit: str = "%", width: int = 760) -> str:
    """Methods as dots on one axis, with error bars, their random start and baselines as upright lines.

    Args:
        rows: from top to bottom.
        title: what a screen reader says.
        lines: name -> value of baselines.
        unit: of the axis.
        width: of the drawing; it scales with the page.
    """
    told = [end for row in rows for end in (row.mean, row.before, *(row.bar or ()), *row.seeds) if end is not None]
    marks = ticks(min([*told, *lines.values()]), max([*told, *lines.values()]))
    left = min(0.5 * width, 24 + 7.7 * max(len(row.name) for row in rows))
    right, top, pitch = width - 26 - 7.4 * max(len(row.value) for row in rows), 30, 26
    bottom = top + pitch * len(rows)

    def x(value: float) -> float:
        return left + (right - left) * (value - marks[0]) / (marks[-1] - marks[0] or 1)

    parts = []
    for mark in marks:
        parts.append(_line(x(mark), top, x(mark), bottom, GRID))
        said = f"{mark:g} {unit}".rstrip() if mark == marks[-1] else f"{mark:g}"
        parts.append(_text(x(mark), bottom + 17, said, "middle", MUTED, 11))
    ends: list[float] = []  # of the names above the plot, lest two of them overlap
    for name, value in sorted(lines.items(), key=lambda item: item[1]):
        half = 3.1 * len(name)
        level = 0 if not ends or x(value) - half > ends[-1] else 13
        ends.append(x(value) + half)
        parts.append(_line(x(value), top - 4, x(value), bottom, MUTED, dash="2 3"))
        parts.append(_text(x(value), top - 9 - level, name, "middle", MUTED, 11))
    for i, row in enumerate(rows):
        y = top + pitch * (i + 0.5)
        weight = ' font-weight="650"' if row.best else ""
        parts.append(_text(left - 12, y + 4.5, row.name, "end", INK, 13, weight))
        if row.before is not None:
            parts.append(_line(x(row.before), y, x(row.mean), y, GRID, 3))
            parts.append(_circle(x(row.before), y, 4, PAPER, ORANGE))
        if row.bar:
            low, high = (x(end) for end in row.bar)
            parts += [_line(low, y, high, y, BLUE, 1.6)] + [_line(e, y - 4, e, y + 4, BLUE, 1.6) for e in (low, high)]
        if len(row.seeds) > 1:
            parts += [_circle(x(seed), y, 2, BLUE, "none", 0.55) for seed in row.seeds]
        parts.append(_circle(x(row.mean), y, 5, BLUE, PAPER))
        parts.append(_text(width - 4, y + 4.5, row.value, "end", INK if row.best else MUTED, 12.5, weight))
    return _svg(width, bottom + 24, "".join(parts), title)


def panel(
    series: Sequence[Sequence[tuple[float, float]]],
    title: str,
    others: Sequence[Sequence[tuple[float, float]]] = (),
    lines: Sequence[tuple[float, str]] = (),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_name: str = "epoch",
    log: bool = False,
    colour: str = BLUE,
    width: int = 260,
    height: int = 140,
) -> str:
    """A small plot of one row's lines, over everybody else's in gray.

    Args:
        series: lines of ``(x, y)``.
        others: lines drawn behind.
        lines: baselines, ``(y, colour)``.
        x_range, y_range: of the axes, default: all that is drawn; what is beyond lies on the edge.
        log: a logarithmic y axis.
    """
    series, others = ([_finite(line, log) for line in group] for group in (series, others))
    drawn = [point for line in (*series, *others) for point in line]
    left, right, top, bottom = 38, width - 6, 22, height - 20
    if not drawn:
        empty = _text((left + right) / 2, (top + bottom) / 2, "nothing was logged", "middle", MUTED, 11)
        return _svg(width, height, _text(4, 13, title, "start", INK, 12) + empty, title)
    x0, x1 = x_range or (min(p[0] for p in drawn), max(p[0] for p in drawn))
    ends = y_range or _span([p[1] for p in drawn] + [y for y, _ in lines], log)
    if log:
        marks = [10.0**e for e in range(math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1])) + 1)]
    else:
        marks = ticks(*ends, count=3)
    low, high = (math.log10(marks[0]), math.log10(marks[-1])) if log else (marks[0], marks[-1])

    def path(line: Sequence[tuple[float, float]], colour: str, thickness: float, opacity: float = 1.0) -> str:
        d = "M" + "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py in line)
        if len(line) == 1:
            d += "h0"
        return (
            f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="{thickness}" stroke-linejoin="round"'
            f' stroke-linecap="round" opacity="{opacity}"/>'
        )

    def x(value: float) -> float:
        return left + (right - left) * (value - x0) / (x1 - x0 or 1)

    def y(value: float) -> float:
        place = ((math.log10(value) if log else value) - low) / (high - low or 1)
        return bottom - (bottom - top) * min(max(place, 0.0), 1.0)

    parts = [_text(4, 13, title, "start", INK, 12)]
    for mark in marks:
        parts.append(_line(left, y(mark), right, y(mark), GRID))
        said = f"{mark:g}" if mark >= 0.01 or not log else f"1e{round(math.log10(mark))}"
        parts.append(_text(left - 5, y(mark) + 3.5, said, "end", MUTED, 10))
    parts.append(_text(left, bottom + 13, f"{x0:g}", "start", MUTED, 10))
    parts.append(_text(right, bottom + 13, f"{x_name} {x1:g}", "end", MUTED, 10))
    parts += [path(line, MUTED, 0.8, 0.35) for line in others if line]
    parts += [_line(left, y(value), right, y(value), stroke, 1, "3 3") for value, stroke in lines]
    parts += [path(line, colour, 1.7) for line in series if line]
    return _svg(width, height, "".join(parts), title)


def scatter(points: np.ndarray, labels: np.ndarray, title: str, size: int = 300) -> str:
    """Points in the plane ``(n, 2)``, coloured by label ``(n,)``; gray where it is -1."""
    low, high = points.min(0), points.max(0)
    span = float((high - low).max()) or 1.0
    places = 6 + (size - 12) * ((points - (low + high) / 2) / span + 0.5)
    parts = []
    for label in np.unique(labels):
        d = "".join(f"M{px:.1f} {py:.1f}h0" for px, py in places[labels == label])
        stroke = CLASSES[label % len(CLASSES)] if label >= 0 else MUTED
        parts.append(f'<path d="{d}" stroke="{stroke}" stroke-width="4.2" stroke-linecap="round" opacity="0.75"/>')
    return _svg(size, size, "".join(parts), title)


def _finite(line: Sequence[tuple[float, float]], log: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]


def _span(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low / 2, high * 2) if log else (low - 0.5, high + 0.5)


def _svg(width: float, height: float, inside: str, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img"'
        f' aria-label="{escape(title)}" font-family="inherit">{inside}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str, fill: str, size: float, more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size:g}"{more}>'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{stroke}" stroke-width="{width:g}"{dashes}/>'


def _circle(x: float, y: float, r: float, fill: str, stroke: str, opacity: float = 1.0) -> str:
    faint = f' opacity="{opacity:g}"' if opacity < 1 else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" fill="{fill}" stroke="{stroke}" stroke-width="1.6"{faint}/>'
