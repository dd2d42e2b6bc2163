"""Text, hatching, tags, legends and colour bars: what every picture is made of."""

import logging
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from visionmtl.visualization.palette import Colour

Picture = NDArray[np.uint8]
"""[H, W, 3] RGB."""

PAPER: Colour = (255, 255, 255)
INK: Colour = (32, 33, 36)
FAINT: Colour = (95, 99, 104)
MISSING: Colour = (58, 58, 62)  # pixels nobody labelled or measured

MIN_STRIP_PX = 240
"""Legends and bars of narrower pictures would be cut."""

_FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
    os.path.join(os.environ.get("WINDIR", r"C:\Windows"), "Fonts"),
)
_OTHER_STYLES = re.compile("bold|italic|oblique|light|thin|black|condensed|mono|emoji|lastresort", re.IGNORECASE)
_log = logging.getLogger(__name__)


@cache
def font(size_px: int, file: str = "") -> ImageFont.FreeTypeFont:
    """A font file, or by default Pillow's own font (Aileron), with which pictures look alike on every machine."""
    if file:
        return ImageFont.truetype(file, size_px)
    default = ImageFont.load_default(size=size_px)
    if not isinstance(default, ImageFont.FreeTypeFont):
        raise ImportError(
            "Pillow was built without FreeType, so it has no scalable font; drawing needs one; "
            "install the wheel from PyPI: pip install --force-reinstall --only-binary :all: pillow"
        )
    return default


@cache
def _system_fonts() -> tuple[str, ...]:
    """Files of the installed fonts, regular styles only, sans serif first."""
    folders = [Path(folder).expanduser() for folder in _FONT_FOLDERS]
    files = {str(file) for folder in folders for file in folder.rglob("*.[to]t[fc]")}
    regular = [file for file in files if not _OTHER_STYLES.search(Path(file).name)]
    return tuple(sorted(regular, key=lambda file: ("sans" not in file.lower(), file)))


@cache
def _unshaped(file: str) -> ImageFont.FreeTypeFont:
    """A font that draws each sign alone, as Pillow's own does; `font_variant` would keep the shaping of its font."""
    return ImageFont.truetype(file, 20, layout_engine=ImageFont.Layout.BASIC) if file else font(20)


@cache
def _has_glyph(file: str, character: str) -> bool:
    if character.isspace() or unicodedata.category(character) == "Cf":  # Cf: joiners and the like have no picture
        return True
    try:
        # without shaping, which draws a dotted circle beside a lone mark, so that it looks as if there were a glyph
        face = _unshaped(file)
        return bytes(face.getmask(character)) != bytes(face.getmask("\U0010ffff"))  # a code point that no font has
    except OSError:  # Pillow cannot scale fonts of bitmaps
        return False


_MARK = "\u200e"
_RIGHT_TO_LEFT = re.compile("(?<=[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc])(?= +[0-9(])")
"""Where a name ends that is read from right to left; a left-to-right mark keeps the numbers behind it in order."""


class _Line(NamedTuple):
    """A text as it can be drawn."""

    text: str
    font_file: str  # "" = the default font
    complete: bool  # False: some characters are spelled in ASCII


@lru_cache(maxsize=8192)
def _line(text: str) -> _Line:
    """The text in the font that has most of its characters; the others are spelled, or they would all be one box."""
    text = unicodedata.normalize("NFC", text)
    text = "".join(" " if unicodedata.category(character) in ("Cc", "Zl", "Zp") else character for character in text)
    best, missing = "", {character for character in text if not _has_glyph("", character)}
    for file in _system_fonts() if missing else ():
        lacking = {character for character in set(text) if not _has_glyph(file, character)}
        if len(lacking) < len(missing):
            best, missing = file, lacking
        if not missing:
            break
    if not missing:
        return _Line(_RIGHT_TO_LEFT.sub(_MARK, text), best, complete=True)
    by_script: dict[str, list[str]] = {}
    for character in sorted(missing):
        by_script.setdefault(unicodedata.name(character, "unnamed").split()[0], []).append(character)
    for script, characters in by_script.items():
        _tell_missing(script, " ".join(characters), text)
    words = "".join(_spell(character) if character in missing else character for character in text)
    return _Line(" ".join(words.split()), best, complete=False)


_told_scripts: set[str] = set()


def _tell_missing(script: str, characters: str, text: str) -> None:
    """Once for each script: the first text shows which font to install."""
    if script in _told_scripts:
        return
    _told_scripts.add(script)
    _log.warning(
        "no installed font has the characters %s, as in %r; they are spelled in ASCII, and such classes carry their "
        "number; install a font for %s, e.g. Debian's fonts-noto or fonts-noto-cjk",
        characters, text, script,
    )  # fmt: skip


def _spell(character: str) -> str:
    """In ASCII: the letter without its accents, or the last word of the letter's name, or the code point."""
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    name = unicodedata.name(character, "")
    if plain:
        return plain
    word = name.split()[-1] if re.search("LETTER|SYLLABLE", name) else f"U+{ord(character):04X}"
    return f" {word if 'SMALL' not in name else word.lower()} "


