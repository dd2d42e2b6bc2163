"""Files that are written whole or not at all, on systems that open folders and on those that do not."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from visionmtl.io.atomic import atomic_write, write_json, write_text


def test_a_failure_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fill_the_disk() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        fill_the_disk()

    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_the_folder_is_made_and_line_ends_stay(tmp_path: Path):
    write_text(tmp_path / "b" / "a.txt", "één\n")

    assert (tmp_path / "b" / "a.txt").read_bytes() == "één\n".encode()


def test_json_has_no_nan_and_no_numpy(tmp_path: Path):
    write_json(tmp_path / "a.json", {"miou": np.float64(0.5), 3: math.nan, "table": (np.arange(2), math.inf)})

    assert json.loads((tmp_path / "a.json").read_text()) == {"miou": 0.5, "3": None, "table": [[0, 1], None]}


def test_a_system_that_cannot_open_folders_writes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on Windows, where `os.open` of a folder fails."""
    opened = os.open

    def no_folders(path: str, *args: int, **kwargs: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    monkeypatch.setattr(os, "open", no_folders)

    write_text(tmp_path / "a.txt", "new")

    assert (tmp_path / "a.txt").read_text() == "new"
