"""Label maps: pixel values to class ids, where an undeclared value is an error; and the outline of each instance."""

import csv
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visionmtl.config.suggest import did_you_mean
from visionmtl.config.text_files import read_yaml
from visionmtl.io.objects import ImageObjects, LabelledObject
from visionmtl.io.paths import composed, read_lines
from visionmtl.structures import IGNORE, has_controls

Color = tuple[int, int, int]
"""RGB, 0 to 255."""

_UNKNOWN = -1
_NUMBERS = r"(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})"
_CVAT = re.compile(
    r"([^:]*[^:\s])\s*:\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*(?::.*)?"
)  # name:r,g,b:parts:actions
_COLOR_FIRST = re.compile(rf"{_NUMBERS}[\s,;:]+(.*\S)")
_COLOR_LAST = re.compile(rf"(.*?\S)\s*[,;:\t ]\s*{_NUMBERS}(?:\s*[:;,].*)?")


def class_file(file: Path) -> tuple[tuple[str, ...], dict[int, str] | None]:
    """Names, and the class of each pixel value where the file gives it: a YAML or JSON list, or mapping value: name."""
    content, _ = read_yaml(file, "a YAML or JSON file with class names")  # JSON is YAML
    if isinstance(content, dict):
        named = {key: name for key, name in content.items() if pixel_range(key) and _is_name(name)}
        if content and len(named) == len(content):
            values = by_value(named, str(file))
            return tuple(dict.fromkeys(values[value] for value in sorted(values))), values
    if isinstance(content, list) and content and all(map(_is_name, content)):
        return tuple(map(composed, content)), None
    raise ValueError(
        f"{file} is no list of class names, and no mapping from pixel values 0 to 255 to names; one is needed; write "
        "for instance [floor, shelf] or {7: floor, 8: shelf}, with names in quotes where they look like numbers, and "
        "without control characters"
    )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and not has_controls(value)


def pixel_range(key: object, highest: int = 255) -> range | None:
    """The pixel values that 7, "7" or "1-254" stands for, the last included; None for what is no such text."""
    ends = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(key)) if type(key) is int or isinstance(key, str) else None
    if ends is None:
        return None
    first, last = int(ends[1]), int(ends[2] or ends[1])
    return range(first, last + 1) if first <= last <= highest else None


def by_value(named: Mapping[int | str, str], where: str, highest: int = 255) -> dict[int, str]:
    """By pixel value its name, ranges such as "1-254" written out. Raises ValueError for a value with two names."""
    values: dict[int, str] = {}
    for key, name in named.items():
        span = pixel_range(key, highest)
        if span is None:
            raise ValueError(
                f"{where}: {key!r} is no pixel value; whole numbers of 0 to {highest} and ranges such as 1-{highest} "
                "are; correct it"
            )
        for value in span:
            if value in values:
                raise ValueError(
                    f"{where}: pixel value {value} is {values[value]!r} and, by {key!r}, {name!r} as well; each value "
                    "has one class; make the ranges end before the next begins"
                )
            values[value] = composed(name)
    return values


def label_table(classes: Sequence[str], values: Mapping[int, str] | None, ignore: Iterable[int]) -> NDArray[np.int16]:
    """int16 [256]: class id by pixel value, IGNORE for what is to be ignored, negative for what is not known.

    values: pixel value to name; None = a class's position. Raises ValueError for what contradicts itself.
    """
    chosen = dict(enumerate(classes)) if values is None else dict(values)
    ignored = set(ignore)
    strange = sorted(set(chosen.values()) ^ set(classes))
    both = sorted(ignored & set(chosen))
    wrong = ""
    if len(set(classes)) < len(classes):
        wrong = f"classes has {next(name for name in classes if classes.count(name) > 1)!r} twice"
    elif strange:
        wrong = f"classes and values do not name the same: {', '.join(strange)}"
    elif both:
        wrong = f"pixel value {both[0]} is class {chosen[both[0]]!r} and ignored as well"
    elif not 0 <= min(chosen) <= max(chosen) <= 255:
        wrong = f"pixel value {max(chosen) if max(chosen) > 255 else min(chosen)} does not occur in 8 bits"
    if wrong:
        raise ValueError(
            f"{wrong}; every class needs its own name and at least one pixel value 0 to 255 that is not ignored; "
            "correct `classes`, `values` or `ignore`"
        )
    table = np.full(256, _UNKNOWN, np.int16)
    table[list(ignored)] = IGNORE
    table[list(chosen)] = [classes.index(name) for name in chosen.values()]
    return table


