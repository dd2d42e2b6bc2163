"""Procedural paints: grey patterns that tile, coloured by (random) materials, anti-aliased by mip levels."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TEXELS = 256  # side of the finest level
_LEVELS = 9  # 256 .. 1 texels
_SIDES = np.array([TEXELS >> level for level in range(_LEVELS)])
_STARTS = np.concatenate([[0], np.cumsum(_SIDES**2)])
Grey = NDArray[np.float64]
Floats = NDArray[np.float32]
Colour = tuple[float, float, float]


class Material(NamedTuple):
    """How a surface looks, and which class it is."""

    label: int
    pattern: str
    tile_m: float  # side of one repetition of the pattern
    dark: Colour  # where the pattern is 0
    light: Colour  # where the pattern is 1
    gloss: float = 0.0
    glow: float = 0.0  # 0..1: light of its own, which no shadow touches


def linear_rgb(hue: float, saturation: float, value: float) -> Colour:
    """Linear RGB of a hue, saturation and value as people see them (sRGB, taken as gamma 2); hue repeats after 1."""
    turn = [(n + hue * 6) % 6 for n in (5, 3, 1)]
    red, green, blue = (value * (1 - saturation * max(0.0, min(k, 4 - k, 1))) for k in turn)
    return red * red, green * green, blue * blue


def wall_paint(rng: np.random.Generator, label: int) -> Material:
    """Pale, with little contrast inside the pattern."""
    hue, saturation, value = rng.random(), rng.uniform(0.05, 0.35), rng.uniform(0.6, 0.9)
    pattern = str(rng.choice(("plaster", "plaster", "bricks", "stripes", "weave", "dots")))
    contrast, tile_m = (0.55, 0.9) if pattern == "bricks" else (0.82, rng.uniform(0.7, 1.1))
    dark, light = linear_rgb(hue, saturation, value * contrast), linear_rgb(hue, saturation * 0.7, value)
    return Material(label, pattern, tile_m, dark, light)


def ceiling_paint(rng: np.random.Generator, label: int) -> Material:
    """Nearly white."""
    value = rng.uniform(0.85, 0.97)
    return Material(label, "plaster", 1.5, linear_rgb(0.1, 0.04, value * 0.93), linear_rgb(0.1, 0.02, value))


def floor_paint(rng: np.random.Generator, label: int) -> Material:
    """Wood in its own colours, or stone and carpet in greyish ones."""
    pattern = str(rng.choice(("planks", "planks", "tiles", "checker", "marble", "weave")))
    hue, saturation = rng.uniform(0.04, 0.11), rng.uniform(0.35, 0.65)
    if pattern != "planks":
        hue, saturation = rng.random(), rng.uniform(0.0, 0.3)
    value = rng.uniform(0.5, 0.85)
    dark, light = linear_rgb(hue, saturation, value * 0.45), linear_rgb(hue, saturation * 0.8, value)
    return Material(label, pattern, 1.2, dark, light, gloss=rng.uniform(0, 0.12))


def object_paint(rng: np.random.Generator, label: int, typical_hue: float) -> Material:
    """Any pattern; three times in four in a hue near the typical one, else in any: a hint, but no proof of a class."""
    hue = typical_hue + rng.normal(0, 0.06) if rng.random() < 0.75 else rng.random()
    saturation, value = rng.uniform(0.45, 0.95), rng.uniform(0.6, 1.0)
    dark = linear_rgb(hue + rng.uniform(-0.1, 0.1), saturation * rng.uniform(0.2, 1), value * rng.uniform(0.25, 0.75))
    if rng.random() < 0.15:
        dark = linear_rgb(rng.random(), rng.uniform(0, 0.8), rng.uniform(0.3, 1))
    pattern = str(rng.choice([name for name in PATTERNS if name not in ("door", "window", "tiles")]))
    light = linear_rgb(hue, saturation, value)
    return Material(label, pattern, rng.uniform(0.4, 0.8), dark, light, gloss=rng.uniform(0, 0.5))


def albedo(
    materials: Sequence[Material], index: NDArray[np.int64], u: Floats, v: Floats, metres_per_px: Floats
) -> Floats:
    """Linear RGB [3, H, W] of the materials[index] at u, v (in tiles; they repeat).

    metres_per_px: what a pixel covers there; it chooses the mip level whose texels are about a pixel wide.
    """
    per_metre = np.array([TEXELS / material.tile_m for material in materials], np.float32)[index]
    which = np.array([list(PATTERNS).index(material.pattern) for material in materials])[index]
    grey = _look_up(which, u, v, metres_per_px * per_metre)

    dark, light = (np.array([material[i] for material in materials], np.float32).T[:, :, None] for i in (3, 4))
    palette = (dark + (light - dark) * np.linspace(0, 1, 256, dtype=np.float32)).reshape(3, -1)
    colours: Floats = palette[:, index * 256 + grey]
    return colours


def _look_up(which: NDArray[np.int64], u: Floats, v: Floats, texels_per_px: Floats) -> NDArray[np.uint8]:
    """Grey values 0..255 of the patterns number `which`."""
    # the exponent bits of a float32 are floor(log2), at a fraction of the price of np.log2
    level = np.clip((texels_per_px.view(np.int32) >> 23) - 127, 0, _LEVELS - 1)
    side = _SIDES[level]
    column = ((u - np.floor(u)) * side.astype(np.float32)).astype(np.int64)
    row = ((v - np.floor(v)) * side.astype(np.float32)).astype(np.int64)
    # u just below a whole number rounds to 1.0
    index = np.minimum(row, side - 1) * side + np.minimum(column, side - 1) + _STARTS[level]
    return _table().ravel()[index + which * _STARTS[-1]]


@functools.cache
def _table() -> NDArray[np.uint8]:
    """[patterns, texels of all levels]; the same in every process."""
    rows = []
    for name, pattern in PATTERNS.items():
        image = np.clip(pattern(np.random.default_rng(list(name.encode()))), 0, 1)
        levels = []
        for side in _SIDES:
            block = len(image) // side
            image = image.reshape(side, block, side, block).mean(axis=(1, 3))
            levels.append((image * 255 + 0.5).astype(np.uint8).ravel())
        rows.append(np.concatenate(levels))
    return np.stack(rows)


def _grid() -> tuple[Grey, Grey]:
    """Row and column of every texel's centre, 0..1."""
    axis = (np.arange(TEXELS) + 0.5) / TEXELS
    return axis[:, None] * np.ones(TEXELS), np.ones((TEXELS, 1)) * axis


