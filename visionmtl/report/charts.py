"""Line charts as SVG text, for documents that load nothing."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

Points = Sequence[tuple[float, float]]

MAX_POINTS = 240
NUM_COLOURS = 6
"""Lines have the classes line0 .. line5; the document's style sheet gives them colours."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 24


def line_chart(series: Mapping[str, Points], *, size: tuple[int, int] = (190, 400), log: bool = False) -> str:
    """An <svg> of (H, W) user units, as wide as its container. Points that are not finite are left out.

    series: by name, (step, value) in the order of steps; long ones are averaged down to MAX_POINTS.
    log: a logarithmic value axis, if every value is positive.
    """
    height, width = size
    kept = {name: _thinned([p for p in points if math.isfinite(p[1])]) for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return f'<svg viewBox="0 0 {width} {height}" role="img"><text x="20" y="30">no values</text></svg>'

    steps = [x for points in kept.values() for x, _ in points]
    values = [y for points in kept.values() for _, y in points]
    log = log and min(values) > 0 and max(values) / min(values) > 20
    scaled = [math.log10(y) for y in values] if log else values
    x_low, x_high = _widened(min(steps), max(steps), 0)
    y_low, y_high = _widened(min(scaled), max(scaled), 0.06)

    def at_x(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (width - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        y = math.log10(y) if log else y
        return height - _BOTTOM - (y - y_low) / (y_high - y_low) * (height - _TOP - _BOTTOM)

    y_ticks = _powers(y_low, y_high) if log else ticks(y_low, y_high, 4)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(", ".join(kept))}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at_y(y) + 3.5:.1f}" text-anchor="end">{short(y)}</text>')
    for x in ticks(x_low, x_high, 5):
        parts.append(f'<text x="{at_x(x):.1f}" y="{height - 7}" text-anchor="middle">{short(x)}</text>')
    for i, (name, points) in enumerate(kept.items()):
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line{i % NUM_COLOURS}" points="{path}"/>')
        dots = points if len(points) <= 40 else points[-1:]
        for x, y in dots:
            place = f'cx="{at_x(x):.1f}" cy="{at_y(y):.1f}"'
            tip = f"{escape(name)}: {y:.5g} at {x:g}"
            parts.append(f'<circle class="line{i % NUM_COLOURS}" {place} r="2.4"><title>{tip}</title></circle>')
    return "\n".join([*parts, "</svg>"])


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
