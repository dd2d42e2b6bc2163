"""Files of a web server or object store, fetched whole into a folder of bounded size and checked by SHA-256.

A place is a URL that fsspec opens: https://, s3://, gs://, ... What does not answer is asked again, with pauses that
double; what does not have the length and checksum it should have is fetched once more.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionmtl.io.atomic import atomic_path, remove_unfinished
from visionmtl.io.download import sha256
from visionmtl.io.index import cache_folder, locked

FIRST_PAUSE_S = 1.0
"""Before the second attempt; before each further one it is twice as long."""
_TOUCH_S = 10.0  # a use is noted in the file's date no more often
_WAIT_S = 0.1  # until others have finished what fills the folder
_RESERVED = "reserved"
_REFUSED = (401, 403, 404, 410)  # HTTP: asking again does not help
_OWN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_ERRORS = (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"),
           ("gcsfs.retry", "HttpError"))  # fmt: skip
"""What packages behind fsspec raise that is no OSError."""


class _TooLongError(Exception):
    """A file goes on behind its end."""


class StoreError(ValueError):
    """A server that does not answer, or gives other bytes than its index says. No image is left out for that."""

    def __init__(self, text: str) -> None:
        # out of a worker, DataLoader hands on the text of the traceback in place of the error's
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].strip())


def is_url(place: str) -> bool:
    """Whether a place is no path of this machine. A scheme has two letters or more: `C://` is a drive."""
    return re.match(r"[a-z][a-z0-9+.-]+://", place, re.IGNORECASE) is not None


@dataclass(frozen=True)
class RemoteFolder:
    """The files below a URL, and where those that were fetched lie."""

    url: str
    folder: Path
    limit_bytes: int
    """What the fetched files may take; the ones that were not used for longest are removed."""
    retries: int
    """Further attempts where the server does not answer."""
    timeout_s: float
    """How long it may be silent."""

    @staticmethod
    def default_folder(url: str) -> Path:
        """In the user's cache."""
        return cache_folder() / "shards" / _key(url)

    def listing(self, name: str, max_bytes: int) -> Path:
        """A small file that may have changed on the server, fetched anew. It is written only where it has changed.

        Its name begins with a hash of the URL: several data sets may share the folder.
        """
        target = self.folder / f"{_key(self.url)}-{name}"
        with locked(self.folder / f".{target.name}.lock"), atomic_path(self.folder / f"{target.name}.new") as new:
            self._persistently(name, new, max_bytes)
            if new.stat().st_size > max_bytes:
                raise StoreError(
                    f"{self.url}/{name} has more than {max_bytes:,} bytes; so many are read; correct `root`, or write "
                    "the data set again"
                )
            if not target.is_file() or target.read_bytes() != new.read_bytes():
                os.replace(new, target)
            else:
                new.unlink()
        return target

    def file(self, name: str, num_bytes: int, digest: str, ahead: bool = False) -> Path:
        """The file, fetched if it is not there. Only one process of a machine fetches it.

        num_bytes, digest: its length and SHA-256 in hexadecimal, which are checked; ahead: before it is needed, so that
        there is one attempt, and none while another fetches it, who may have used and removed it when we come to it
        Raises StoreError.
        """

        def wait() -> None:
            if ahead:
                raise StoreError(f"{self.url}/{name} is fetched by another; it need not be twice; go on without it")

        target = self._target(name, digest)
        if _is_there(target, num_bytes):
            return target
        # not one lock a file: those stay, and there may be 100,000 files
        with locked(self.folder / f".{digest[:2]}.lock", wait):
            if _is_there(target, num_bytes):
                return target
            with atomic_path(target) as new:
                self._reserve(new.with_name(_RESERVED), num_bytes)
                self._fetch_checked(name, new, num_bytes, digest, 0 if ahead else self.retries)
                new.with_name(_RESERVED).unlink()
        return target

    def discard(self, name: str, digest: str) -> None:
        """Remove a fetched file, which turned out to be damaged."""
        self._target(name, digest).unlink(missing_ok=True)

    def _target(self, name: str, digest: str) -> Path:
        """By content: files of a data set that was written anew are others."""
        return self.folder / f"{digest[:32]}{Path(name).suffix}"

    def _fetch_checked(self, name: str, new: Path, num_bytes: int, digest: str, retries: int) -> None:
        for attempt in (1, 2):
            self._persistently(name, new, num_bytes, retries)
            size, found = new.stat().st_size, sha256(new)
            if size == num_bytes and found == digest:
                return
            if attempt == 2:
                raise StoreError(
                    f"{self.url}/{name} has {size:,} bytes and SHA-256 {found[:12]}..., attempt 2 of 2; its index says "
                    f"{num_bytes:,} and {digest[:12]}..., and both must agree; upload the file again, or the whole "
                    "data set with its index"
                )

    def _persistently(self, name: str, new: Path, max_bytes: int, retries: int | None = None) -> None:
        attempts = 1 + (self.retries if retries is None else retries)
        for attempt in range(1, attempts + 1):
            try:
                self._download(name, new, max_bytes)
                return
            except _errors() as error:
                if isinstance(error, OSError) and error.errno in _OWN_DISK:
                    raise
                refused = getattr(error, "status", None) in _REFUSED
                if refused or isinstance(error, FileNotFoundError | PermissionError) or attempt == attempts:
                    said = " ".join(str(error).split()) or type(error).__name__
                    raise StoreError(
                        f"{self.url}/{name} cannot be fetched: {said[:300]} (attempt {attempt} of {attempts}); a "
                        "server that answers, with the whole data set, is needed; start it or correct `root`, then "
                        "start again, a training with --resume; raise `retries` of the data set for longer breaks"
                    ) from error
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))

    def _download(self, name: str, new: Path, max_bytes: int) -> None:
        fsspec = _fsspec(self.url)
        options = _options(self.url, self.timeout_s)
        try:
            store, path = fsspec.core.url_to_fs(f"{self.url}/{name}", **options)
            with contextlib.suppress(_TooLongError):  # its length will tell
                store.get_file(path, str(new), callback=_bounded(fsspec, max_bytes))
        except ImportError as error:
            raise _needs_extra(self.url, error) from error
        except (ValueError, TypeError) as error:  # fsspec's TypeError: of an address that lacks a part
            raise StoreError(
                f"{self.url}/{name} cannot be opened: {' '.join(str(error).split())[:300]}; a URL of a kind that "
                "fsspec knows is needed, such as https://example.org/shards or s3://bucket/shards; correct `root`"
            ) from error

    def _reserve(self, reserved: Path, num_bytes: int) -> None:
        """Make room for a file, and hold it by an empty one of that length. Waits for others that fill the folder."""
        while True:
            with locked(self.folder / ".room.lock"):
                if self._make_room(num_bytes):
                    with reserved.open("wb") as file:
                        file.truncate(num_bytes)
                    return
            time.sleep(_WAIT_S)

    def _make_room(self, num_bytes: int) -> bool:
        remove_unfinished(self.folder)
        finished, taken = [], num_bytes
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # gone meanwhile
                if path.is_dir():  # another process fetches: what it reserved
                    taken += max((inner.stat().st_size for inner in path.iterdir()), default=0)
                elif re.fullmatch("[0-9a-f]{32}", path.stem):
                    status = path.stat()
                    finished.append((status.st_mtime, status.st_size, path))
                    taken += status.st_size
        for _, size, path in sorted(finished):
            if taken <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)  # who has it open can read on
            taken -= size
        return taken <= self.limit_bytes


