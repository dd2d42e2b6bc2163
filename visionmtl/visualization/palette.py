"""Colours of classes: by name, so that one class looks the same in every panel, picture and run."""

import colorsys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256

from visionmtl.structures import LabelSpace

Colour = tuple[int, int, int]
"""RGB, 0..255."""

BACKGROUND: Colour = (128, 128, 128)
"""Of classes that stand for "nothing of interest"; no other class is grey."""
_BACKGROUND_NAMES = {"background", "bg", "void", "unlabeled", "unlabelled", "unknown", "other", "none", "ignore"}

# The seven colours of Okabe and Ito, then those of a grid that lie farthest from all before them in CIELAB: the least
# distance as seen with normal sight, protanopia and deuteranopia (Machado et al. 2009, severity 1). The first 32 are 13
# apart or more, all 64 about 8; each is 25 or more from BACKGROUND.
_TABLE = tuple(
    (int(text[:2], 16), int(text[2:4], 16), int(text[4:], 16))
    for text in (
        "e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 0033cc bbee99 882211 99eecc 7777ff 88eeff 881166 1144aa "
        "882244 bbaa55 cc4444 22cc88 4499ee dddd66 006688 aa4411 33bbcc aa3344 6655ee ee1166 4466cc 224488 44ccaa "
        "bb9966 cc6633 55eeaa 99cc33 6688bb 00ddcc 00ddff 993366 aacc77 dd00aa 445522 5544cc bb9933 dd77ff ccee88 "
        "aa3388 00bb88 5588cc ccbb55 008855 4477cc 44ddaa ffbb44 00dddd aa3333 114499 009999 22bbbb 44aacc ff2255 "
        "8800aa 4466dd 008866 992200"
    ).split()
)
_WELL_APART = 32
_FIXED = {
    "person": 5, "car": 4, "sky": 1, "tree": 2, "vegetation": 2, "road": 6, "floor": 0, "ceiling": 3, "wall": 6,
    "window": 12, "chair": 9, "bed": 13, "table": 30, "sofa": 26, "building": 16, "dog": 11, "cat": 10, "bicycle": 18,
    "furniture": 7, "objects": 49, "picture": 21, "books": 43, "tv": 8, "box": 35, "sphere": 25, "cylinder": 40,
}  # fmt: skip
"""Places of common classes in the table; of two that would meet, the first by name has it."""


def palette(count: int) -> tuple[Colour, ...]:
    """RGB 0..255 that differ between neighbours: hues a golden angle apart, brightness in three turns."""
    colours = [
        colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.55 + 0.1 * (number % 2), (0.95, 0.75, 0.6)[number % 3])
        for number in range(count)
    ]
    return tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours)


def is_background(name: str) -> bool:
    """Whether a class of this name stands for everything that is no class."""
    return name.strip("_ ").lower() in _BACKGROUND_NAMES


def colours_by_name(names: Iterable[str]) -> dict[str, Colour]:
    """A colour for each class name: its own in nearly every set of names, and different ones within a set.

    A name asks for a place in a table that its hash chooses; where another name has it, for the next free one. More
    than 64 names share hues in two shades or more.
    """
    asked = sorted(set(names), key=lambda name: (name not in _FIXED, sha256(name.encode()).digest()))
    colours = {name: BACKGROUND for name in asked if is_background(name)}
    taken: set[int] = set()
    for name in (name for name in asked if name not in colours):
        hashed = int.from_bytes(sha256(name.encode()).digest()[:4], "big")
        start = _FIXED.get(name, hashed % _WELL_APART)
        turn = len(taken) // len(_TABLE) * len(_TABLE)
        near = ((start + step) % _WELL_APART for step in range(_WELL_APART))
        place = next(
            turn + place for place in (start, *near, *range(_WELL_APART, len(_TABLE))) if turn + place not in taken
        )
        taken.add(place)
        red, green, blue = _TABLE[place % len(_TABLE)]
        shade = 0.62 ** (place // len(_TABLE))
        colours[name] = round(red * shade), round(green * shade), round(blue * shade)
    return colours


def recolour(spaces: Mapping[str, LabelSpace | None]) -> dict[str, LabelSpace | None]:
    """The spaces with colours by name, in which a class that several of them have looks the same in all."""
    colours = colours_by_name(name for space in spaces.values() if space for name in space.classes)
    return {
        key: space and replace(space, colours=tuple(colours[name] for name in space.classes))
        for key, space in spaces.items()
    }
