"""Charts as inline SVG: colours come from the page's CSS classes, figures also as hover titles."""

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence


def escape(value: object) -> str:
    """Write a value as text that is safe inside HTML."""
    return html.escape(str(value), quote=True)


def number(value: float, *, digits: int = 4) -> str:
    """Write a number in `digits` significant digits, integers in full with thousands marked."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: `kind` names its CSS class, `note` is written after the value."""

    label: str
    value: float
    kind: str
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of (x, y) points; `kind` names its CSS class."""

    label: str
    points: Sequence[tuple[float, float]]
    kind: str
    dots: bool = False


def horizontal_bars(bars: Sequence[Bar], *, title: str) -> str:
    """Draw labelled bars from zero, one a row."""
    row, left, width = 34, 190, 960
    longest = max((bar.value for bar in bars), default=0) or 1
    parts = []
    for i, bar in enumerate(bars):
        y, length = i * row, max(2.0, bar.value / longest * (width - left - 190))
        value = f'{number(bar.value)} <tspan class="soft" dx="6">{escape(bar.note)}</tspan>'
        parts.append(
            f"<g><title>{escape(bar.label)}: {number(bar.value)} {escape(bar.note)}</title>"
            f'<text x="{left - 12}" y="{y + 21}" text-anchor="end">{escape(bar.label)}</text>'
            f'<rect class="{bar.kind}" x="{left}" y="{y + 5}" width="{length:.1f}" height="{row - 11}" rx="3"/>'
            f'<text x="{left + length + 10:.1f}" y="{y + 21}">{value}</text></g>'
        )
    return _svg(parts, width=width, height=max(row * len(bars), 1), title=title)


def grouped_columns(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], *, kinds: Sequence[str], title: str
) -> str:
    """Draw one column a series in each group, beside each other."""
    width, height, left, bottom = 960, 260, 64, 34
    axis = _Axis.over([value for values in series.values() for value in values], from_zero=True)
    parts = _grid(axis, left=left, width=width, top=8, bottom=height - bottom)
    step = (width - left) / max(len(groups), 1)
    column = min(26.0, step * 0.8 / len(series))
    for i, group in enumerate(groups):
        middle = left + step * (i + 0.5)
        for j, (label, values) in enumerate(series.items()):
            share = axis.place(values[i])
            top = 8 + (1 - share) * (height - bottom - 8)
            x = middle + (j - len(series) / 2) * column
            parts.append(
                f'<rect class="{kinds[j]}" x="{x + 1:.1f}" y="{top:.1f}" width="{column - 2:.1f}" '
                f'height="{max(height - bottom - top, 0.5):.1f}" rx="2"><title>{escape(group)}, {escape(label)}: '
                f"{number(values[i])}</title></rect>"
            )
        parts.append(
            f'<text class="soft" x="{middle:.1f}" y="{height - 12}" text-anchor="middle">{escape(group)}</text>'
        )
    return _svg(parts, width=width, height=height, title=title)


def lines(series: Sequence[Line], *, title: str, height: int = 260, x_label: str = "step") -> str:
    """Draw lines over a common x; y is logarithmic where it spans more than a factor of 20."""
    width, left, bottom, top = 960, 64, 34, 10
    xs = [x for line in series for x, _ in line.points]
    axis = _Axis.over([y for line in series for _, y in line.points])
    low, high = min(xs, default=0), max(xs, default=1)
    parts = _grid(axis, left=left, width=width, top=top, bottom=height - bottom)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - low) / (high - low) if high > low else 0.5
        return left + 6 + across * (width - left - 18), top + (1 - axis.place(y)) * (height - bottom - top)

    for x in _ticks(low, high, count=7) if high > low else [low]:
        across = at(x, axis.low)[0]
        parts.append(_soft_text(number(x), x=across, y=height - 12))
    for line in series:
        points = [at(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        if len(points) > 1:
            parts.append(f'<polyline class="line {line.kind}" points="{path}"/>')
        for (px, py), (x, y) in zip(points, line.points, strict=True):
            radius = 4 if line.dots or len(points) == 1 else 2.5
            visible = "" if line.dots or len(points) == 1 else " ghost"
            hover = f"{line.label}, {x_label} {number(x)}: {number(y)}"
            parts.append(
                f'<circle class="{line.kind}{visible}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}">'
                f"<title>{escape(hover)}</title></circle>"
            )
    return _svg(parts, width=width, height=height, title=title)


def heat_map(
    rows: Sequence[str],
    values: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    hovers: Sequence[Sequence[str]],
    *,
    title: str,
) -> str:
    """Draw a grid of cells, a row for each name; colour follows the square root of the share of the largest value."""
    cell, left, header = 29, 86, 24
    columns = max((len(row) for row in values), default=0)
    largest = max((value for row in values for value in row), default=0) or 1
    parts = [_soft_text(str(j), x=left + (j + 0.5) * cell, y=15) for j in range(columns)]
    for i, name in enumerate(rows):
        y = header + i * cell
        parts.append(f'<text x="{left - 10}" y="{y + 20}" text-anchor="end">{escape(name)}</text>')
        for j, value in enumerate(values[i]):
            strength = math.sqrt(max(value, 0) / largest)
            x = left + j * cell
            contrast = "dark-cell" if strength > 0.55 else "light-cell"
            place = f'x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" rx="3"'
            parts.append(
                f'<g><title>{escape(hovers[i][j])}</title><rect class="back" {place}/>'
                f'<rect class="heat" fill-opacity="{strength:.3f}" {place}/>'
                f'<text class="{contrast}" x="{x + cell / 2}" y="{y + 20}" text-anchor="middle">'
                f"{escape(texts[i][j])}</text></g>"
            )
    width, height = left + columns * cell + 4, header + len(rows) * cell + 4
    return _svg(parts, width=width, height=height, title=title, fixed=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Axis:
    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], *, from_zero: bool = False) -> "_Axis":
        low, high = min(values, default=0.0), max(values, default=1.0)
        if not from_zero and low > 0 and high / low > 20:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            ticks = tuple(t for p in powers for t in (10.0**p, 3 * 10.0**p) if low * 0.9 <= t <= high * 1.1)
            return cls(low=low * 0.9, high=high * 1.1, log=True, ticks=ticks)
        if from_zero:
            low = min(low, 0.0)
        if high <= low:
            high = low + (abs(low) or 1.0)
        margin = 0.0 if from_zero else (high - low) * 0.06
        low, high = low - margin, high + (high - low) * 0.06
        return cls(low=low, high=high, log=False, ticks=tuple(_ticks(low, high, count=5)))

    def place(self, value: float) -> float:
        """Give where a value is, from 0 (low) to 1 (high)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _ticks(low: float, high: float, *, count: int) -> Iterable[float]:
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * m for m in (1, 2, 5, 10, 20) if (high - low) / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(math.floor(high / step + 1e-9) - first + 1)]


def _grid(axis: _Axis, *, left: float, width: float, top: float, bottom: float) -> list[str]:
    parts = []
    for tick in axis.ticks:
        y = top + (1 - axis.place(tick)) * (bottom - top)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="soft" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    return parts


def _soft_text(text: str, *, x: float, y: float) -> str:
    return f'<text class="soft" x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>'


def _svg(parts: Sequence[str], *, width: float, height: float, title: str, fixed: bool = False) -> str:
    size = f' width="{width}" height="{height}"' if fixed else ""
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {width} {height}"{size} role="img" aria-label="{escape(title)}">\n{body}\n</svg>'
