"""Label maps: pixel values to class ids, where an undeclared value is an error; and the outline of each instance."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from visionmtl.structures import IGNORE

_UNKNOWN = -1


def class_file(file: Path) -> tuple[tuple[str, ...], dict[int, str] | None]:
    """Names, and the class of each pixel value where the file gives it: a YAML or JSON list, or mapping value: name."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        content, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)  # JSON is YAML
    # ValueError: no UTF-8, or a date that does not exist; RecursionError: brackets in brackets
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"{file} cannot be read: {error}; a YAML or JSON file with class names is needed; write it, or correct the "
            "path"
        ) from error
    if isinstance(content, dict) and isinstance(node, yaml.MappingNode):
        if len(node.value) > len(content):  # YAML would take the last
            raise ValueError(f"{file} names a pixel value twice; each has one class; correct it")
        values = {int(key): name for key, name in content.items() if _is_value(key) and isinstance(name, str)}
        if content and len(values) == len(content):
            return tuple(dict.fromkeys(values[value] for value in sorted(values))), values
    if isinstance(content, list) and content and all(isinstance(name, str) for name in content):
        return tuple(content), None
    raise ValueError(
        f"{file} is no list of class names, and no mapping from pixel values 0 to 255 to names; one is needed; write "
        "for instance [floor, shelf] or {7: floor, 8: shelf}, with names in quotes where they look like numbers"
    )


def _is_value(key: object) -> bool:
    """Whether a key is a pixel value of 8 bits, as a number or (in JSON) as text."""
    digits = str(key) if type(key) is int or isinstance(key, str) else ""
    return digits.isascii() and digits.isdigit() and len(digits) < 4 and int(digits) <= 255


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
    if values.ndim != 2 or values.dtype != np.uint8:
        raise ValueError(
            f"{file} is {values.dtype} with {values.shape[2] if values.ndim == 3 else 1} channel(s); labels are 8-bit "
            "grey PNG, the value is the class; of a palette PNG write the indices, "
            "PIL.Image.fromarray(numpy.asarray(PIL.Image.open(file))); map 16-bit values to 0 to 255 first"
        )
    classes = table[values]
    if classes.min() < 0:
        here = undeclared_values(values, table)
        everywhere = sorted(here.union(undeclared_elsewhere))
        others = f"; undeclared in all files are {everywhere}" if len(everywhere) > len(here) else ""
        raise ValueError(
            f"{file} holds {sorted(here)}, which are neither classes nor ignored{others}; correct the files, or name "
            "these values in `values` or `ignore`"
        )
    return classes.astype(np.uint8)


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