def undeclared_values(values: NDArray, table: NDArray[np.int16]) -> set[int]:
    """The pixel values that `label_table` does not know; none of a picture that holds no labels."""
    if values.ndim != 2 or values.dtype != np.uint8:
        return set()
    return set(np.flatnonzero((np.bincount(values.ravel(), minlength=256) > 0) & (table < 0)).tolist())


def to_classes(
    values: NDArray, table: NDArray[np.int16], file: Path, undeclared_elsewhere: Collection[int] = ()
) -> NDArray[np.uint8]:
    """Class ids [H, W] by `label_table`; `file`, which the values are from, is named where they are no labels.

    undeclared_elsewhere: what other files of the data set hold, to be told with what this one does
    """
    if values.ndim == 3 and values.dtype == np.uint8:
        seen = [tuple(color) for color in np.unique(values[..., 2::-1].reshape(-1, 3), axis=0)[:9].tolist()]
        grey = all(r == g == b for r, g, b in seen)
        raise ValueError(
            f"{file} is uint8 with {values.shape[2]} channels, its colours (RGB) are {_shown(seen)}; without `colors`, "
            "labels are 8-bit grey or palette PNGs, whose value or index is the class; "
            + ("write one of the equal channels alone" if grey else "set colors: {NAME: [r, g, b], ...}, or to a file")
        )
    if values.ndim != 2 or values.dtype != np.uint8:
        raise ValueError(
            f"{file} is {values.dtype} with {values.shape[2] if values.ndim == 3 else 1} channel(s); labels are 8-bit "
            "grey or palette PNGs, whose value or index is the class; map 16-bit values to 0 to 255 first, or, if they "
            "count objects, read them as boxes (format: instances)"
        )
    classes = table[values]
    if classes.min() < 0:
        here = undeclared_values(values, table)
        everywhere = sorted(here.union(undeclared_elsewhere))
        others = f"; undeclared in all files are {everywhere}" if len(everywhere) > len(here) else ""
        raise ValueError(
            f"{file} holds {sorted(here)}, which are neither classes nor ignored{others}; allowed are the values that "
            "`classes`, `values` and `ignore` declare; correct the files, or name these values there"
        )
    return classes.astype(np.uint8)


class Colors(NamedTuple):
    """Which class a colour of label pictures means."""

    codes: NDArray[np.int32]  # [N] ascending, r * 65536 + g * 256 + b
    ids: NDArray[np.uint8]  # [N] class ids, IGNORE for no class
    shown: tuple[Color, ...]  # of each class, for pictures


def color_file(file: Path) -> dict[str, tuple[Color, ...]]:
    """Colours by class name: YAML or JSON {name: [r, g, b]}; or text with a line a class.

    Lines are `r g b name` (CamVid's label_colors.txt), `name,r,g,b` (class_dict.csv) or `name:r,g,b::` (CVAT's
    labelmap.txt); a first line without numbers is a heading, # begins a comment.
    """
    if file.suffix.lower() in (".yaml", ".yml", ".json"):
        content, _ = read_yaml(file, "a mapping NAME: [r, g, b]")
        if isinstance(content, dict) and content and all(_colors_of(value) for value in content.values()):
            return {composed(str(name)): _colors_of(value) for name, value in content.items()}
        raise ValueError(
            f"{file} holds no mapping from names to colours; NAME: [r, g, b], 0 to 255, is needed; write it"
        )
    colors: dict[str, tuple[Color, ...]] = {}
    for number, line in enumerate(read_lines(file), start=1):
        text = line.partition("#")[0].strip()
        if not text or (not colors and not re.search(r"\d", text)):
            continue
        name, rgb = _named_color(text)
        color = tuple(map(int, rgb))
        if not name or max(color) > 255:
            raise ValueError(
                f"{file}: line {number} is {line[:80]!r}; `r g b name`, `name,r,g,b` or `name:r,g,b` is needed, with "
                "three numbers 0 to 255 and no further one; correct it"
            )
        colors[name] = (*colors.get(name, ()), color)  # type: ignore[arg-type]
    if not colors:
        raise ValueError(f"{file} names no colour; a line `r g b name` a class is needed; write them")
    return colors


