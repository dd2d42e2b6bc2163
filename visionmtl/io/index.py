"""Flat arrays kept in files and mapped into memory, found again by the content of the file they were parsed from.

What is parsed from a large file once is written as plain .npy files into one folder of the cache:
$VISIONMTL_CACHE, else $XDG_CACHE_HOME/visionmtl, else ~/.cache/visionmtl; never into the data set, which may be
read-only or shared. Deleting the cache is always safe. The folder's name holds a hash of the *whole* source file:
450 MB take 0.4 s (blake2b, one core), while a size or a date can lie. All processes of a machine map the same pages.
Of processes that start together one parses, and the others wait for it.
"""

import hashlib
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

MIN_BYTES = 16_000_000
"""Smaller sources are parsed at every start: that takes under a second, and their arrays a few MB at most."""

WAIT_S = 600.0
"""How long a process waits for another that parses; full COCO takes 20 s where the disk is fast."""

_NAMES = "names.txt"  # written last: the arrays that belong to the folder


class Arrays(Mapping[str, NDArray]):
    """Named read-only arrays. Those that lie in a folder are sent to other processes as its name, not as values."""

    def __init__(self, arrays: Mapping[str, NDArray], folder: Path | None = None) -> None:
        self._arrays, self.folder = dict(arrays), folder
        for array in self._arrays.values():
            array.flags.writeable = False

    def __getitem__(self, name: str) -> NDArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open_arrays, (self.folder,)) if self.folder else (Arrays, (self._arrays,))


def cached(source: Path, kind: str, make: Callable[[], Mapping[str, NDArray]]) -> Arrays:
    """`make()`, or what an earlier call with a source of the same content and the same kind has kept.

    kind: what is made, with a version; changing how it is made must change it
    """
    if source.stat().st_size < MIN_BYTES:
        return Arrays(make())
    folder = cache_folder() / f"{source.stem}-{kind}-{content_key(source)}"
    if folder.is_dir():
        return open_arrays(folder)
    with locked(folder.parent / f".{folder.name}.lock", wait_s=WAIT_S):
        if folder.is_dir():  # by the process that was waited for
            return open_arrays(folder)
        arrays = make()
        try:
            save_arrays(folder, arrays)
        except OSError as error:
            warnings.warn(
                f"cannot keep the index of {source} in {folder.parent}: {error}; it stays in memory, and every start "
                "parses the file again; set VISIONMTL_CACHE to a folder that can be written",
                stacklevel=2,
            )
            return Arrays(arrays)
    return open_arrays(folder)


@contextmanager
def locked(file: Path, on_wait: Callable[[], None] = lambda: None, wait_s: float = -1) -> Iterator[None]:
    """Only one process at a time is inside for the same `file`; one that dies there lets the next in at once.

    on_wait: called once before another is waited for. After wait_s (-1: never) it is not waited for any more: two may
    do the work then, but none hangs. So may several on a disk without locks.
    """
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire(timeout=wait_s)
    except Timeout:
        warnings.warn(
            f"another process has held {file} for {wait_s:g} s; its work is done here as well, which needs its memory "
            f"twice; end what holds {file} if nothing should",
            stacklevel=4,
        )
    except (OSError, NotImplementedError):
        pass  # a disk without locks, or one that cannot be written, which saving will say
    try:
        yield
    finally:
        lock.release()


def cache_folder() -> Path:
    """Where indices are kept; it need not exist yet."""
    if own := os.environ.get("VISIONMTL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visionmtl"


def content_key(file: Path) -> str:
    """A hash of the file's bytes, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_arrays(folder: Path, arrays: Mapping[str, NDArray]) -> None:
    """Write `folder` as a whole or not at all; where another process was faster, its folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        for name, array in arrays.items():
            np.save(unfinished / f"{name}.npy", array, allow_pickle=False)
        (unfinished / _NAMES).write_text("\n".join(arrays))
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already where the renaming succeeded


def open_arrays(folder: Path) -> Arrays:
    """Map the arrays of a folder; nothing is read before it is used."""
    try:
        names = (folder / _NAMES).read_text().split()
        # a plain view of each map: slices of np.memmap drag that class along, also into other processes
        arrays = {name: np.asarray(_mapped(folder / f"{name}.npy")) for name in names}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"the index {folder} is damaged: {error}; it must hold every array in its {_NAMES}; delete the folder and "
            "start again"
        ) from error
    return Arrays(arrays, folder)


def _mapped(file: Path) -> NDArray:
    array: NDArray = np.load(file, mmap_mode="r", allow_pickle=False)
    return array