def _noise(rng: np.random.Generator, slope: float, stretch: float = 1.0) -> Grey:
    """Tiling noise with zero mean and unit deviation whose amplitude falls as frequency**-slope.

    stretch > 1 draws it out along the rows.
    """
    fy, fx = np.fft.fftfreq(TEXELS)[:, None] * TEXELS, np.fft.rfftfreq(TEXELS) * TEXELS
    frequency = np.sqrt(fy**2 + (fx * stretch) ** 2)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((TEXELS, TEXELS))) * frequency**-slope
    field = np.fft.irfft2(spectrum, (TEXELS, TEXELS))
    return (field - field.mean()) / field.std()


def _groove(position: Grey, width: float) -> Grey:
    """0 on the lines where `position` is an integer, 1 away from them."""
    return np.clip(np.abs(position - np.round(position)) / width, 0, 1)


def _cells(rng: np.random.Generator, rows: int, columns: int, shift: float) -> tuple[Grey, Grey, Grey]:
    """Bricks: (tone of each cell, position in rows, position in columns), every other row moved by `shift` cells."""
    v, u = _grid()
    y = v * rows
    x = u * columns + shift * (np.floor(y) % 2)
    tone = rng.random((rows, columns))[y.astype(int), np.floor(x).astype(int) % columns]
    return tone, y, x


def _planks(rng: np.random.Generator) -> Grey:
    tone, y, x = _cells(rng, 8, 2, 0.5)
    wood = 0.3 + 0.5 * tone + 0.1 * _noise(rng, 0.8, stretch=12)
    return wood * (0.25 + 0.75 * _groove(y, 0.08) * _groove(x, 0.02))


def _tiles(rng: np.random.Generator) -> Grey:
    tone, y, x = _cells(rng, 4, 4, 0)
    return (0.65 + 0.25 * tone + 0.05 * _noise(rng, 1.2)) * (_groove(y, 0.05) * _groove(x, 0.05))


def _checker(rng: np.random.Generator) -> Grey:
    _, y, x = _cells(rng, 4, 4, 0)
    return 0.1 + 0.75 * ((np.floor(y) + np.floor(x)) % 2) + 0.05 * _noise(rng, 1.0)