_Named = tuple[str, Sequence[str]]
"""A name and its three numbers as text."""


def _named_color(text: str) -> _Named:
    """The name and the three numbers of a line; "" and nothing where it cannot be told which they are."""
    if of_cvat := _CVAT.fullmatch(text):
        found: _Named = of_cvat[1], of_cvat.groups()[1:4]
    else:
        found = _by_commas(text) or _numbers_first(text) or _name_first(text) or ("", ())
    return composed(found[0].strip()), found[1]


def _by_commas(text: str) -> _Named | None:
    """`name,r,g,b` or `r,g,b,name`: the name may hold anything, and text may follow; "" with a fourth number."""
    fields = [field.strip() for field in next(csv.reader([text], skipinitialspace=True))]
    numbers = [at for at, field in enumerate(fields) if re.fullmatch(r"\d{1,3}", field)]
    if len(numbers) < 3:
        return None
    names = [field for field in fields[: numbers[0]] or fields[numbers[-1] + 1 :] if field]
    if len(numbers) > 3 or numbers[2] - numbers[0] != 2 or len(names) != 1:
        return "", ()
    return names[0], [fields[at] for at in numbers]


def _numbers_first(text: str) -> _Named | None:
    """`r g b name`; "" where the name begins with a number, which may be one of the colour's."""
    match = _COLOR_FIRST.fullmatch(text)
    if match is None:
        return None
    return ("", ()) if re.match(r"\d+([\s,;]|$)", match[4]) else (match[4], match.groups()[:3])


def _name_first(text: str) -> _Named | None:
    """`name r g b`; "" where the name ends with a number."""
    match = _COLOR_LAST.fullmatch(text)
    if match is None:
        return None
    return ("", ()) if re.search(r"(^|[\s,;])\d+$", match[1]) else (match[1], match.groups()[1:4])


def color_table(colors: Mapping[str, Sequence[Color]], classes: Sequence[str], ignore: Iterable[Color]) -> Colors:
    """What `colors_to_classes` needs. colors: by name; those of names that are no class, and `ignore`, are IGNORE.

    Raises ValueError for a class without a colour and for a colour with two meanings.
    """
    if lacking := [name for name in classes if name not in colors]:
        raise ValueError(
            f"classes names {lacking[0]!r}{did_you_mean(lacking[0], colors)}, which has no colour; colours are given "
            f"for {', '.join(colors)}; add one to `colors`, or correct the name"
        )
    meaning: dict[Color, str | None] = dict.fromkeys(map(_color, ignore))
    for name, of_name in colors.items():
        for color in map(_color, of_name):
            if meaning.get(color, name) != name or (color in meaning and meaning[color] is None):
                raise ValueError(
                    f"colour {list(color)} is {meaning[color] or 'ignored'} and {name} as well; each colour has one "
                    "meaning; correct `colors` or `ignore_colors`"
                )
            meaning[color] = name
    ordered = sorted(meaning)
    numbers = [classes.index(name) if name in classes else IGNORE for name in (meaning[color] for color in ordered)]
    codes = np.array([(r << 16) + (g << 8) + b for r, g, b in ordered], np.int32)
    return Colors(codes, np.array(numbers, np.uint8), tuple(_color(colors[name][0]) for name in classes))


def colors_to_classes(pixels: NDArray, table: Colors, file: Path) -> NDArray[np.uint8]:
    """Class ids [H, W] of a label picture, uint8 [H, W, 3 or 4] BGR as `read_png` gives it."""
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"{file} is {pixels.dtype} {list(pixels.shape)}; with `colors`, labels are 8-bit RGB PNGs; drop `colors` "
            "and set `classes` and `values`, if its values are the classes"
        )
    if pixels.shape[2] == 4 and (pixels[..., 3] < 255).any():
        raise ValueError(f"{file} is transparent in places; label colours are opaque; write it anew without alpha")
    wide = pixels.astype(np.int32)
    codes = (wide[..., 2] << 16) + (wide[..., 1] << 8) + wide[..., 0]
    at = np.searchsorted(table.codes, codes).clip(max=len(table.codes) - 1)
    unknown = table.codes[at] != codes
    if unknown.any():
        strange = np.unique(codes[unknown]).tolist()
        seen = [(code >> 16, code >> 8 & 255, code & 255) for code in strange]
        raise ValueError(
            f"{file} holds {len(seen)} colours (RGB) that mean nothing, {_shown(seen)}, in {unknown.mean():.2%} of its "
            "pixels; every colour needs a class; name them in `colors` or `ignore_colors` (mixed colours along edges "
            "come from smoothing or JPEG: write the labels anew without it)"
        )
    return table.ids[at]


