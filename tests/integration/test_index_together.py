"""Processes that need the same index at the same time: one parses, the others wait, and none waits for a dead one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from visionmtl.io import index
from visionmtl.io.index import cached

# stands beside the others until all are up, parses slowly, says so, and prints what it found
START = """
import os, sys, time
from pathlib import Path
import numpy as np
from visionmtl.io import index
index.MIN_BYTES, folder, number, count = 0, Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def make():
    (folder / f"parsed-{number}").touch()
    time.sleep(float(sys.argv[4]))
    return {"numbers": np.arange(5) + int(number)}

(folder / f"up-{number}").touch()
while len(list(folder.glob("up-*"))) < count:
    time.sleep(0.01)
print(index.cached(folder / "a.json", "kind", make)["numbers"].tolist())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(index, "MIN_BYTES", 0)
    monkeypatch.setenv("VISIONMTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.json").write_text("content")
    return tmp_path


def start(folder: Path, number: int, count: int, seconds: float) -> subprocess.Popen:
    importable = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [str(folder), str(number), str(count), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", START, *arguments], env=importable, stdout=subprocess.PIPE, text=True
    )


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} never came"
        time.sleep(0.01)


def test_of_three_processes_exactly_one_parses_and_all_get_what_it_found(folder):
    processes = [start(folder, number, 3, seconds=1) for number in range(3)]
    found = [process.communicate(timeout=120)[0].strip() for process in processes]

    (parsed,) = folder.glob("parsed-*")
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert found == [str((np.arange(5) + int(parsed.name[-1])).tolist())] * 3


def test_the_death_of_the_one_that_parses_lets_the_next_in(folder):
    dying = start(folder, 7, 1, seconds=600)
    wait_for(folder / "parsed-7")
    dying.kill()
    dying.wait()

    begin = time.monotonic()
    assert cached(folder / "a.json", "kind", lambda: {"numbers": np.arange(3)})["numbers"].tolist() == [0, 1, 2]
    assert time.monotonic() - begin < 60


def test_nobody_waits_for_ever(folder, monkeypatch):
    monkeypatch.setattr(index, "WAIT_S", 0.2)
    slow = start(folder, 7, 1, seconds=600)
    wait_for(folder / "parsed-7")
    with pytest.warns(UserWarning, match=r"another process has held .* for 0.2 s; .*; end what holds"):
        found = cached(folder / "a.json", "kind", lambda: {"numbers": np.arange(3)})
    slow.kill()
    slow.wait()
    assert found["numbers"].tolist() == [0, 1, 2]


def test_where_a_disk_has_no_locks_each_parses_for_itself(folder, monkeypatch):
    def no_locks(lock, *arguments, **settings):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    assert cached(folder / "a.json", "kind", lambda: {"numbers": np.arange(3)})["numbers"].sum() == 3


def test_what_is_there_needs_no_lock(folder, monkeypatch):
    cached(folder / "a.json", "kind", lambda: {"numbers": np.arange(3)})
    monkeypatch.setattr(FileLock, "acquire", None)
    assert cached(folder / "a.json", "kind", dict)["numbers"].sum() == 3


def test_an_error_while_parsing_lets_the_next_in(folder):
    def broken() -> dict[str, np.ndarray]:
        raise ValueError("cut short")

    for _ in range(2):
        with pytest.raises(ValueError, match="cut short"):
            cached(folder / "a.json", "kind", broken)
    assert cached(folder / "a.json", "kind", lambda: {"numbers": np.arange(3)})["numbers"].sum() == 3
