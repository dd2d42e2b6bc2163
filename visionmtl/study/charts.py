"""Charts of a comparison as PNG files: intervals under each other, and curves over fractions of labels."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from visionmtl.report.charts import short, ticks
from visionmtl.study.statistics import Interval
from visionmtl.visualization.canvas import FAINT, INK, PAPER, Colour, text_width, write

TEXT_PX, ROW_PX, MARGIN_PX, PLOT_PX = 15, 26, 14, 560
GRID: Colour = (225, 227, 230)
COLOURS: tuple[Colour, ...] = (
    (31, 98, 184), (204, 88, 20), (24, 130, 84), (150, 60, 160), (180, 40, 50), (100, 100, 100), (0, 140, 160),
)  # fmt: skip
_OF_VERDICT = {"positive": (24, 130, 84), "negative": (180, 40, 50), "not shown": FAINT}


def draw_intervals(file: Path, title: str, rows: Sequence[tuple[str, Interval]], unit: str = "%") -> None:
    """A row each, in percent: every seed as a dot, the mean as a stroke, the interval as a bar; a line at zero."""
    low, high = _range([one for _, one in rows], scale=100, zero=True)
    left = MARGIN_PX + max(round(text_width(name, TEXT_PX)) for name, _ in rows) + 10
    width, height = left + PLOT_PX + MARGIN_PX, 2 * MARGIN_PX + ROW_PX * (len(rows) + 2)
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    top, bottom = MARGIN_PX + ROW_PX, MARGIN_PX + ROW_PX * (len(rows) + 1)

    def x(value: float) -> float:
        return left + (_clipped(value, low, high) - low) / (high - low) * PLOT_PX

    write(pen, (MARGIN_PX, MARGIN_PX), title, TEXT_PX, INK, "la")
    for tick in ticks(low, high, 6):
        pen.line([(x(tick), top), (x(tick), bottom)], fill=FAINT if abs(tick) < 1e-9 else GRID)
        write(pen, (x(tick), bottom + 4), f"{short(tick)}{unit}", TEXT_PX - 3, FAINT, "ma")
    for number, (name, one) in enumerate(rows):
        y = top + ROW_PX * (number + 0.5)
        colour = _OF_VERDICT[one.verdict]
        write(pen, (left - 10, y), name, TEXT_PX, INK, "rm")
        if math.isfinite(one.low):
            pen.line([(x(100 * one.low), y), (x(100 * one.high), y)], fill=colour, width=3)
        pen.line([(x(100 * one.mean), y - 8), (x(100 * one.mean), y + 8)], fill=colour, width=3)
        for value in one.values:
            pen.ellipse([x(100 * value) - 3, y - 3, x(100 * value) + 3, y + 3], outline=INK, fill=PAPER)
    _save(image, file)


def draw_curves(file: Path, title: str, curves: Mapping[str, Sequence[tuple[float, Interval]]], y_name: str) -> None:
    """Lines of means over a fraction (logarithmic axis), with their intervals."""
    points = [point for curve in curves.values() for point in curve]
    low, high = _range([one for _, one in points])
    places = sorted({fraction for fraction, _ in points})
    first, last = math.log(places[0]), math.log(places[-1])
    left, top, plot_height = 70, MARGIN_PX + ROW_PX, 320
    legend = ROW_PX * len(curves)
    image = Image.new("RGB", (left + PLOT_PX + 2 * MARGIN_PX, top + plot_height + 60 + legend), PAPER)
    pen = ImageDraw.Draw(image)

    def x(fraction: float) -> float:
        return left + (math.log(fraction) - first) / max(last - first, 1e-9) * PLOT_PX

    def y(value: float) -> float:
        return top + plot_height - (_clipped(value, low, high) - low) / (high - low) * plot_height

    write(pen, (MARGIN_PX, MARGIN_PX - 4), f"{title}: {y_name}", TEXT_PX, INK, "la")
    for tick in ticks(low, high, 5):
        pen.line([(left, y(tick)), (left + PLOT_PX, y(tick))], fill=GRID)
        write(pen, (left - 6, y(tick)), short(tick), TEXT_PX - 3, FAINT, "rm")
    for fraction in places:
        pen.line([(x(fraction), top), (x(fraction), top + plot_height)], fill=GRID)
        label = f"{100 * fraction:g} %"
        write(pen, (x(fraction), top + plot_height + 4), label, TEXT_PX - 3, FAINT, "ma")
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        pen.line([(x(fraction), y(one.mean)) for fraction, one in curve], fill=colour, width=3)
        shift = 4 * (number - (len(curves) - 1) / 2)
        for fraction, one in curve:
            if math.isfinite(one.low):
                at = x(fraction) + shift
                pen.line([(at, y(one.low)), (at, y(one.high))], fill=colour, width=2)
        row = top + plot_height + 36 + ROW_PX * number
        pen.line([(left, row + 9), (left + 26, row + 9)], fill=colour, width=3)
        write(pen, (left + 34, row), name, TEXT_PX, INK, "la")
    _save(image, file)


def _range(intervals: Sequence[Interval], scale: float = 1, zero: bool = False) -> tuple[float, float]:
    """An axis for all values and their intervals; what reaches farther than the values' own spread is cut off."""
    values = [scale * value for one in intervals for value in one.values] + [0.0] * zero
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    ends = [scale * value for one in intervals for value in (one.low, one.high) if math.isfinite(value)]
    return max(min([low, *ends]), low - spread) - 0.05 * spread, min(max([high, *ends]), high + spread) + 0.05 * spread


def _clipped(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _save(image: Image.Image, file: Path) -> None:
    temporary = file.with_name(f".{file.name}")
    image.save(temporary, format="PNG")
    temporary.replace(file)