def is_spelled(text: str) -> bool:
    """Whether no font has all characters of the text, so that `write` spells some of them."""
    return not _line(text).complete


def text_width(text: str, size_px: int) -> float:
    """How wide `write` draws the text, in px."""
    line = _line(text)
    return font(size_px, line.font_file).getlength(line.text)


def text_px(size: tuple[int, int]) -> int:
    """A letter height that reads well on a picture of size (H, W), also where a viewer shrinks it to a screen."""
    short, long = min(size), max(size)
    return max(12, min(round(max(short / 26, long / 50)), 36), round(short / 40))


def enlarge(image: NDArray, short_px: int = 320, *, smooth: bool = True) -> NDArray:
    """The image times the least whole factor that makes its short side `short_px` or more; maps with smooth=False.

    A long side of twice that is enough, or a strip of 1x4000 would fill the memory.
    """
    height, width = image.shape[:2]
    factor = min(-(-short_px // min(height, width)), -(-2 * short_px // max(height, width)))
    if factor <= 1:
        return image
    how = cv2.INTER_CUBIC if smooth else cv2.INTER_NEAREST
    return cv2.resize(image, (width * factor, height * factor), interpolation=how)


def above(picture: Picture, strip: Callable[[int], Picture]) -> Picture:
    """The picture, and below it a strip (a legend, a bar) of a given width, which narrow pictures are padded to."""
    picture = widened(picture)
    return np.concatenate([picture, strip(picture.shape[1])])


def widened(picture: Picture) -> Picture:
    """The picture, padded at the right where it is too narrow for texts."""
    missing = max(0, MIN_STRIP_PX - picture.shape[1])
    return np.pad(picture, ((0, 0), (0, missing), (0, 0)), constant_values=PAPER[0]) if missing else picture


def note(picture: Picture, text: str) -> Picture:
    """The picture with a line of text at its top left, or below it where the line would hide half of it."""
    size_px, picture = text_px(picture.shape[:2]), widened(picture)
    height, width = picture.shape[:2]
    line = round(size_px * 1.7)
    below = 2 * line > height
    if below:
        picture = np.pad(picture, ((0, line), (0, 0), (0, 0)), constant_values=PAPER[0])
    top = height if below else 0
    text = shorten(text, width - 2 * size_px, size_px)
    sheet = Image.fromarray(picture)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((0, top, text_width(text, size_px) + size_px, top + line), fill=PAPER)
    write(draw, (size_px / 2, top + size_px * 0.85), text, size_px, INK)
    return np.asarray(sheet)


def legible_on(colour: Colour) -> Colour:
    """Black or white, whichever is easier to read on `colour`."""
    red, green, blue = colour
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER


def hatch(size: tuple[int, int], period_px: int) -> NDArray[np.bool_]:
    """Diagonal lines, a quarter of the period wide, as a mask [H, W]."""
    rows, columns = np.indices(size, dtype=np.int32)
    return (rows + columns) % period_px < max(1, period_px // 4)


def hatched(image: Picture, where: NDArray[np.bool_]) -> Picture:
    """The image, darkened and hatched in `where`: "no label here"."""
    period = max(8, min(image.shape[:2]) // 40)
    dark = image // 4 + np.asarray(MISSING, np.uint8) // 2
    lines = hatch(image.shape[:2], period)[..., None]
    return np.where(where[..., None], np.where(lines, dark + 36, dark), image)


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size_px: int,
    colour: Colour,
    anchor: str = "lm",
    rim: Colour | None = None,
) -> None:
    """Anti-aliased text; `anchor` as in Pillow, "lm" = left end, middle of the line; rim = colour of an outline."""
    stroke, line = 0 if rim is None else max(1, size_px // 9), _line(text)
    face = font(size_px, line.font_file)
    # the text as a whole runs from left to right, whatever the script of its first word
    direction = "ltr" if face.layout_engine == ImageFont.Layout.RAQM else None
    draw.text(
        at, line.text, fill=colour, font=face, anchor=anchor, stroke_width=stroke, stroke_fill=rim, direction=direction
    )  # fmt: skip


def shorten(text: str, width_px: float, size_px: int) -> str:
    """The text, cut with an ellipsis where it would be wider than width_px."""
    if text_width(text, size_px) <= width_px:
        return text
    while text and text_width(text + "...", size_px) > width_px:
        text = text[:-1]
    return text.rstrip() + "..."


def legend(entries: Sequence[tuple[str, Colour | None]], width: int, size_px: int) -> Picture:
    """Colour swatches with names, flowing over as many lines as they need; colour None = the hatch of "no label"."""
    swatch, line, gap = round(size_px * 0.85), round(size_px * 1.7), round(size_px * 1.1)
    places: list[tuple[int, int, str]] = []
    x, row = size_px // 2, 0
    for name, _ in entries:
        name = shorten(name, width - 2 * size_px - swatch, size_px)
        needed = swatch + size_px // 2 + round(text_width(name, size_px))
        if x > size_px // 2 and x + needed > width - size_px // 2:
            x, row = size_px // 2, row + 1
        places.append((x, row, name))
        x += needed + gap

    height = (row + 1) * line + size_px // 2 if entries else 0
    picture = np.full((height, width, 3), PAPER, np.uint8)
    for (x, row, _), (_, colour) in zip(places, entries, strict=True):
        y = size_px // 4 + row * line + (line - swatch) // 2
        block = picture[y : y + swatch, x : x + swatch]
        block[:] = FAINT if colour is None else np.asarray(colour) // 2 + 30  # the rim, so that pale colours show
        inner = block[1:-1, 1:-1]
        inner[:] = MISSING if colour is None else colour
        if colour is None:
            inner[hatch(inner.shape[:2], 6)] = (150, 150, 150)
    canvas = Image.fromarray(picture)
    for x, row, name in places:
        middle = size_px // 4 + (row + 0.5) * line
        write(ImageDraw.Draw(canvas), (x + swatch + size_px // 2, middle), name, size_px, INK)
    return np.asarray(canvas)


def colour_bar(ramp: Picture, ticks: Sequence[tuple[float, str]], note: str, width: int, size_px: int) -> Picture:
    """A horizontal bar of `ramp` [1, n, 3] with ticks (position 0..1, text) below; `note` says what MISSING means."""
    margin, bar = size_px, round(size_px * 0.9)
    note_width = round(text_width(note, size_px)) + 3 * size_px if note else 0
    length = width - 2 * margin - note_width
    picture = np.full((round(size_px * 3.2), width, 3), PAPER, np.uint8)
    top = size_px // 2 + 2
    picture[top : top + bar, margin : margin + length] = cv2.resize(ramp, (length, bar), interpolation=cv2.INTER_LINEAR)

    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    right_end = -np.inf
    for position, text in ticks:
        x = margin + position * (length - 1)
        half = text_width(text, size_px) / 2
        middle = float(np.clip(x, half + 2, width - half - 2))
        if middle - half < right_end + size_px * 0.4:
            continue  # the text would touch its neighbour's
        draw.line([(x, top + bar), (x, top + bar + size_px // 4)], fill=INK, width=max(1, size_px // 14))
        write(draw, (middle, top + bar + size_px * 0.95), text, size_px, INK, "mm")
        right_end = middle + half
    if note:
        write(draw, (width - margin, top + bar / 2), note, size_px, INK, "rm")
        left = margin + length + size_px * 1.5
        draw.rectangle((left, top, left + bar, top + bar - 1), fill=MISSING)
    return np.asarray(canvas)


class Bar(NamedTuple):
    """One line of a bar chart."""

    name: str
    value: float
    text: str  # behind the bar
    colour: Colour = (96, 125, 175)


def bar_chart(title: str, bars: Sequence[Bar], width: int, size_px: int = 15) -> Picture:
    """A title and a line for each bar, with its name to the left."""
    line = round(size_px * 1.4)
    left = min(width * 0.4, max((text_width(bar.name, size_px) for bar in bars), default=0)) + size_px
    texts = max((text_width(bar.text, size_px) for bar in bars), default=0) + size_px
    longest = max((bar.value for bar in bars), default=0) or 1
    sheet = Image.new("RGB", (width, round((len(bars) + 1.6) * line)), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (0, line / 2), shorten(title, width, size_px), size_px, INK)
    for number, bar in enumerate(bars):
        top = round((number + 1.2) * line)
        middle, end = top + line / 2, left + max(2, (width - left - texts) * bar.value / longest)
        name = shorten(bar.name, left - size_px, size_px)
        write(draw, (left - size_px / 2, middle), name, size_px, INK, "rm")
        draw.rectangle((left, top + 3, end, top + line - 4), fill=bar.colour, outline=FAINT)
        write(draw, (end + size_px / 2, middle), bar.text, size_px, FAINT)
    return np.asarray(sheet)


def place_tag(
    box: NDArray[np.float32],
    tag: tuple[float, float],
    size: tuple[int, int],
    taken: Sequence[NDArray[np.float32]],
    boxes: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Where a tag (w, h) hides least: inside the picture, at a corner of its box, off other tags and small boxes."""
    w, h = tag
    x1, y1, x2, y2 = box
    corners = [(x, y) for y in (y1 - h, y2, y1, y2 - h) for x in (x1, x2 - w)]
    left = np.clip([x for x, _ in corners], 0, max(0, size[1] - w - 1))
    top = np.clip([y for _, y in corners], 0, max(0, size[0] - h - 1))
    places = np.stack([left, top, left + w, top + h], axis=1).astype(np.float32)

    cost = 0.02 * np.arange(len(places)) + _covered(places, boxes).sum(axis=1)
    if taken:
        cost += 3 * _covered(places, np.stack(taken)).sum(axis=1)
    return places[int(np.argmin(cost))]


def _covered(places: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """The share of each box that each place hides, [places, boxes]."""
    low = np.maximum(places[:, None, :2], boxes[None, :, :2])
    high = np.minimum(places[:, None, 2:], boxes[None, :, 2:])
    area = np.maximum((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), 1)
    return (high - low).clip(0).prod(axis=2) / area
