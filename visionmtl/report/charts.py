"""Charts as plain numbers, which the page's script draws as SVG; ticks and short numbers for charts drawn elsewhere."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Points = Sequence[tuple[float, float]]

MAX_POINTS = 240


@dataclass(frozen=True)
class Line:
    """One line: its points in the order of x."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """All that there is to draw. x_range: ends of the axis, None = those of the points."""

    title: str
    x_name: str
    y_name: str
    log: bool
    lines: tuple[Line, ...]
    x_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class IntervalRow:
    """One row: the mean, its interval (None: not known), and the values that it is the mean of."""

    name: str
    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]
    verdict: str  # as of `study.statistics.Interval`


@dataclass(frozen=True)
class IntervalChart:
    """Rows of intervals under each other, with a line at zero."""

    title: str
    x_name: str
    rows: tuple[IntervalRow, ...]


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    x_name: str = "training step",
    y_name: str = "",
    log: bool = False,
    x_range: tuple[float, float] | None = None,
) -> Chart | None:
    """A chart of all finite points; None where there is no such point.

    series: by name, (x, y) in the order of x; long ones are averaged down to MAX_POINTS.
    log: a logarithmic y axis, if every y is positive and they span more than a factor of 20.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    thinned = {name: _thinned(points) for name, points in finite.items() if points}
    if not thinned:
        return None
    all_y = [y for points in thinned.values() for _, y in points]
    log = log and min(all_y) > 0 and max(all_y) / min(all_y) > 20
    lines = [Line(name, tuple((_short(x), _short(y)) for x, y in points)) for name, points in thinned.items()]
    return Chart(title, x_name, f"{y_name} (log scale)" if log else y_name, log, tuple(lines), x_range)


def _short(value: float) -> float:
    """Six digits are more than a chart shows, and keep the page small."""
    return float(f"{value:.6g}")


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