def _bricks(rng: np.random.Generator) -> Grey:
    tone, y, x = _cells(rng, 8, 4, 0.5)
    return 1 - (0.5 + 0.4 * tone + 0.06 * _noise(rng, 0.5)) * np.minimum(_groove(y, 0.09), _groove(x, 0.05))


def _stripes(rng: np.random.Generator) -> Grey:
    _, u = _grid()
    return np.clip(0.5 + 3 * np.sin(2 * np.pi * 4 * u), 0.1, 0.9) + 0.04 * _noise(rng, 0.3)


def _plaster(rng: np.random.Generator) -> Grey:
    return 0.5 + 0.14 * _noise(rng, 1.3) + 0.05 * _noise(rng, 0.2)


def _marble(rng: np.random.Generator) -> Grey:
    v, u = _grid()
    veins = np.abs(np.sin(2 * np.pi * (2 * u + v) + 2.2 * _noise(rng, 1.7)))
    return 0.15 + 0.8 * veins**0.6 + 0.05 * _noise(rng, 0.5)


def _weave(rng: np.random.Generator) -> Grey:
    v, u = _grid()
    return 0.5 + 0.2 * np.sin(2 * np.pi * 32 * u) * np.sin(2 * np.pi * 32 * v) + 0.1 * _noise(rng, 0.4)


def _dots(rng: np.random.Generator) -> Grey:
    _, y, x = _cells(rng, 6, 6, 0.5)
    away = np.hypot(y % 1 - 0.5, x % 1 - 0.5)
    return np.clip((0.34 - away) * 14 + 0.5, 0.1, 0.9) + 0.04 * _noise(rng, 0.5)


def _patches(rng: np.random.Generator) -> Grey:
    return np.clip(0.5 + 2.5 * _noise(rng, 1.8), 0.1, 0.9) + 0.03 * _noise(rng, 0.3)


def _panel(v: Grey, u: Grey, low: tuple[float, float], high: tuple[float, float], width: float) -> Grey:
    """Signed distance to a rectangle's rim over `width`, clipped to -1 (outside) .. 1 (inside)."""
    inside = np.minimum(np.minimum(v - low[0], high[0] - v), np.minimum(u - low[1], high[1] - u))
    return np.clip(inside / width, -1, 1)


def _door(rng: np.random.Generator) -> Grey:
    """One tile is a whole door: frame, four panels, a handle; row 0 is at the bottom."""
    v, u = _grid()
    wood = 0.55 + 0.06 * _noise(rng, 0.8, stretch=0.1)
    for low_v, high_v in ((0.1, 0.45), (0.54, 0.92)):
        for low_u, high_u in ((0.16, 0.46), (0.54, 0.84)):
            rim = _panel(v, u, (low_v, low_u), (high_v, high_u), 0.025)
            wood = wood - 0.3 * (1 - np.abs(rim)) + 0.08 * (rim > 0)
    frame = _panel(v, u, (-1, 0.06), (0.97, 0.94), 0.01)
    wood = np.where(frame > 0, wood, 0.85) - 0.35 * (1 - np.abs(frame))
    return np.where(np.hypot((v - 0.49) * 2, u - 0.885) < 0.03, 1.0, wood)


def _window(rng: np.random.Generator) -> Grey:
    """One tile is a whole window: 0 is frame, 0.38 hills, above them sky; row 0 is at the bottom."""
    v, u = _grid()
    hills = 0.2 + 0.05 * np.sin(2 * np.pi * (u + 0.2)) + 0.03 * np.sin(2 * np.pi * 3 * u)
    sky = 0.95 - 0.45 * v + 0.06 * np.clip(_noise(rng, 1.8, stretch=0.5), 0, 2)
    glass = np.where(v < hills, 0.38, sky)
    frame = _panel(v, u, (0.07, 0.06), (0.93, 0.94), 0.015)
    bars = np.minimum(np.abs(u - 0.5) / 0.025, np.abs(v - 0.62) / 0.025)
    return glass * np.clip(np.minimum((frame + 1) / 2, bars - 0.5), 0, 1)


PATTERNS = {
    "planks": _planks, "tiles": _tiles, "checker": _checker, "bricks": _bricks, "stripes": _stripes,
    "rings": lambda rng: _stripes(rng).T,
    "plaster": _plaster, "marble": _marble, "weave": _weave, "dots": _dots, "patches": _patches, "door": _door,
    "window": _window,
}  # fmt: skip
