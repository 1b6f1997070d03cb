"""Charts as inline SVG: plain strings, no library, no script; colours come from the page's CSS variables.

Every chart scales with its column, carries a text alternative, and shows exact values as tooltips where there are few.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_MAX_POINTS = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 10.0, 34.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart.

    Attributes:
        name: for the legend.
        points: ``(x, y)`` in order of x.
        style: ``faint`` (raw data), ``strong`` (what to look at) or ``other`` (a second quantity).
        bounds: the low and the high end of an interval at every point, or nothing.
    """

    name: str
    points: Sequence[Point]
    style: str = "strong"
    bounds: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its bounds, as a dot on a bar.

    Attributes:
        value: where the dot is.
        low: lower bound.
        high: upper bound.
        style: ``strong`` or ``other``.
        name: for the tooltip.
    """

    value: float
    low: float
    high: float
    style: str
    name: str


@dataclass(frozen=True)
class Axis:
    """A scale from values to px."""

    low: float
    high: float
    start_px: float
    end_px: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the px of a value; values outside are held at the ends."""
        low, high, x = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        fraction = min(1.0, max(0.0, (x - low) / (high - low)))
        return self.start_px + fraction * (self.end_px - self.start_px)

    def ticks(self, count: int) -> list[float]:
        """Return round values inside the axis."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, count)


def linear_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about ``count`` multiples of 1, 2 or 5 times a power of ten, within ``[low, high]``."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within ``[low, high]``, with 2 and 5 times them when there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**e for e in exponents for f in factors if low * 0.999 <= f * 10.0**e <= high * 1.001]
        if len(ticks) >= 3:
            return ticks
    return ticks or [low, high]


def short_number(value: float) -> str:
    """Write a number for an axis: ``1.5k``, ``0.02``, ``3M``."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    if value == 0:
        return "0"
    return f"{value:.0e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:.3g}"


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Average y over a window around each point.

    The window narrows towards the start, where losses are steep and a lopsided one would shift the curve; at the end,
    where they are flat, it is cut off instead, so that the last value is not that of a single noisy point.
    """
    totals = [0.0]
    for _, y in points:
        totals.append(totals[-1] + y)
    smoothed = []
    for i, (x, _) in enumerate(points):
        half = min(window // 2, i)
        end = min(i + half + 1, len(points))
        smoothed.append((x, (totals[end] - totals[i - half]) / (end - i + half)))
    return smoothed


def thin(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """Keep at most ``limit`` points, each the mean of its neighbours."""
    if len(points) <= limit:
        return list(points)
    bounds = [round(i * len(points) / limit) for i in range(limit + 1)]
    parts = [points[a:b] for a, b in itertools.pairwise(bounds)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    log_y: bool = False,
    rule: tuple[float, str] | None = None,
    width: float = 440,
    height: float = 210,
) -> str:
    """Draw lines.

    Args:
        series: at least one point in all; y must be positive when ``log_y``.
        label: text alternative.
        x_label: under the x axis.
        log_y: logarithmic y axis.
        rule: x and text of a vertical mark.
        width: px of the drawing before it is scaled.
        height: likewise.

    Raises:
        ValueError: if there is no point.
    """
    points = [point for one in series for point in one.points]
    if not points:
        raise ValueError(f"chart '{label}' has no points")
    x_axis = _axis([x for x, _ in points], _LEFT, width - _RIGHT)
    ends = [end for one in series for bounds in one.bounds for end in bounds]
    y_axis = _axis([*(y for _, y in points), *ends], height - _BOTTOM, _TOP, log=log_y, pad=0.05)
    body = [_frame(x_axis, y_axis, x_label, width, height)]
    for one in series:
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in thin(one.points))
        if len(one.points) == 1:
            x, y = path.split(",")
            body.append(f'<circle class="dot {one.style}" cx="{x}" cy="{y}" r="3"/>')
        body.append(f'<polyline class="line {one.style}" points="{path}"/>')
        for point, (low, high) in zip(one.points, one.bounds, strict=False):
            at, top, bottom = x_axis.at(point[0]), y_axis.at(high), y_axis.at(low)
            body.append(
                f'<line class="line {one.style}" x1="{at:.1f}" y1="{top:.1f}" x2="{at:.1f}" y2="{bottom:.1f}"/>'
            )
    if rule is not None:
        body.append(_rule(x_axis.at(rule[0]), rule[1], width, height))
    return _svg(body, label, width, height)


def histogram(
    edges: Sequence[float],
    groups: Sequence[tuple[str, Sequence[int]]],
    *,
    label: str,
    x_label: str,
    rule: tuple[float, str] | None = None,
    width: float = 440,
    height: float = 190,
) -> str:
    """Draw counts over bins, the groups on top of one another: the first in the background, the second strong.

    Args:
        edges: n + 1 increasing bin edges.
        groups: name and n counts each.
        label: text alternative.
        x_label: under the x axis.
        rule: x and text of a vertical mark.
        width: px of the drawing before it is scaled.
        height: likewise.
    """
    top = max((count for _, counts in groups for count in counts), default=0)
    x_axis = Axis(edges[0], edges[-1], _LEFT, width - _RIGHT)
    y_axis = Axis(0, max(top, 1) * 1.05, height - _BOTTOM, _TOP)
    body = [_frame(x_axis, y_axis, x_label, width, height)]
    for style, (name, counts) in zip(("faint", "strong"), groups, strict=False):
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            if count:
                x, y = x_axis.at(low) + 0.5, y_axis.at(count)
                w, h = max(x_axis.at(high) - x - 0.5, 1.0), y_axis.start_px - y
                tip = f"{name}: {count:,} from {short_number(low)} to {short_number(high)}"
                body.append(
                    f'<rect class="bar {style}" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}">'
                    f"<title>{escape(tip)}</title></rect>"
                )
    if rule is not None:
        body.append(_rule(x_axis.at(rule[0]), rule[1], width, height))
    return _svg(body, label, width, height)


def interval_chart(rows: Sequence[tuple[str, Sequence[Interval]]], *, label: str, width: float = 980) -> str:
    """Draw fractions from 0 to 1 with their bounds, one row per question.

    Args:
        rows: name of the row, and its intervals from top to bottom.
        label: text alternative.
        width: px of the drawing before it is scaled.
    """
    row_px, left = 36.0, 120.0
    height = _TOP + row_px * len(rows) + 22
    axis = Axis(0.0, 1.0, left, width - 120)
    body = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = axis.at(tick)
        body.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{height - 22}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick:.0%}</text>')
    for i, (name, intervals) in enumerate(rows):
        middle = _TOP + row_px * (i + 0.5)
        body.append(f'<text class="name" x="{left - 12}" y="{middle + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for j, one in enumerate(intervals):
            body.append(_interval(axis, middle + (j - (len(intervals) - 1) / 2) * 10, one))
            x = width - 96 + 52 * j
            body.append(f'<text class="value {one.style}" x="{x}" y="{middle + 4:.1f}">{one.value:.0%}</text>')
    return _svg(body, label, width, height)


def _interval(axis: Axis, y: float, one: Interval) -> str:
    tip = f"{one.name}: {one.value:.1%} (95% interval {one.low:.1%} to {one.high:.1%})"
    return (
        f'<g class="interval {one.style}"><title>{escape(tip)}</title>'
        f'<line x1="{axis.at(one.low):.1f}" y1="{y:.1f}" x2="{axis.at(one.high):.1f}" y2="{y:.1f}"/>'
        f'<circle cx="{axis.at(one.value):.1f}" cy="{y:.1f}" r="4"/></g>'
    )


def _axis(values: Sequence[float], start_px: float, end_px: float, *, log: bool = False, pad: float = 0.0) -> Axis:
    """Span an axis over values, with some room; a single value gets an axis around it."""
    low, high = min(values), max(values)
    if log:
        ratio = max(high / low, 1.2) ** pad
        return Axis(
            low / ratio if high > low else low / 2, high * ratio if high > low else high * 2, start_px, end_px, log=True
        )
    if high == low:
        half = abs(low) / 2 or 0.5
        return Axis(low - half, high + half, start_px, end_px)
    room = pad * (high - low)
    return Axis(0.0 if 0 <= low < 0.3 * high and pad else low - room, high + room, start_px, end_px)


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, width: float, height: float) -> str:
    parts = []
    for tick in y_axis.ticks(4):
        y = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{width - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{short_number(tick)}</text>'
        )
    for tick in x_axis.ticks(5):
        x, y = x_axis.at(tick), height - _BOTTOM + 15
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{short_number(tick)}</text>')
    base = height - _BOTTOM
    parts.append(f'<line class="base" x1="{_LEFT}" y1="{base}" x2="{width - _RIGHT}" y2="{base}"/>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _rule(x: float, text: str, width: float, height: float) -> str:
    anchor, at = ("end", x - 5) if x > width * 0.6 else ("start", x + 5)
    return (
        f'<line class="rule" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{height - _BOTTOM}"/>'
        f'<text class="mark" x="{at:.1f}" y="{_TOP + 11}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(body: Sequence[str], label: str, width: float, height: float) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'
