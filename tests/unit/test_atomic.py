"""Files that are written whole or not at all, on systems that open folders and on those that do not."""

import errno
import json
import math
import os
import socket
import stat
from pathlib import Path

import numpy as np
import pytest

from visionmtl.io import atomic
from visionmtl.io.atomic import atomic_path, atomic_write, remove_unfinished, write_json, write_text


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


def test_a_file_system_that_cannot_sync_folders_writes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced = os.fsync

    def no_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)

    write_text(tmp_path / "a.txt", "new")

    assert (tmp_path / "a.txt").read_text() == "new"


def test_two_that_write_one_path_do_not_mix_and_the_last_to_end_wins(tmp_path: Path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as slow:
        slow.write(b"slow, ")
        with atomic_write(path) as fast:
            fast.write(b"fast")
        slow.flush()
        remove_unfinished(tmp_path)  # not what a living process writes
        assert path.read_bytes() == b"fast" and [f.name for f in tmp_path.iterdir() if f != path] == ["a.txt.writing"]
        slow.write(b"and whole")
    assert path.read_bytes() == b"slow, and whole" and list(tmp_path.iterdir()) == [path]


def test_processes_that_write_one_path_at_once_leave_one_of_their_files_whole(tmp_path: Path):
    path = tmp_path / "a.bin"
    children = []
    for number in range(4):
        if (child := os.fork()) == 0:
            for _ in range(25):
                with atomic_write(path) as file:
                    for _ in range(10):
                        file.write(bytes([number]) * 20_000)
            os._exit(0)
        children.append(child)
    seen = set()
    while children:
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 200_000 and len(set(content)) == 1
            seen.add(content[0])
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            assert status == 0
            children.remove(done)
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_used_again_and_never_piles_up(tmp_path: Path):
    for _ in range(3):
        if (child := os.fork()) == 0:
            with atomic_write(tmp_path / "a.txt") as file, atomic_path(tmp_path / "b") as inside:
                inside.write_text("half")
                file.write(b"half" * 10_000)
                os._exit(0)
        os.waitpid(child, 0)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt.writing", "b.writing"]

    write_text(tmp_path / "a.txt", "new")
    with atomic_path(tmp_path / "b") as inside:
        assert list(inside.parent.iterdir()) == []
        inside.write_text("new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "new", "b": "new"}


def test_leftovers_can_be_removed_and_files_with_like_names_stay(tmp_path: Path):
    for name in ("a.writing", "a.writing-3", "writing", "my.writings", "b.writing.txt"):
        (tmp_path / name).touch()
    (tmp_path / "c.writing").mkdir()
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path / "missing")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.writing.txt", "my.writings", "writing"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, None])
def test_where_there_are_no_locks_the_name_is_the_process_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
):
    def refuse(*_: object) -> None:
        raise OSError(number, "no locks")

    if number is None:
        monkeypatch.setattr(atomic, "fcntl", None)  # as on Windows
    else:
        monkeypatch.setattr(atomic.fcntl, "flock", refuse)
    with atomic_write(tmp_path / "a.txt") as file:
        file.write(b"whole")
        assert (tmp_path / f"a.txt.writing-{socket.gethostname()}-{os.getpid()}").exists()
    assert (tmp_path / "a.txt").read_bytes() == b"whole"
