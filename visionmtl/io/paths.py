"""File names: which image a name means, which files exist, and the paths that settings may hold.

Names that differ only in Unicode form (macOS writes é as e and an accent, most others as one character) look the same
and mean the same file.
"""

import functools
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from visionmtl.config.paths import regular_file as regular_file  # readers of files look for it here
from visionmtl.config.text_files import read_text

ABSENT, AMBIGUOUS = -1, -2


def is_hidden(name: str) -> bool:
    """Whether listings leave this file or folder out: macOS writes `._NAME` beside NAME, and __MACOSX/."""
    return name.startswith(".") or name == "__MACOSX"


def composed(name: str) -> str:
    """The name in Unicode's composed form (NFC), in which names are compared."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class Names:
    """Images by name: as listed, without the common folder, or by the bare file name; with or without its ending."""

    def __init__(self, images: Sequence[str], folder: str = "") -> None:
        """images: paths with /; folder: what they have in common and others leave out, "" or ending with /."""
        self._index: dict[str, int] = {}
        self._composed: dict[str, int] = {}
        forms = (
            [image.rpartition("/")[2] for image in images],
            [image.removeprefix(folder) for image in images],
            list(images),
        )
        for form in forms:  # a longer form that equals another image's shorter one takes its place
            for keys in ([without_ending(name) for name in form], form):
                self._index.update(_positions(keys))
                self._composed.update(_positions(map(composed, keys)))

    def find(self, name: str) -> int:
        """Position of the image, ABSENT or AMBIGUOUS; the very name goes before one in another Unicode form."""
        return self._index.get(name, self._composed.get(composed(name), ABSENT))


class Files:
    """Files below a folder, found also where the disk has their name, or a folder's, in another Unicode form."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._on_disk: dict[str, str] = {}  # by name, for those that the disk has in another form
        self._listings: dict[str, dict[str, str]] = {}  # of each folder: names as on disk, by every form

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_listings": {}}  # large, and of no use to worker processes

    def path(self, name: str) -> Path:
        """Where the file of this name lies, after `present` was asked about it."""
        return self.root / self._on_disk.get(name, name)

    def present(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """bool [N]: which files exist; each folder is listed once, since asking a network disk for each is slow."""
        return np.array([self._find(name) is not None for name in names], np.bool_)

    def require(self, names: Sequence[str], listed: str, advice: str) -> None:
        """Raises ValueError where a file that `listed` names does not exist."""
        missing = np.flatnonzero(~self.present(names))
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {len(names)} files listed in {listed} are missing, the first is "
                f"{self.root / names[missing[0]]}; every entry needs its file; {advice}"
            )

    def _find(self, name: str) -> str | None:
        """The name as on disk; None where there is none. Raises ValueError for one that leads out of the root."""
        if leads_out(name):
            raise ValueError(
                f"{name!r} leads out of {self.root}; files of a data set have relative names without '..'; correct the "
                "name where it is written"
            )
        folder, slash, last = name.rpartition("/")
        if folder not in self._listings:
            real_folder = self._find(folder) if folder else ""
            # os.path: for a name that is too long for any disk, pathlib raises
            is_folder = real_folder is not None and os.path.isdir(self.root / real_folder)
            listed = os.listdir(self.root / str(real_folder)) if is_folder else []
            prefix = f"{real_folder}{slash}"
            by_form = {composed(name): prefix + name for name in listed}
            self._listings[folder] = by_form | {name: prefix + name for name in listed}
        listing = self._listings[folder]
        on_disk = listing.get(last) or listing.get(composed(last))
        if on_disk is not None and on_disk != name:
            self._on_disk[name] = on_disk
        return on_disk


def read_list(file: Path, images: Sequence[str], folder: str) -> list[int]:
    """Positions in `images` of those that a text file names, one a line. Raises ValueError for what cannot be meant."""
    if not file.is_file():
        raise ValueError(f"found no {file}; it names an image a line; write it, or read all images")
    listed = [line.removeprefix("./") for line in read_lines(file) if line]  # `find .` writes ./
    if not listed:
        raise ValueError(f"{file} is empty; it names an image a line, at least one; write it, or read all images")
    names = Names(images, folder)
    positions = [names.find(name) for name in listed]
    wrong = [name for name, position in zip(listed, positions, strict=True) if position < 0 or not stays_inside(name)]
    if wrong:
        position = names.find(wrong[0])
        columns = re.split(r"[\s,;]+", wrong[0])
        if len(columns) > 1 and names.find(columns[0]) >= 0:
            raise ValueError(
                f"{file}: {len(wrong)} of {len(listed)} lines have {len(columns)} columns, the first is {wrong[0]!r}, "
                "as lists of image and label of other tools have; an image a line is needed, without its label; write "
                "the first column alone (cut -d' ' -f1), and give classes of images in `image_labels`"
            )
        why = "means several images" if position == AMBIGUOUS else "is none of the images"
        raise ValueError(
            f"{file}: {len(wrong)} of {len(listed)} lines cannot be used, the first, {wrong[0]!r}, "
            f"{why if position < 0 else 'leads elsewhere'}; needed are paths of images with / and without '..', such "
            f"as {images[0]}; correct the list or the images to read"
        )
    check_distinct([images[position] for position in positions], str(file), "list it once")
    return positions


