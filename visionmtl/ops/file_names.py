"""File names of a data set: which image a name means, which files are there; none leads out of its folder."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ABSENT, AMBIGUOUS = -1, -2


class Names:
    """Images by name: as listed, without the common folder, or by the bare file name; with or without its ending."""

    def __init__(self, images: Sequence[str], folder: str = "") -> None:
        """images: paths with /; folder: what they have in common and others leave out, "" or ending with /."""
        self._index: dict[str, int] = {}
        forms = (
            [image.rpartition("/")[2] for image in images],
            [image.removeprefix(folder) for image in images],
            list(images),
        )
        for form in forms:  # a longer form that equals another image's shorter one takes its place
            for keys in ([without_ending(name) for name in form], form):
                self._index.update(_positions(keys))

    def find(self, name: str) -> int:
        """Position of the image, ABSENT or AMBIGUOUS."""
        return self._index.get(name, ABSENT)


def read_list(file: Path, images: Sequence[str], folder: str) -> list[int]:
    """Positions in `images` of those that a text file names, one a line. Raises ValueError for what cannot be meant."""
    if not file.is_file():
        raise ValueError(f"found no {file}; it names an image a line; write it, or read all images")
    lines = read_lines(file)
    wanted = [line.removeprefix("./") for line in lines if line]  # `find .` writes ./
    if not wanted:
        raise ValueError(f"{file} is empty; it names an image a line, at least one; write it, or read all images")
    names = Names(images, folder)
    found = [names.find(name) for name in wanted]
    wrong = [name for name, position in zip(wanted, found, strict=True) if position < 0 or not stays_inside(name)]
    if wrong:
        known = names.find(wrong[0])
        why = "means several images" if known == AMBIGUOUS else "is none of the images" if known < 0 else "has '..'"
        raise ValueError(
            f"{file}: {len(wrong)} of {len(wanted)} lines cannot be used, the first, {wrong[0]!r}, {why}; needed are "
            f"paths of images with / and without '..', such as {images[0]}; correct the list or the images to read"
        )
    check_distinct([images[position] for position in found], str(file), "list it once")
    return found


def read_lines(file: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark, stripped; empty ones too."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}; a text file in UTF-8 is needed; write it again") from error


def check_distinct(names: Sequence[str], what: str, advice: str) -> None:
    """Raises ValueError for the first name that occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what}: {name!r} stands for two images or twice; each image needs its own; {advice}")
        seen.add(name)


def _positions(keys: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for position, key in enumerate(keys):
        found[key] = AMBIGUOUS if key in found else position
    return found


def without_ending(name: str) -> str:
    """ "a/b.c.png" gives "a/b.c"."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + (last.rpartition(".")[0] or last)


def fixed_part(pattern: str) -> str:
    """The folders of a glob pattern before its first wildcard: "images/*/a*.jpg" gives "images/"."""
    folders = pattern.split("/")[:-1]
    wild = next((i for i, folder in enumerate(folders) if set(folder) & set("*?[")), len(folders))
    return "".join(f"{folder}/" for folder in folders[:wild])


def is_unicode(text: str) -> bool:
    """False for halves of a character: JSON can hold them, and so do names of files that are not in UTF-8."""
    return text.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in text)


def any_case(pattern: str) -> str:
    """A glob pattern whose ending may have letters of either case: "a/*.jpg" gives "a/*.[jJ][pP][gG]".

    The pattern itself where the ending has wildcards of its own.
    """
    start, dot, ending = pattern.rpartition(".")
    if not ending.isalnum():
        return pattern
    return start + dot + "".join(f"[{sign.lower()}{sign.upper()}]" if sign.isalpha() else sign for sign in ending)


def stays_inside(name: str) -> bool:
    """Whether a relative path with / names something inside its folder, in one way only: no `..`, `.` or `//`."""
    if any(sign in name for sign in "\\:\0") or not is_unicode(name):
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))


def present(root: Path, names: Sequence[str]) -> NDArray[np.bool_]:
    """bool [N]: which files exist; each folder is listed once, since a network disk takes long to ask file by file."""
    listings: dict[str, set[str]] = {}
    there = np.zeros(len(names), np.bool_)
    for i, name in enumerate(names):
        folder, _, last = name.rpartition("/")
        if folder not in listings:
            # os.path: for a name that is too long for any disk, pathlib raises
            listings[folder] = set(os.listdir(root / folder)) if os.path.isdir(root / folder) else set()
        there[i] = last in listings[folder]
    return there
