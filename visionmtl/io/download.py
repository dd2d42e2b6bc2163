"""Files from the internet: fetched once, checked by SHA-256, kept in the user's cache."""

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from visionmtl.config.paths import home_path
from visionmtl.io.atomic import atomic_write

_MARK = "#sha256="
_STEP_BYTES = 1 << 20


def is_url(place: str | Path) -> bool:
    """Whether a place is no path: http, https or file."""
    # a Path makes one slash of two
    return re.match(r"(https?|file):/", str(place)) is not None


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_STEP_BYTES):
            digest.update(part)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where downloads are kept: VISIONMTL_CACHE, else visionmtl/ in the system's cache of the user."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("VISIONMTL_CACHE") or Path(home) / "visionmtl")


def local_file(place: str | Path) -> Path:
    """The file at a path or URL with `#sha256=HEX` behind it, which a URL must have; checked.

    A URL is fetched unless the cache has a file of that checksum.
    """
    text = str(place)
    name, mark, checksum = text.partition(_MARK)
    if mark and not re.fullmatch("[0-9a-f]{64}", checksum):
        raise ValueError(
            f"{text} has the checksum {checksum!r}; 64 hexadecimal digits in lower case are needed; take what "
            "sha256sum prints"
        )
    if not is_url(text):
        path = home_path(name if mark else text)
        if mark:
            _check(sha256(path), checksum, name)
        return path
    if not mark:
        raise ValueError(
            f"{text} is a URL without a checksum; weights from the internet are checked; put {_MARK}HEX behind it, the "
            "SHA-256 that its maker publishes"
        )
    url = re.sub(r"^(\w+):/+", lambda m: f"{m[1]}:///" if m[1] == "file" else f"{m[1]}://", name)
    path = cache_folder() / checksum[:16] / Path(unquote(urlsplit(url).path)).name
    if path.is_file() and sha256(path) == checksum:
        return path
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, atomic_write(path) as file:
            while part := answer.read(_STEP_BYTES):
                digest.update(part)
                file.write(part)
            _check(digest.hexdigest(), checksum, url)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise ValueError(
            f"{url} cannot be fetched: {getattr(error, 'reason', error)}; an address that answers is needed; correct "
            "it, or fetch the file by other means and give its path"
        ) from error
    return path


def _check(digest: str, checksum: str, name: str) -> None:
    if digest != checksum:
        raise ValueError(
            f"{name} has the SHA-256 {digest}, and {checksum} is asked for; the two must be equal; the file is damaged "
            "or another one: fetch it again, or correct the checksum"
        )
