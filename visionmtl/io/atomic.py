"""Files that are whole wherever they lie: written beside their place, synced, and put there by renaming."""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, and not if the block fails.

    After a crash at any point the old file or the new one is there, never half of either.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".writing")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk gets its room back
        raise
    _sync_folder(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """For writers that want a file name: what lies in that file's folder takes its place beside `path` at the end.

    Nothing is left where the block fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.writing-", dir=path.parent) as folder:
        yield Path(folder) / path.name
        for file in Path(folder).iterdir():
            os.replace(file, path.parent / file.name)


def write_text(path: Path, text: str) -> None:
    """As `atomic_write`, in UTF-8, with the line ends as they are."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """As `atomic_write`. Any JSON reader can read it: what is not finite becomes null, arrays become lists."""
    write_text(path, json.dumps(plain_json(value), indent=indent, allow_nan=False) + "\n")


def plain_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): plain_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync_folder(folder: Path) -> None:
    """Make a renaming survive a loss of power. Windows can neither open a folder nor needs to: it logs renamings."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
