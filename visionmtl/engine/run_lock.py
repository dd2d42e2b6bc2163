"""One process at a time writes into a run folder."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from visionmtl.engine.distributed import Ranks, gather_objects

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def hold(folder: Path, ranks: Ranks) -> Iterator[str | None]:
    """Keep the run folder for the processes of this run; the first rank takes the lock for all of them.

    The lock ends with the process that holds it, however that ends. Gives a note where the file system has no locks.
    Raises ValueError, on all ranks, where another run holds the folder; nothing is changed then.
    """
    file, refused, note = None, None, None
    made = [path for path in (folder, *folder.parents) if not path.exists()] if ranks.is_main_process else []
    if ranks.is_main_process:
        try:
            file = _lock(folder)
        except BlockingIOError as error:
            refused = str(error)
        except NotImplementedError as error:
            note = str(error)
    try:
        if problem := gather_objects(refused)[0]:
            raise ValueError(problem)
        yield note
    finally:
        if file:
            with file, suppress(FileNotFoundError):  # while it is still locked
                (folder / LOCK).unlink()
        for path in made:
            with suppress(OSError):  # holds something
                path.rmdir()


def _lock(folder: Path) -> IO[str]:
    """The locked file. Raises BlockingIOError where another process holds it, NotImplementedError without locks."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        raise NotImplementedError(_without_locks(folder, "this system has no flock"))
    path = folder / LOCK
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break  # else the one before removed it between our two calls
        except BlockingIOError:
            with file:
                raise BlockingIOError(_told(folder, file)) from None
        except OSError as error:
            with file, suppress(FileNotFoundError):
                path.unlink()
            raise NotImplementedError(_without_locks(folder, error.strerror or str(error))) from None
        file.close()
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
    file.flush()
    return file


def _told(folder: Path, file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.load(file)
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, LookupError, TypeError):  # it is just being written
        who = "another process"
    return (
        f"{folder} is in use: {who} trains there; one run at a time may write into a folder; wait until it ends, stop "
        "it, or choose another --output"
    )


def _without_locks(folder: Path, reason: str) -> str:
    return (
        f"{folder} cannot be locked ({reason}): nothing keeps a second process from writing there; see that there is "
        "only one"
    )
