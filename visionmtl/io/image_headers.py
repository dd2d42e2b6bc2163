"""What an image file promises, checked before a decoder believes it: a regular file, its pixels, a PNG's chunks.

Decoders take memory for what a header says: 366 bytes can ask for 4 GB. So the size is read here first, and one limit
holds for all formats and decoders. A PNG's chunks must fit into the file and have the checksums that are written in it:
that takes 0.3 to 0.8 % of the time of decoding.
"""

import functools
import io
import os
import re
import struct
import zlib
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from visionmtl.io.paths import regular_file

MAX_PIXELS = 2**27
"""Height times width of an image, 134 million, unless the environment variable VISIONMTL_MAX_PIXELS says another."""
VARIABLE = "VISIONMTL_MAX_PIXELS"

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of the formats that are read. Others are not: EPS, for one, is a program that Ghostscript runs."""
JPEG_START = b"\xff\xd8"
PNG_START = b"\x89PNG\r\n\x1a\n"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, struct.error, Image.DecompressionBombError
)  # fmt: skip
"""What Pillow raises for files that are damaged or no images."""

_BYTES_PER_PIXEL = 16  # the most that a sound file has: four channels of 32 bits
_MAX_SCANS = 100  # of a JPEG; progressive ones have about ten, and each passes over the whole picture
_SEGMENT = re.compile(rb"\xff[^\x00\xff]")  # where decoders see a marker in a JPEG
_JPEG_SIZE = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # SOF0 to SOF15
_JPEG_ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a segment
_JPEG_STOP, _JPEG_SCAN = 0xD9, 0xDA
_NETPBM = re.compile(rb"P[1-6f](?:\s|#[^\n]*\n)+(\d{1,10})(?:\s|#[^\n]*\n)+(\d{1,10})\s")
_TIFF_WIDTH, _TIFF_HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323
_TIFF_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}


def checked_content(file: Path) -> tuple[bytes, tuple[int, int]]:
    """The bytes of an image file, and the (H, W) that its header says, as stored.

    Raises ValueError for what is no regular file, no image, a PNG with damaged chunks, or larger than `max_pixels`.
    """
    try:
        with regular_file(file).open("rb", buffering=0) as stream:
            num_bytes = os.fstat(stream.fileno()).st_size
            if num_bytes > _BYTES_PER_PIXEL * max_pixels():
                raise ValueError(
                    f"{file} has {num_bytes / 1e9:.1f} GB; at most {max_pixels() / 1e6:.4g} million pixels, of "
                    f"{_BYTES_PER_PIXEL} bytes or less each, are decoded; cut it into tiles, or set {VARIABLE} higher"
                )
            content = stream.read()
    except OSError as error:
        raise unreadable(file, error) from error
    return content, check_content(file, content)


def check_content(file: Path | str, content: bytes) -> tuple[int, int]:
    """The (H, W) that the header of an image says; file: names it, for messages. Raises ValueError as above."""
    if not content:
        raise unreadable(file, "it is empty")
    try:
        size = _size(content)
    except PILLOW_ERRORS as error:
        raise unreadable(file, error) from error
    if size is None or 0 in size:
        raise unreadable(file, "its header gives no size")
    check_pixels(file, *size)
    if content.startswith(PNG_START) and (damage := _png_damage(content)):
        raise unreadable(file, damage)
    if content.startswith(TIFF_STARTS):
        check_pixels(file, *_tiff_numbers(content, _TILE_HEIGHT, _TILE_WIDTH))
    return size


def open_header(file: Path) -> Image.Image:
    """The image as Pillow opens it: its header is read, its pixels are not yet. Raises ValueError as above."""
    try:
        with regular_file(file).open("rb") as stream:
            size = _webp_size(stream.read(64))
        if size is not None:  # Pillow makes room for the pixels of these at once
            check_pixels(file, *size)
        try:
            opened = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:  # by Pillow's own limit; ours decides
            checked_content(file)
            opened = Image.open(file, formats=FORMATS)
    except ValueError:  # which says it all
        raise
    except PILLOW_ERRORS as error:
        raise unreadable(file, error) from error
    check_pixels(file, opened.height, opened.width)
    return opened


def check_pixels(file: Path | str, height: int, width: int, channels: int = 1) -> None:
    """Raises ValueError where a picture is larger than `max_pixels`; beyond four channels, four count as a pixel."""
    pixels = height * width * -(-channels // 4)
    if pixels > max_pixels():
        of_channels = f" of {channels} channels" if channels > 4 else ""
        raise ValueError(
            f"{file} is said to have {height}x{width} px{of_channels}, {pixels / 1e6:.4g} million; at most "
            f"{max_pixels() / 1e6:.4g} million are decoded, since a small file can ask for more memory than there is; "
            f"cut it into tiles, or set the environment variable {VARIABLE}={pixels} if you trust it"
        )
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels()  # Pillow's own limit is lower, and would warn or refuse


@functools.cache
def max_pixels() -> int:
    """The largest height times width that is decoded: MAX_PIXELS, or what the environment variable says."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return MAX_PIXELS
    if not re.fullmatch(r"[1-9][0-9]{0,9}", text):
        raise ValueError(
            f"{VARIABLE} is {text!r}; a whole number of pixels, 1 to 9999999999, is needed; correct it, or unset it "
            f"for {MAX_PIXELS}"
        )
    return int(text)


