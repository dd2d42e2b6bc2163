"""Files that are whole wherever they lie: written beside their place, synced, and put there by renaming."""

import errno
import itertools
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".writing"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EMLINK}
"""What the system answers where a file cannot have a second name (FAT, some network file systems)."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_NO_FOLDER_SYNC = {errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
"""Of folders that lie on another machine (CIFS) or outside a virtual one."""


class DiskFull(OSError):
    """There is no room for a file. What was there before is whole."""


@contextmanager
def atomic_write(path: Path, previous: Path | None = None, num_bytes: int | None = None) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, and not if the block fails.

    After a crash at any point the old file or the new one is there, never half of either. Several processes may write
    the same path: each writes a file of its own, and the last to end wins. What a killed process left is written over.

    previous: the name under which the file that was there stays
    num_bytes: about how many there will be, for messages
    Raises DiskFull.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    try:
        with _claimed(path) as temporary:
            try:
                with temporary.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                if previous is not None and path.exists():
                    link(path, previous)
                os.replace(temporary, path)
            except OSError:
                written = temporary.stat().st_size
                raise
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        needs = f"about {num_bytes:,} bytes are needed" if num_bytes else "room for the whole file is needed"
        before = "; the one that was there before is whole" if path.exists() else ""
        raise _disk_full(path, error, f" after {written:,} bytes{before}", needs) from error
    _sync_folder(path.parent)


def _disk_full(path: Path, error: OSError, when: str, needs: str) -> DiskFull:
    free = shutil.disk_usage(path.parent).free
    return DiskFull(
        f"{path} cannot be written: {os.strerror(error.errno or errno.ENOSPC)}{when}; {needs}, and {free:,} are free "
        "now that the unfinished file is removed; make room or choose another disk, then try again"
    )


def write_bytes(path: Path, content: bytes) -> None:
    """For the many files of one result: not synced as by `atomic_write`, which takes longer than to make most of them.

    Folders are made, and nothing is left of a file that fails. Raises DiskFull.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(content)
    except OSError as error:
        if error.filename is not None:  # it could not even be opened
            raise
        path.unlink(missing_ok=True)
        if error.errno not in _DISK_FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise _disk_full(path, error, "", f"{len(content):,} bytes are needed") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """For writers that want a file name: what lies in that file's folder takes its place beside `path` at the end.

    Nothing is left where the block fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(path, folder=True) as folder:
        yield folder / path.name
        for file in folder.iterdir():
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


def link(path: Path, other: Path) -> None:
    """Make `other` the same file as `path`; a copy where the file system has no hard links."""
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        with path.open("rb") as source, atomic_write(other) as copy:
            shutil.copyfileobj(source, copy)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder; what a living one writes stays."""
    for temporary in folder.glob(f"*{_UNFINISHED}*") if fcntl else ():
        if not re.search(rf"{re.escape(_UNFINISHED)}(-\d+)?$", temporary.name):
            continue
        if (lock := _try_lock(temporary, temporary.is_dir(), create=False)) is not None:
            _remove(temporary, lock)


@contextmanager
def _claimed(path: Path, folder: bool = False) -> Iterator[Path]:
    """A file, or an empty folder, beside `path` that no other process or thread writes to; it is removed at the end.

    It is the first of NAME.writing, NAME.writing-1, ... that nobody has locked, so that what was left by a killed
    process, whose lock ended with it, is used again. Where there are no locks the name is the process's own.
    """
    first = path.with_name(path.name + _UNFINISHED)
    lock, temporary = None, first.with_name(f"{first.name}-{socket.gethostname()}-{os.getpid()}")
    for name in (f"{first.name}-{number}" if number else first.name for number in itertools.count()):
        try:
            if fcntl is not None and (lock := _try_lock(first.with_name(name), folder, create=True)) is None:
                continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        break
    if lock is not None:
        temporary = first.with_name(name)
    if folder:
        temporary.mkdir(exist_ok=True)
        for file in temporary.iterdir():
            file.unlink()
    try:
        yield temporary
    finally:
        _remove(temporary, lock)  # a full disk gets its room back


def _try_lock(temporary: Path, folder: bool, create: bool) -> int | None:
    """A descriptor that keeps others from a file or folder until it is closed; None where another has it."""
    flags = os.O_RDONLY if folder else os.O_RDWR | (os.O_CREAT if create else 0)
    while True:
        if folder and create:
            temporary.mkdir(exist_ok=True)
        try:
            lock = os.open(temporary, flags, 0o666)
        except FileNotFoundError:  # its writer has finished meanwhile
            if create:
                continue
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError:
            os.close(lock)
            raise
        if _is_open(temporary, lock):
            return lock
        os.close(lock)  # its writer renamed it between opening and locking


def _is_open(temporary: Path, descriptor: int) -> bool:
    """Whether a name is still that of an open file."""
    try:
        return os.path.samestat(os.stat(temporary), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(temporary: Path, lock: int | None) -> None:
    """Remove an unfinished file or folder unless it was renamed, and let others use its name."""
    if lock is None or _is_open(temporary, lock):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
    if lock is not None:
        os.close(lock)


def _sync_folder(folder: Path) -> None:
    """Make a renaming survive a loss of power. Windows can neither open a folder nor needs to: it logs renamings."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
