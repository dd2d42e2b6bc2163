"""Image files as arrays, whatever their orientation, channels or depth; a file that is no image is named."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, JpegImagePlugin

from visionmtl.structures import JpegScale, at_full_size

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

_TURNED = range(2, 9)  # EXIF orientations
LYING = range(5, 9)  # those that exchange height and width
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are missing, damaged or no images."""


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] RGB, turned as its EXIF orientation says.

    Grey is repeated over the channels, CMYK and palettes are converted, transparency shows white, 16 bit keeps its
    high byte, animations give their first frame. Raises ValueError naming the file that is missing or damaged.
    """
    return read_upright(Path(path), at_full_size)[0]


def read_upright(path: Path, choose_scale: JpegScale) -> tuple[NDArray[np.uint8], tuple[int, int], int]:
    """As `read_image`, but a JPEG is decoded at the fraction of its size that `choose_scale` allows; see `ops.photos`.

    choose_scale: is asked about the upright (H, W)
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; an image file is needed ({' '.join(SUFFIXES)}); check the path")
    try:
        with Image.open(path) as opened:
            size, jpeg_scale = _reduce(opened, choose_scale)
            image = ImageOps.exif_transpose(opened)
            image.load()
    except UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as an image: {error}; it must be a complete {'/'.join(s[1:] for s in SUFFIXES)} "
            "file; fetch or convert it again, or leave it out"
        ) from error

    return _to_rgb(image, path), size, jpeg_scale


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder by name; macOS's `._NAME` beside NAME is none."""
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )


def _reduce(opened: ImageFile.ImageFile, choose_scale: JpegScale) -> tuple[tuple[int, int], int]:
    """Have a JPEG decoded at a fraction; returns the (H, W) of the whole image, upright, and the divisor."""
    width, height = opened.size
    orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    size = (width, height) if orientation in LYING else (height, width)
    jpeg_scale = choose_scale(size) if isinstance(opened, JpegImagePlugin.JpegImageFile) else 1
    # turning would move the incomplete pixels at the right and lower edge to the others, and everything by their part
    while orientation in _TURNED and (height % jpeg_scale or width % jpeg_scale):
        jpeg_scale //= 2
    if jpeg_scale > 1:
        opened.draft("RGB", (width // jpeg_scale, height // jpeg_scale))
        assert opened.size == (-(-width // jpeg_scale), -(-height // jpeg_scale))
    return size, jpeg_scale


def _to_rgb(image: Image.Image, path: Path) -> NDArray[np.uint8]:
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