def _shown(colors: Sequence[Color]) -> str:
    return " ".join(str(list(color)) for color in colors[:8]) + (" ..." if len(colors) > 8 else "")


def _color(value: Sequence[Any]) -> Color:
    r, g, b = value
    return r, g, b


def _colors_of(value: object) -> tuple[Color, ...]:
    """One colour [r, g, b], or several; () for anything else."""
    several: list[Any] = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    sound = all(
        isinstance(one, list) and len(one) == 3 and all(type(x) is int and 0 <= x <= 255 for x in one)
        for one in several
    )
    return tuple(_color(one) for one in several) if sound else ()


def instance_objects(ids: NDArray, names: Mapping[int, str], ignore: Collection[int], file: Path) -> ImageObjects:
    """One object for each id of an instance map, whose box is tight around its pixels, the last one included.

    ids: uint8 or uint16 [H, W]; names: by id the class; ignore: ids of no object, such as 0 for the background
    """
    if ids.ndim != 2:
        raise ValueError(
            f"{file} has {ids.shape[2]} channels; an instance map has one number a pixel, that of its object; write it "
            "as 8-bit or 16-bit grey PNG"
        )
    shapes = outlines(ids)
    objects = []
    for number, xyxy, area in zip(shapes.ids.tolist(), shapes.xyxy.tolist(), shapes.area.tolist(), strict=True):
        if number in ignore:
            continue
        if number not in names:
            raise ValueError(
                f"{file} holds the id {number}, for which no class is declared; every id is that of an object or "
                "ignored; name it in `boxes.values` or `boxes.ignore`"
            )
        objects.append(LabelledObject(names[number], tuple(xyxy), area))
    return ImageObjects((ids.shape[0], ids.shape[1]), objects)


class Outlines(NamedTuple):
    """Everything that shows in a map, in ascending order of its id."""

    ids: NDArray  # [N] of the map's dtype
    xyxy: NDArray[np.float32]  # [N, 4] pixels, tight; x2 and y2 exclusive: the last pixel lies inside
    area: NDArray[np.float32]  # [N] pixels of that id


def outlines(ids: NDArray, keep: NDArray[np.bool_] | None = None) -> Outlines:
    """One outline for each id that occurs, whether its pixels are connected or not.

    ids: integers [H, W]
    keep: bool, indexed by id: which ids to outline; None = all

    Works on runs of equal pixels, of which a street scene has a hundredth of its pixels: no mask for each id is made.
    """
    height, width = ids.shape
    begins = np.ones((height, width), np.bool_)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=begins[:, 1:])
    start = np.flatnonzero(begins)
    length = np.diff(start, append=height * width)
    id_of_run = ids.ravel()[start]
    if keep is not None:
        kept = keep[id_of_run]
        start, length, id_of_run = start[kept], length[kept], id_of_run[kept]
    if not len(start):
        return Outlines(id_of_run, np.zeros((0, 4), np.float32), np.zeros(0, np.float32))

    order = np.argsort(id_of_run, kind="stable")
    start, length, id_of_run = start[order], length[order], id_of_run[order]
    first = np.flatnonzero(np.concatenate([[True], id_of_run[1:] != id_of_run[:-1]]))  # run of each id
    y, x = np.divmod(start, width)
    corners = [
        np.minimum.reduceat(x, first),
        np.minimum.reduceat(y, first),
        np.maximum.reduceat(x + length, first),
        np.maximum.reduceat(y, first) + 1,
    ]
    area = np.add.reduceat(length, first)
    return Outlines(id_of_run[first], np.stack(corners, axis=1).astype(np.float32), area.astype(np.float32))
