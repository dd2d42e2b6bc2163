"""Files of tensors that carry a digest of all their bytes, which is compared before anything in them is used.

torch does not compare the checksums that its own zip archives hold, so that a flipped bit becomes another weight.
"""

import hashlib
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch
from torch import Tensor

from visionmtl.io.atomic import atomic_write

READING_FAILS = (
    RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error,
    UnpicklingError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What torch.load and zipfile raise on bytes that they did not write; they have no exception of their own."""

_STEP_BYTES = 1 << 20
_MARK = b"visionmtl sha256 "
_COMMENT_BYTES = len(_MARK) + 64
_LENGTH = struct.pack("<H", _COMMENT_BYTES)  # of the archive's comment: the field before it
_NO_LENGTH = struct.pack("<H", 0)
_NO_DIGEST = "0" * 64
_HEADER_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # quotes inside other values are escaped
_MOST_HEADER_BYTES = 100_000_000  # as the safetensors library


class _Hashing:
    """A file that hashes what is written to it, and remembers why writing failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            count = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return count

    def flush(self) -> None:
        self.file.flush()


def write_archive(path: Path, content: Any, previous: Path | None = None) -> None:
    """Write what torch.save does, with the SHA-256 of its bytes as the comment of the zip archive.

    previous: see `atomic_write`. Raises DiskFull.
    """
    with atomic_write(path, previous, num_tensor_bytes(content)) as file:
        hashing = _Hashing(file)
        try:
            torch.save(content, cast(IO[bytes], hashing))
        except RuntimeError:  # of torch's writer, which ends an archive that could not be written
            if hashing.error is None:
                raise
            raise hashing.error from None
        file.seek(-len(_NO_LENGTH), os.SEEK_END)
        file.write(_LENGTH + _MARK + hashing.digest.hexdigest().encode())


def read_archive(path: Path) -> tuple[Any, bool]:
    """What torch.save wrote, as tensors and plain data on the CPU, and whether a digest vouches for it.

    Without a digest it is the checksums of the archive's parts, and nothing in the file format before torch 1.6.
    Raises one of READING_FAILS, also where the file is not what was written.
    """
    has_digest = check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True), has_digest


def check_archive(path: Path) -> bool:
    """Compare the digest or, without one, the checksums of a zip archive; returns whether there is a digest."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        content_bytes = size - _COMMENT_BYTES - len(_LENGTH)
        file.seek(max(content_bytes, 0))
        length, comment = file.read(len(_LENGTH)), file.read()
        if comment.startswith(_MARK):
            file.seek(0)
            digest = _sha256(file, content_bytes)
            digest.update(_NO_LENGTH)  # as torch left it
            if length != _LENGTH or comment != _MARK + digest.hexdigest().encode():
                raise ValueError("its bytes are not those that were written: their SHA-256 differs")
            return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if packed := [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"{packed[0]} in it is compressed, as torch never does")
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} in it differs")
    return False


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors, with plain data as JSON and the file's SHA-256 in the metadata. Raises DiskFull."""
    from safetensors.torch import save

    metadata = {"format": "pt", "visionmtl": json.dumps(settings), "sha256": _NO_DIGEST}
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}  # none shares memory
    data = save(whole, metadata)
    digest = hashlib.sha256(data).hexdigest()
    at = _HEADER_DIGEST.search(data)
    assert at is not None
    with atomic_write(path, num_bytes=len(data)) as file:
        file.write(data)
        file.seek(at.start(1))
        file.write(digest.encode())


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and plain data of a file that `write_safetensors` wrote. Raises ValueError for any other."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with path.open("rb") as file:
        length = file.read(8)
        header_bytes = int.from_bytes(length, "little")
        if len(length) < 8 or header_bytes > min(_MOST_HEADER_BYTES, path.stat().st_size - 8):
            raise ValueError("it is no safetensors file, or was cut short")
        header = file.read(header_bytes)
        found = _HEADER_DIGEST.search(header)
        if found is None:
            raise ValueError("it has no digest in its metadata, so that visionmtl did not write it")
        digest = hashlib.sha256(length + header[: found.start(1)] + _NO_DIGEST.encode() + header[found.end(1) :])
        if _sha256(file, None, digest).hexdigest().encode() != found[1]:
            raise ValueError("its bytes are not those that were written: their SHA-256 differs")
    try:
        settings = json.loads(json.loads(header)["__metadata__"]["visionmtl"])
        return load_file(path), settings
    except (SafetensorError, LookupError, TypeError) as error:
        raise ValueError(f"visionmtl did not write it ({type(error).__name__}: {error})") from error


def has_settings(path: Path) -> bool:
    """Whether a safetensors file claims to be of `write_safetensors`, and not to hold tensors alone."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        return b'"visionmtl":' in file.read(min(header_bytes, _MOST_HEADER_BYTES))


def named_tensors(content: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, by their keys joined with slashes."""
    if isinstance(content, Tensor):
        return [(name, content)]
    if isinstance(content, Mapping):
        items: Any = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    else:
        return []
    return [pair for key, inner in items for pair in named_tensors(inner, f"{name}/{key}" if name else str(key))]


def num_tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    return sum(value.numel() * value.element_size() for _, value in named_tensors(content))


def _sha256(file: IO[bytes], num_bytes: int | None, digest: Any = None) -> Any:
    """The hash of a file's next bytes; None: of all that follow."""
    digest = digest or hashlib.sha256()
    left = num_bytes
    while part := file.read(_STEP_BYTES if left is None else min(left, _STEP_BYTES)):
        digest.update(part)
        left = None if left is None else left - len(part)
    return digest
