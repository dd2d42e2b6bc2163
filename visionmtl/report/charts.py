"""Line charts: from numbers to places on paper; the page's template draws them as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Points = Sequence[tuple[float, float]]

MAX_POINTS = 240
WIDTH, HEIGHT = 400, 210
"""Of a chart, in user units of the SVG."""
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 38
"""Margins around the lines."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in user units, and its number."""

    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A marked point, and what is shown when the pointer rests on it."""

    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Line:
    """One line: its places as SVG's `points` attribute has them, its marked points, and its last value."""

    name: str
    points: str
    dots: tuple[Dot, ...]
    last: float


@dataclass(frozen=True)
class Chart:
    """All that there is to draw."""

    title: str
    x_name: str
    y_name: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]


def line_chart(
    title: str, series: Mapping[str, Points], *, x_name: str = "step", y_name: str = "", log: bool = False
) -> Chart | None:
    """A chart of all finite points; None where there is no such point.

    series: by name, (x, y) in the order of x; long ones are averaged down to MAX_POINTS.
    log: a logarithmic y axis, if every y is positive and they span more than a factor of 20.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    thinned = {name: _thinned(points) for name, points in finite.items() if points}
    if not thinned:
        return None
    all_x = [x for points in thinned.values() for x, _ in points]
    all_y = [y for points in thinned.values() for _, y in points]
    log = log and min(all_y) > 0 and max(all_y) / min(all_y) > 20
    scale = math.log10 if log else float
    x_low, x_high = _widened(min(all_x), max(all_x), 0)
    y_low, y_high = _widened(scale(min(all_y)), scale(max(all_y)), 0.06)

    def at_x(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def at_y(y: float) -> float:
        return round(HEIGHT - BOTTOM - (scale(y) - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for name, points in thinned.items():
        marked = points if len(points) <= 40 else points[-1:]
        dots = tuple(Dot(at_x(x), at_y(y), f"{name}: {y:.5g} at {x:g}") for x, y in marked)
        lines.append(Line(name, " ".join(f"{at_x(x)},{at_y(y)}" for x, y in points), dots, points[-1][1]))
    y_numbers = _powers(y_low, y_high) if log else ticks(y_low, y_high, 4)
    return Chart(
        title=title,
        x_name=x_name,
        y_name=f"{y_name} (log scale)" if log else y_name,
        x_ticks=tuple(Tick(at_x(x), short(x)) for x in ticks(x_low, x_high, 5)),
        y_ticks=tuple(Tick(at_y(y), short(y)) for y in y_numbers),
        lines=tuple(lines),
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within low..high, apart by 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """The number in as few characters as an axis has room for: 0.25, 1.5k, 2M, 3e-5."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    if abs(value) < 1e-12:
        return "0"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _thinned(points: Points) -> list[tuple[float, float]]:
    """At most MAX_POINTS, each the mean of as many neighbours (else some stretches look noisier); the last as it is."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = -(-len(points) // (MAX_POINTS - 1))
    values = np.asarray(points[:-1], np.float64)
    means = [values[first : first + size].mean(axis=0).tolist() for first in range(0, len(values), size)]
    return [*((x, y) for x, y in means), points[-1]]


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """The range with a margin; a range of one value becomes one around it."""
    if high - low < 1e-12 * max(abs(high), 1e-12):
        margin = abs(high) * 0.5 or 0.5
        return low - margin, high + margin
    return low - share * (high - low), high + share * (high - low)


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten between 10**low and 10**high; every other where they are many."""
    first, last = math.ceil(low), math.floor(high)
    stride = 1 + (last - first) // 5
    return [10.0**power for power in range(first, last + 1, stride)]
