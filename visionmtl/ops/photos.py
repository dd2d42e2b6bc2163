"""Photographs and label maps of data sets, read fast and pixel by pixel as stored; a damaged file is named."""

import io
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from visionmtl.ops.images import LYING, UNREADABLE
from visionmtl.structures import Jpeg, JpegScale, Photo, at_full_size

_PNG = b"\x89PNG\r\n\x1a\n"
_GREY = 0  # colour type in a PNG's header
_START_OF_JPEG = b"\xff\xd8"
_END_OF_JPEG = b"\xff\xd9"
_FLAGS = {  # by divisor; a reduced image comes as BGR only
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def read_photo(file: Path) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] RGB of a JPEG or PNG; grey is repeated, CMYK converted, transparency dropped, of 16 bits the
    high byte kept.

    EXIF orientation is not applied: boxes and maps refer to the pixels as they are stored, and official evaluation
    reads them so. (Pictures that people hand in for prediction are turned upright: `ops.images`.)
    Raises ValueError naming a file that is missing, damaged or cut short.
    """
    return read_reduced(file, at_full_size).pixels


def read_reduced(file: Path, choose_scale: JpegScale) -> Photo:
    """As `read_photo`, but a JPEG is decoded at the fraction of its size that `choose_scale` allows.

    The decoder computes fewer frequencies of each block, which is within half a grey level of averaging k x k pixels.
    With the resizing that is left it takes 0.6 to 0.8 of the time: the bits must be read all the same.
    """
    content = _content(file)
    is_jpeg = content[:2].tobytes() == _START_OF_JPEG
    size = _jpeg_size(content) if is_jpeg and choose_scale is not at_full_size else None
    jpeg_scale = choose_scale(size) if size else 1
    pixels = _decoded(file, content, _FLAGS[jpeg_scale] | cv2.IMREAD_IGNORE_ORIENTATION)
    if jpeg_scale > 1:
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    if is_jpeg:
        _check_end(file, content)
    full_size = (pixels.shape[0], pixels.shape[1]) if size is None or jpeg_scale == 1 else size
    return Photo(np.asarray(pixels, np.uint8), full_size, jpeg_scale)


def read_encoded(file: Path, upright: bool = False) -> Photo:
    """A JPEG that is not decoded, as `Photo.jpeg`: its bytes, and what its header says.

    upright: have it turned as its EXIF orientation says; else pixels are as stored.
    Raises ValueError naming a file that is missing, damaged, cut short, no JPEG, or of other colours than grey and RGB.
    """
    content = _content(file)
    use = "set data.decode: workers"
    if content[:2].tobytes() != _START_OF_JPEG:
        raise ValueError(
            f"{file} is no JPEG inside; data.decode: device takes JPEGs alone; convert all images, or {use}"
        )
    try:
        with Image.open(io.BytesIO(content.data)) as opened:
            size, mode = (opened.height, opened.width), opened.mode
            found = opened.getexif().get(ExifTags.Base.Orientation, 1) if upright else 1
    except UNREADABLE as error:
        raise _unreadable(file) from error
    if mode not in ("L", "RGB"):
        raise ValueError(
            f"{file} is a JPEG in {mode}; data.decode: device takes grey ones and those in colours that become RGB, "
            f"which is YCbCr; convert it, or {use}"
        )
    _check_end(file, content)
    orientation = found if found in range(1, 9) else 1
    turned = size[::-1] if orientation in LYING else size
    return Photo(np.zeros((0, 0, 3), np.uint8), turned, 1, Jpeg(content, turned, orientation, str(file)))


def read_map(file: Path, size: tuple[int, ...]) -> NDArray:
    """The values of a PNG with one channel, uint8 or uint16 [H, W]; `size` is that of its image."""
    values = read_png(file)
    if values.shape != size:
        hint = " (a palette or colour picture has three)" if values.ndim == 3 else ""
        raise ValueError(
            f"{file} is {values.shape}, its image {size}; one value a pixel is expected{hint}; prepare it again"
        )
    return values


def read_png(file: Path) -> NDArray:
    """A PNG as stored: [H, W] or [H, W, 3 or 4] (BGR, BGRA), uint8 or uint16; palettes come out as colours.

    Raises ValueError naming a file that is missing, damaged, of another format (a JPEG changes labels along their
    edges, whatever it is called), or grey with fewer than 8 bits (decoders stretch those: of 4 bits 1 becomes 17).
    """
    content = _content(file)
    values = _decoded(file, content, cv2.IMREAD_UNCHANGED)
    start = content[:26].tobytes()
    if not start.startswith(_PNG):
        raise ValueError(
            f"{file} is no PNG inside; values must be stored as they are, which JPEG does not; write it anew as PNG "
            "from the source"
        )
    bits, colour = start[24], start[25]  # of the header, which comes first
    if colour == _GREY and bits < 8:
        raise ValueError(
            f"{file} stores {bits} bit(s) a pixel, which decoders stretch to 0..255, so that other values come out; 8 "
            "or 16 bits are needed; write it anew without optimising the bit depth"
        )
    return values


def _jpeg_size(content: NDArray[np.uint8]) -> tuple[int, int] | None:
    """(H, W) as stored; None where the header cannot be read, which decoding will complain about."""
    try:
        with Image.open(io.BytesIO(content.data)) as opened:
            return opened.height, opened.width
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None


def _check_end(file: Path, content: NDArray[np.uint8]) -> None:
    """Decoders paint what is lacking of a JPEG grey and say nothing; some writers pad, so only a missing end counts."""
    end = content.tobytes().rstrip(b"\0")[-64:]
    if _END_OF_JPEG not in end:
        raise ValueError(f"{file} is cut short: its JPEG data has no end; a whole file is needed; fetch it again")


def _content(file: Path) -> NDArray[np.uint8]:
    """uint8 [N], at least one byte; by way of memory, since OpenCV opens no file of any name on every system."""
    try:
        content = np.fromfile(file, np.uint8)
    except OSError as error:
        raise _unreadable(file) from error
    if not len(content):
        raise _unreadable(file)
    return content


def _decoded(file: Path, content: NDArray[np.uint8], flags: int) -> NDArray:
    try:
        values = cv2.imdecode(content, flags)
    except cv2.error as error:  # a header that promises more pixels than OpenCV takes
        raise _unreadable(file) from error
    if values is None:
        raise _unreadable(file)
    return np.asarray(values)


def _unreadable(file: Path) -> ValueError:
    return ValueError(f"{file} is missing or no readable image; a JPEG or PNG is expected; fetch or prepare it again")
