"""Flat arrays kept in files and mapped into memory, found again by the content of the file they were parsed from.

What is parsed from a large file once is written as plain .npy files into one folder of the cache:
$VISIONMTL_CACHE, else $XDG_CACHE_HOME/visionmtl, else ~/.cache/visionmtl; never into the data set, which may be
read-only or shared. Deleting the cache is always safe. The folder's name holds a hash of the *whole* source file:
450 MB take 0.4 s (blake2b, one core), while a size or a date can lie. All processes of a machine map the same pages.
Of processes that start together one parses, and the others wait for it.

Beside the arrays lies a list of them, with the length and CRC-32 of each and of itself. A folder that does not agree
with its list is told, deleted and written anew.
"""

import hashlib
import json
import os
import shutil
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

MIN_BYTES = 16_000_000
"""Smaller sources are parsed at every start: that takes under a second, and their arrays a few MB at most."""

WAIT_S = 600.0
"""How long a process waits for another that parses; full COCO takes 20 s where the disk is fast."""

_LIST = "arrays.json"  # written last: the arrays that belong to the folder


class CacheError(ValueError):
    """What is kept in a cache is not what was written."""


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
        # a worker need not read every byte again that its parent has checked
        return (open_arrays, (self.folder, False)) if self.folder else (Arrays, (self._arrays,))


def cached(source: Path, kind: str, make: Callable[[], Mapping[str, NDArray]]) -> Arrays:
    """`make()`, or what an earlier call with a source of the same content and the same kind has kept.

    kind: what is made, with a version; changing how it is made must change it
    """
    if source.stat().st_size < MIN_BYTES:
        return Arrays(make())
    folder = cache_folder() / f"{source.stem}-{kind}-{content_key(source)}"
    with suppress(CacheError):  # told below, by the process that writes it anew
        if folder.is_dir():
            return open_arrays(folder)
    with locked(folder.parent / f".{folder.name}.lock", wait_s=WAIT_S):
        if folder.is_dir():  # damaged, or by the process that was waited for
            try:
                return open_arrays(folder)
            except CacheError as error:
                warnings.warn(f"{error}: it is deleted and made anew from {source}", stacklevel=2)
                shutil.rmtree(folder, ignore_errors=True)
        arrays = make()
        try:
            save_arrays(folder, arrays)
            return open_arrays(folder)
        except (OSError, CacheError) as error:
            warnings.warn(
                f"cannot keep the index of {source} in {folder.parent}: {error}; it stays in memory, and every start "
                "parses the file again; set VISIONMTL_CACHE to a folder that can be written",
                stacklevel=2,
            )
            return Arrays(arrays)


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
        listed = {}
        for name, array in arrays.items():
            file = unfinished / f"{name}.npy"
            np.save(file, array, allow_pickle=False)
            listed[name] = file.stat().st_size, file_crc32(file)
        text = json.dumps(listed)
        (unfinished / _LIST).write_text(f"{zlib.crc32(text.encode()):08x} {text}")
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already where the renaming succeeded


def open_arrays(folder: Path, verify: bool = True) -> Arrays:
    """Map the arrays of a folder, after every byte was compared with the checksums that were kept.

    verify: False compares lengths alone. Raises CacheError naming the file that is not as it was written.
    """
    file = folder / _LIST
    try:
        checksum, _, text = file.read_text().partition(" ")
        if checksum != f"{zlib.crc32(text.encode()):08x}":
            raise EOFError("it has another checksum than when it was written")
        arrays = {}
        for name, (num_bytes, crc32) in json.loads(text).items():
            file = folder / f"{name}.npy"
            if file.stat().st_size != num_bytes or (verify and file_crc32(file) != crc32):
                raise EOFError("it has another length or checksum than when it was written")
            # a plain view of each map: slices of np.memmap drag that class along, also into other processes
            arrays[name] = np.asarray(_mapped(file))
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:  # the last two: JSON of another shape
        raise CacheError(
            f"the index {folder} is damaged, {file.name}: {error}; every byte must be as written; delete the folder "
            "and start again"
        ) from error
    return Arrays(arrays, folder)


def file_crc32(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _mapped(file: Path) -> NDArray:
    array: NDArray = np.load(file, mmap_mode="r", allow_pickle=False)
    return array