def read_lines(file: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark, stripped; empty ones too."""
    return [line.strip() for line in read_text(file).splitlines()]


def read_names(file: Path) -> tuple[str, ...]:
    """The names in a text file, one a line, where the number of a line is that of its name."""
    lines = read_lines(file)
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise ValueError(
            f"{file}: line {lines.index('') + 1} is empty; each line is the name of a class, whose number is that of "
            "its line; remove the empty line, or name that class"
        )
    return tuple(map(composed, lines))


def check_distinct(names: Sequence[str], what: str, advice: str) -> None:
    """Raises ValueError for the first name that occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what}: {name!r} stands for two images or twice; each image needs its own; {advice}")
        seen.add(name)


def _positions(keys: Iterable[str]) -> dict[str, int]:
    positions: dict[str, int] = {}
    for position, key in enumerate(keys):
        positions[key] = AMBIGUOUS if key in positions else position
    return positions


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


def image_glob(pattern: str) -> str:
    """The glob pattern of a path with {folder} and {stem}: one folder or more, and a part of the file name."""
    return pattern.replace("{folder}", "*/**").replace("{stem}", "*")


def name_parts(pattern: str, image: str) -> dict[str, str]:
    """What {folder} and {stem} of the pattern stand for in the path of an image that its `image_glob` matches."""
    match = _name_expression(pattern).fullmatch(image)
    return match.groupdict() if match else {}


@functools.cache
def _name_expression(pattern: str) -> re.Pattern[str]:
    expression, seen = "", set()
    for piece in re.split(r"({folder}|{stem}|\*\*/|\*|\?|\[[^]]*\])", pattern):
        if piece in ("{folder}", "{stem}"):
            name = piece[1:-1]
            expression += f"(?P={name})" if name in seen else f"(?P<{name}>{'.+' if name == 'folder' else '[^/]*'})"
            seen.add(name)
        else:
            wild = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
            expression += wild.get(piece) or (
                piece.replace("[[", r"[\[") if piece.startswith("[") else re.escape(piece)
            )
    return re.compile(expression)


def any_case(pattern: str) -> str:
    """A glob pattern whose ending may have letters of either case: "a/*.jpg" gives "a/*.[jJ][pP][gG]".

    The pattern itself where the ending has wildcards of its own.
    """
    start, dot, ending = pattern.rpartition(".")
    if not ending.isalnum():
        return pattern
    return start + dot + "".join(f"[{sign.lower()}{sign.upper()}]" if sign.isalpha() else sign for sign in ending)


def leads_out(name: str) -> bool:
    """Whether a name from a file is absolute or has `..`: it could mean any file of the machine.

    Links below the root may lead anywhere: whoever made the folder put them there. See docs/decisions.md.
    """
    return name.startswith("/") or ".." in name.split("/") or "\0" in name


def stays_inside(name: str) -> bool:
    """Whether a relative path with / names something inside its folder, in one way only: no `..`, `.` or `//`."""
    # on Windows C:name is relative to the folder of a drive, and name:stream another stream of a file
    leaves = ":" in name and (os.name == "nt" or name[1:3] in (":", ":/"))
    if "\\" in name or "\0" in name or leaves or not is_unicode(name):
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))


def _relative(text: str, words: Sequence[str]) -> str:
    unknown = set(re.findall(r"{([^}]*)}", text)).difference(words)
    if not unknown and stays_inside(text):
        return text
    what = f"has {{{'}, {'.join(sorted(unknown))}}}" if unknown else "leads out of `root`"
    allowed = " and ".join(f"{{{word}}}" for word in words).replace(" and ", ", ", max(len(words) - 2, 0))
    reason = ", since it is one file for all images" if unknown & {"stem", "path"} else ""
    raise _path_error(
        f"path {text!r} {what}; allowed are paths relative to `root`, with / and without '..', and {allowed}{reason}; "
        "correct it, or set `root` higher up"
    )


def _per_image(text: str) -> str:
    if not any(word in text for word in ("{stem}", "{path}", "{folder}")):
        raise _path_error(
            f"path {text!r} is one file for all images; write {{stem}} where names differ, {{folder}} where folders do"
        )
    return text


def _path_error(text: str) -> PydanticCustomError:
    return PydanticCustomError("path", "{text}", {"text": text})


RelativePath = Annotated[str, AfterValidator(lambda text: _relative(text, ("split",)))]
"""A path below `root`; {split} stands for the setting of that name."""
ImagePattern = Annotated[str, AfterValidator(lambda text: _relative(text, ("split", "folder", "stem")))]
"""A glob pattern of images below `root`; {folder} and {stem} match folders and a part of the file name."""
FilePerImage = Annotated[
    str, AfterValidator(lambda text: _per_image(_relative(text, ("split", "folder", "stem", "path"))))
]
"""A path below `root` with {stem}, an image's file name without ending, or what {stem} of the images' pattern matched;
{path}, the same with its folders; {folder}, what {folder} of the images' pattern matched."""