def _key(url: str) -> str:
    """A URL as part of a file's name."""
    return hashlib.blake2b(url.encode(), digest_size=8).hexdigest()


def _is_there(target: Path, num_bytes: int) -> bool:
    """Whether a whole file lies there; notes that it is used."""
    try:
        status = target.stat()
        if status.st_size != num_bytes:
            return False
        if time.time() - status.st_mtime > _TOUCH_S:
            os.utime(target)
    except FileNotFoundError:
        return False
    return True


def _errors() -> tuple[type[BaseException], ...]:
    """What an attempt may raise: of packages that are not imported, nothing can come."""
    loaded = [(sys.modules.get(module), name) for module, name in _ERRORS]
    return (OSError, asyncio.TimeoutError, *(getattr(module, name) for module, name in loaded if hasattr(module, name)))


def _fsspec(url: str) -> Any:
    try:
        import fsspec.callbacks
        import fsspec.core
    except ImportError as error:
        raise _needs_extra(url, error) from error
    return fsspec


def _needs_extra(url: str, error: ImportError) -> ValueError:
    return ValueError(
        f"{url} is opened by fsspec, which lacks a package: {' '.join(str(error).split())}; a path of this machine "
        "needs none; pip install 'visionmtl[shards]' (http, https, s3), or for another kind of store the package named"
    )


def _options(url: str, timeout_s: float) -> dict[str, Any]:
    """Settings of the store's client: how long it waits."""
    kind = url.partition("://")[0]
    if kind in ("http", "https"):
        try:
            import aiohttp
        except ImportError as error:
            raise _needs_extra(url, error) from error
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        return {"client_kwargs": {"timeout": timeout}}
    if kind in ("s3", "s3a"):
        return {"config_kwargs": {"connect_timeout": timeout_s, "read_timeout": timeout_s}}
    return {}


def _bounded(fsspec: Any, max_bytes: int) -> Any:
    """A callback that ends a download which gives more than is expected: it would fill the disk."""

    class Bounded(fsspec.callbacks.Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > max_bytes:
                raise _TooLongError

    return Bounded()