def unreadable(file: Path | str, why: object) -> ValueError:
    """The error for a file that is no whole image."""
    if isinstance(why, UnidentifiedImageError):  # whose text names an object in memory
        why = "its content is of no image format that is read"
    return ValueError(
        f"{file} is missing or no readable image: {why}; a complete image file is expected; fetch or prepare it again, "
        "or correct the path"
    )


def _size(content: bytes) -> tuple[int, int] | None:
    """(H, W) as the header says; None where it does not."""
    if content.startswith(JPEG_START):
        return _jpeg_size(content)
    if content.startswith(PNG_START):
        width, height = struct.unpack_from(">II", content, 16)
        return height, width
    if content.startswith(TIFF_STARTS):
        height, width = _tiff_numbers(content, _TIFF_HEIGHT, _TIFF_WIDTH)
        return height, width
    if size := _webp_size(content):
        return size
    if content.startswith(b"BM"):
        is_old = struct.unpack_from("<I", content, 14)[0] == 12
        width, height = struct.unpack_from("<HH" if is_old else "<ii", content, 18)
        return abs(height), abs(width)
    if content.startswith(b"GIF8"):
        width, height = struct.unpack_from("<HH", content, 6)
        return height, width
    if match := _NETPBM.match(content):
        return int(match[2]), int(match[1])
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        return opened.height, opened.width


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(H, W); None without a frame header before the data. Raises EOFError for more scans than any encoder writes."""
    at, size, kind, components = len(JPEG_START), None, 0, 0
    while match := _SEGMENT.search(content, at):
        marker, at = content[match.end() - 1], match.end()
        if marker in _JPEG_SIZE and size is None:
            height, width, components = struct.unpack_from(">HHB", content, at + 3)
            size, kind = (height, width), marker
        if marker in (_JPEG_SCAN, _JPEG_STOP):
            break
        if marker not in _JPEG_ALONE:
            at += struct.unpack_from(">H", content, at)[0]
    is_progressive = kind & 3 == 2
    # else decoders stop behind the first scan
    has_more = size is not None and (is_progressive or content[at + 2] < components)
    if has_more and (scans := content.count(b"\xff\xda", at)) > _MAX_SCANS:
        raise EOFError(f"it has {scans} scans, where about ten are usual")
    return size


def _webp_size(content: bytes) -> tuple[int, int] | None:
    """(H, W); None where it is no WebP. https://developers.google.com/speed/webp/docs/riff_container"""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        return None
    kind = content[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", content, 21)[0]
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    width, height = (int.from_bytes(content[at : at + 3], "little") for at in (24, 27))
    return height + 1, width + 1


def _tiff_numbers(content: bytes, *wanted: int) -> tuple[int, ...]:
    """The values of tags of the first picture, 0 where there is none (TIFF 6.0, section 2; BigTIFF: 8-byte offsets)."""
    order = "<" if content[:2] == b"II" else ">"
    is_big = b"+" in content[2:4]
    first = struct.unpack_from(order + ("Q" if is_big else "I"), content, 8 if is_big else 4)[0]
    if first > len(content):
        raise EOFError("its directory lies behind its end")
    count, entry, value_at = ("Q", 20, 12) if is_big else ("H", 12, 8)
    total, start = struct.unpack_from(order + count, content, first)[0], first + struct.calcsize(order + count)
    values = {}
    for at in range(start, min(start + total * entry, len(content)), entry):
        tag, kind = struct.unpack_from(order + "HH", content, at)
        if tag in wanted and kind in _TIFF_NUMBERS:
            values[tag] = struct.unpack_from(order + _TIFF_NUMBERS[kind], content, at + value_at)[0]
    return tuple(values.get(tag, 0) for tag in wanted)


def _png_damage(content: bytes) -> str:
    """What is wrong with the chunks of a PNG, up to its end; "" where nothing is."""
    view, at, kind = memoryview(content), len(PNG_START), b""
    while kind != b"IEND":
        if at + 12 > len(content):
            return "it is cut short: its chunks do not come to an end"
        length, kind = struct.unpack_from(">I4s", content, at)
        if (at == len(PNG_START)) != (kind == b"IHDR"):
            return f"its chunk at byte {at} is {kind!r}; IHDR comes first, and once"
        end = at + 8 + length
        if end + 4 > len(content):
            return (
                f"its chunk {kind!r} at byte {at} promises {length} bytes, of which {len(content) - at - 12} are there"
            )
        if zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            return f"its chunk {kind!r} at byte {at} has another checksum than its content"
        at = end + 4
    return ""
