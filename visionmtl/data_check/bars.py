"""Bar charts of classes and depths as pictures, in the colours that they have in drawings."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from visionmtl.structures import LabelSpace
from visionmtl.visualization import canvas
from visionmtl.visualization.canvas import Colour, Picture

MAX_BARS = 14
_TEXT_PX = 15
_LINE_PX = 21
_EVEN: Colour = (96, 125, 175)


class Bar(NamedTuple):
    """One line of a chart."""

    name: str
    value: float
    text: str  # behind the bar
    colour: Colour = _EVEN


def bar_chart(title: str, bars: Sequence[Bar], width: int) -> Picture:
    """A title and a line for each bar, name to the left: [H, width, 3]."""
    names = min(width * 0.4, max((canvas.font(_TEXT_PX).getlength(bar.name) for bar in bars), default=0)) + _TEXT_PX
    texts = max((canvas.font(_TEXT_PX).getlength(bar.text) for bar in bars), default=0) + _TEXT_PX
    longest = max((bar.value for bar in bars), default=0) or 1
    sheet = Image.new("RGB", (width, round((len(bars) + 1.6) * _LINE_PX)), canvas.PAPER)
    draw = ImageDraw.Draw(sheet)
    canvas.write(draw, (0, _LINE_PX / 2), canvas.shorten(title, width, _TEXT_PX), _TEXT_PX, canvas.INK)
    for number, bar in enumerate(bars):
        top = round((number + 1.2) * _LINE_PX)
        middle, name = top + _LINE_PX / 2, canvas.shorten(bar.name, names - _TEXT_PX, _TEXT_PX)
        canvas.write(draw, (names - _TEXT_PX / 2, middle), name, _TEXT_PX, canvas.INK, "rm")
        end = names + max(2, (width - names - texts) * bar.value / longest)
        draw.rectangle((names, top + 3, end, top + _LINE_PX - 4), fill=bar.colour, outline=canvas.FAINT)
        canvas.write(draw, (end + _TEXT_PX / 2, middle), bar.text, _TEXT_PX, canvas.FAINT)
    return np.asarray(sheet)


def class_bars(classes: Sequence[Mapping[str, Any]], unit: str, space: LabelSpace) -> list[Bar]:
    """The most frequent classes, then all others as one; see `statistics.statistics`."""
    order = sorted((k for k, one in enumerate(classes) if one[unit]), key=lambda k: -classes[k][unit])
    shown, rest = (order, []) if len(order) <= MAX_BARS else (order[: MAX_BARS - 1], order[MAX_BARS - 1 :])
    bars = [_bar(classes[k]["name"], classes[k], unit, space.colours[k]) for k in shown]
    if rest:
        others = {key: sum(classes[k][key] for k in rest) for key in (unit, "share")}
        bars.append(_bar(f"{len(rest)} others", others, unit, canvas.FAINT))
    return bars


def _bar(name: str, one: Mapping[str, Any], unit: str, colour: Colour) -> Bar:
    count = f"{one[unit]:,}  " if unit == "boxes" else ""
    return Bar(name, one[unit], f"{count}{one['share']:.1%}", colour)


def depth_bars(histogram: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """A bar for each range of depths."""
    return [Bar(depth_name(one), one["share"], f"{one['share']:.1%}") for one in histogram]


def depth_name(bar: Mapping[str, Any]) -> str:
    """ "2 to 2.83 m"; the ends are open."""
    low, high = bar["from_m"], bar["to_m"]
    return f"< {high:.3g} m" if low is None else f">= {low:.3g} m" if high is None else f"{low:.3g} to {high:.3g} m"
