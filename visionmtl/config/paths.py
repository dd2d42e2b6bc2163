"""Paths: where the top-level folders of the project lie, and what `~` means. Imports nothing heavy."""

import os
import stat
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder(name: str) -> Path:
    """The folder `name`: `visionmtl/_<name>` in a wheel, `<name>` beside the package in a checkout.

    A wheel cannot install them at the top level: a package called `datasets` would shadow Hugging Face's.
    Raises ImportError when neither is there.
    """
    for folder in (_PACKAGE / f"_{name}", _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise ImportError(
        f"there is neither {_PACKAGE / f'_{name}'} nor {_PACKAGE.parent / name}; the folder {name}/ belongs to "
        "visionmtl; reinstall it"
    )


def home_path(text: str | Path) -> Path:
    """A path as a user gives it; `~` is the home folder, which a shell does not fill in after `--option=`."""
    return Path(os.path.expanduser(text))


def check_new(*files: Path) -> None:
    """Raises ValueError for a file that exists."""
    for file in files:
        if file.exists():
            raise ValueError(f"{file} exists already; nothing is written over; choose another name, or move it away")


def check_outside(output: Path, source: str | Path) -> None:
    """Raises ValueError for an output within a folder of inputs, which would be inputs of the next call."""
    if Path(source).is_dir() and output.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(
            f"{output} lies in {source}, whose files it would join; a folder outside of it is needed; choose another"
        )


_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe (FIFO)", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def regular_file(path: str | Path) -> Path:
    """The path, once it is known that opening it cannot hang: a regular file lies there, or a link to one.

    Every reader asks this before it opens a file: opening a named pipe waits for a writer, and a device may never end.
    Raises ValueError for what is no regular file, OSError where there is nothing or asking is not allowed.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # the system takes no name with a zero byte, or with halves of a character
        raise ValueError(
            f"{str(path)!r} is no name of a file: {error}; a name without zero bytes, in UTF-8, is needed; correct the "
            "name where it is written"
        ) from error
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}; only regular files are opened, since "
            "others may never answer or end; put the file itself there, or correct the path"
        )
    return path if isinstance(path, Path) else Path(path)
