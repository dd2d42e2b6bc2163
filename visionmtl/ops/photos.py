"""Photographs and label maps of data sets, read fast and pixel by pixel as stored; a damaged file is named."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

_END_OF_JPEG = b"\xff\xd9"


def read_photo(file: Path) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] RGB of a JPEG or PNG; grey is repeated, CMYK converted, transparency dropped.

    EXIF orientation is not applied: boxes and maps refer to the pixels as they are stored, and official evaluation
    reads them so. (Pictures that people hand in for prediction are turned upright: `ops.images`.)
    Raises ValueError naming a file that is missing, damaged or cut short.
    """
    content = np.fromfile(file, np.uint8) if file.is_file() else np.zeros(0, np.uint8)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(content, flags) if len(content) else None
    if pixels is None:
        raise _unreadable(file)
    if content[:2].tobytes() == b"\xff\xd8":
        # OpenCV paints what is lacking of a JPEG grey and says nothing; some writers pad, so only a missing end counts
        end = content.tobytes().rstrip(b"\0")[-64:]
        if _END_OF_JPEG not in end:
            raise ValueError(f"{file} is cut short: its JPEG data has no end; a whole file is needed; fetch it again")
    return np.asarray(pixels, np.uint8)


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
    """A PNG as stored: [H, W] or [H, W, 3 or 4] (BGR, BGRA), uint8 or uint16; palettes come out as colours."""
    values = cv2.imread(str(file), cv2.IMREAD_UNCHANGED) if file.is_file() else None
    if values is None:
        raise _unreadable(file)
    return values


def _unreadable(file: Path) -> ValueError:
    return ValueError(f"{file} is missing or no readable image; a JPEG or PNG is expected; fetch or prepare it again")
