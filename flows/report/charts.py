"""Small inline SVG charts: no script, no font, no file of their own; colours are the page's CSS variables.

Every chart is one `<svg role="img">` with a label for who cannot see it; the same numbers stand in a table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tasks.metrics import number

WIDTH = 460
Series = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Mark:
    """One labelled point or bar; `strong` is the one to look at, `css` its colour's class."""

    label: str
    css: str
    strong: bool = False


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values that cover [low, high] from within."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= wanted)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with as many decimals as their distance asks for."""
    step = values[1] - values[0] if len(values) > 1 else values[0] if values else 1.0
    decimals = max(0, -math.floor(math.log10(abs(step) or 1.0) + 1e-9))
    return [(value, f"{value:,.{decimals}f}") for value in values]


def _svg(title: str, height: float, body: str) -> str:
    return (
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'preserveAspectRatio="xMinYMin meet"><title>{escape(title)}</title>{body}</svg>'
    )


def standalone(svg: str, css: str) -> str:
    """A chart as a file of its own: what shows it knows no style of ours and may be of any colour."""
    size = svg.partition('viewBox="0 0 ')[2].partition('"')[0].split()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * int(size[0])}" height="{2 * int(size[1])}"'
    paper = '<rect x="-999" y="-999" width="9999" height="9999" style="fill:var(--card);stroke:none"/>'
    return svg.replace("<svg", head, 1).replace("<title>", f"<style>{css}</style>{paper}<title>", 1)


def _text(x: float, y: float, text: str, anchor: str = "middle", css: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(text)}</text>'


@dataclass(frozen=True)
class _Frame:
    """The plane of an x-y chart: data ranges and the pixels they map to."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 66
    right: float = WIDTH - 16
    top: float = 14
    bottom: float = 210

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def axes(self, x_name: str, y_name: str) -> str:
        parts = []
        for value, text in _labelled(ticks(*self.y)):
            y = self.at(self.x[0], value)[1]
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(self.left - 8, y + 4, text, "end"))
        for value, text in _labelled(ticks(*self.x)):
            parts.append(_text(self.at(value, self.y[0])[0], self.bottom + 18, text))
        parts.append(f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"/>')
        parts.append(_text((self.left + self.right) / 2, self.bottom + 38, x_name, css="name"))
        middle = (self.top + self.bottom) / 2
        parts.append(f'<g transform="rotate(-90 12 {middle})">{_text(12, middle, y_name, css="name")}</g>')
        return "".join(parts)


def _range(values: Sequence[float], *, zero: bool = False, margin: float = 0.12) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low or abs(high) or 1.0) * margin
    return (0.0 if zero else low - pad), high + pad


def scatter(
    title: str,
    points: Sequence[tuple[Mark, float, float]],
    names: tuple[str, str],
    *,
    limit: float | None = None,
    zero: bool = False,
) -> str:
    """Labelled points; a dashed line at `limit` on the y axis; `zero` starts that axis at 0."""
    heights = [y for _, _, y in points] + ([limit] if limit is not None else [])
    frame = _Frame(_range([x for _, x, _ in points], margin=0.18), _range(heights, zero=zero))
    body = [frame.axes(*names)]
    if limit is not None:
        y = frame.at(0, limit)[1]
        body.append(f'<line class="limit" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        # Its label stands at the end of the line that no point is near.
        near = [frame.at(a, b) for _, a, b in points if abs(frame.at(a, b)[1] - y) < 30]
        end = frame.right if all(x < frame.right - 130 for x, _ in near) else frame.left + 4
        body.append(_text(end, y - 5, f"gate {number(limit)}", "end" if end == frame.right else "start", "note"))
    taken: list[tuple[float, float]] = []
    for mark, x_value, y_value in sorted(points, key=lambda point: point[1]):
        x, y = frame.at(x_value, y_value)
        gap = 15 if mark.strong else 12
        beside, anchor = (gap, "start") if x < frame.right - 70 else (-gap, "end")
        # Labels of neighbours stand clear of each other and of the axis.
        places = [y + 4 + shift for shift in (0, -13, 13, -26, 26, -39, 39)]
        clear = (p for p in places if p < frame.bottom and all(abs(x - a) > 84 or abs(p - b) > 12 for a, b in taken))
        lower = next(clear, y + 4)
        taken.append((x, lower))
        ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="10"/>' if mark.strong else ""
        body.append(f'{ring}<circle class="{escape(mark.css)}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        body.append(_text(x + beside, lower, mark.label, anchor, "strong" if mark.strong else "label"))
    return _svg(title, 256, "".join(body))


def bars(title: str, rows: Sequence[tuple[Mark, float]], unit: str) -> str:
    """Horizontal bars from zero, the value at the end."""
    high, left, step = max(value for _, value in rows) or 1.0, 96.0, 30
    body = []
    for i, (mark, value) in enumerate(rows):
        y, width = i * step + 6, (WIDTH - left - 96) * value / high
        body.append(_text(left - 10, y + 14, mark.label, "end", "strong" if mark.strong else "label"))
        body.append(f'<rect class="{escape(mark.css)}" x="{left}" y="{y}" width="{width:.1f}" height="18" rx="3"/>')
        body.append(_text(left + width + 8, y + 14, f"{number(value)} {unit}", "start"))
    return _svg(title, len(rows) * step + 8, "".join(body))


def spans(title: str, rows: Sequence[tuple[Mark, Sequence[float]]], unit: str) -> str:
    """One line a row from the first to the last value, a dot at each: percentiles side by side."""
    high, left, step = max(max(values) for _, values in rows) or 1.0, 96.0, 30
    body = []
    for i, (mark, values) in enumerate(rows):
        y = i * step + 15
        xs = [left + (WIDTH - left - 152) * value / high for value in values]
        body.append(_text(left - 10, y + 5, mark.label, "end", "strong" if mark.strong else "label"))
        body.append(f'<line class="span {escape(mark.css)}" x1="{xs[0]:.1f}" x2="{xs[-1]:.1f}" y1="{y}" y2="{y}"/>')
        for j, x in enumerate(xs):
            body.append(f'<circle class="{escape(mark.css)}" cx="{x:.1f}" cy="{y}" r="{6 - j * 1.2:.1f}"/>')
        shown = " / ".join(map(number, values))
        body.append(_text(xs[-1] + 10, y + 5, f"{shown} {unit}", "start"))
    return _svg(title, len(rows) * step + 4, "".join(body))


def lines(title: str, series: Series, names: tuple[str, str]) -> str:
    """One line a series, named at its end; the y axis starts at 0."""
    points = [point for line in series.values() for point in line]
    right = WIDTH - 96
    frame = _Frame(
        _range([x for x, _ in points], zero=True, margin=0.02), _range([y for _, y in points], zero=True), right=right
    )
    body = [frame.axes(*names)]
    ends: list[float] = []
    for i, (name, line) in enumerate(series.items()):
        placed = [frame.at(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        body.append(f'<polyline class="line s{i}" points="{path}"/>')
        body += [f'<circle class="s{i}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in placed]
        lower = placed[-1][1] + 4
        while any(abs(lower - other) < 15 for other in ends):
            lower -= 15
        ends.append(lower)
        body.append(_text(placed[-1][0] + 10, lower, name, "start", f"t{i}"))
    return _svg(title, 256, "".join(body))
