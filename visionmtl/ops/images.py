"""Image files as arrays, whatever their orientation, channels or depth; a file that is no image is named."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] RGB, turned as its EXIF orientation says.

    Grey is repeated over the channels, CMYK and palettes are converted, transparency shows white, 16 bit keeps its
    high byte, animations give their first frame. Raises ValueError naming the file that is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; an image file is needed ({' '.join(SUFFIXES)}); check the path")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as an image: {error}; it must be a complete {'/'.join(s[1:] for s in SUFFIXES)} "
            "file; fetch or convert it again, or leave it out"
        ) from error

    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{path} holds {'32-bit integers' if image.mode == 'I' else 'floats'}, whose white is unknown; "
            "8 or 16 bits a channel are allowed; convert it to 8 bit with the range you mean"
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))
