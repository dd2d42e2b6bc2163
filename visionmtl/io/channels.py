"""Images of any number of channels: .npy, TIFF with all its bands, PNG; brought to 8 bits by a declared range."""

import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionmtl.io.depth_maps import read_array
from visionmtl.io.image_headers import check_pixels
from visionmtl.io.images import read_stored, stored_mode
from visionmtl.io.paths import regular_file

_BAND_AXES = "CSQI"  # tifffile's names of what is neither rows nor columns


def read_channels(file: Path) -> NDArray:
    """All channels of an image as stored, [H, W, C], in the order of the file (RGB for colour). Nothing is converted.

    Raises ValueError naming a file that is damaged or holds more than one image of such channels.
    """
    ending = file.suffix.lower()
    if ending == ".npy":
        values = read_array(file)
    elif ending in (".tif", ".tiff"):
        values = _read_tiff(file)
    else:
        values = read_stored(file)
        if values.ndim == 3:  # OpenCV gives BGR, BGRA
            is_grey_with_alpha = values.shape[2] == 4 and stored_mode(file) == "LA"  # which OpenCV gives three times
            values = values[..., [2, 3] if is_grey_with_alpha else [2, 1, 0, *range(3, values.shape[2])]]
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.dtype.kind not in "uif" or 0 in values.shape:
        raise ValueError(
            f"{file} is {values.dtype} {list(values.shape)}; an image is [H, W] or [H, W, channels] of whole numbers "
            "or floats; write it so"
        )
    return values


def _read_tiff(file: Path) -> NDArray:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(
            f"{file} is a TIFF to be read with all its channels, and the package tifffile is not installed; .npy and "
            "PNG need none; pip install 'visionmtl[formats]'"
        ) from error
    # what tifffile raises for damaged files, and for compressions that need the package imagecodecs
    damaged = (
        tifffile.TiffFileError, OSError, ValueError, LookupError, TypeError, EOFError, ArithmeticError, struct.error,
        zlib.error,
    )  # fmt: skip
    try:
        opened = tifffile.TiffFile(regular_file(file))
    except damaged as error:
        raise _no_tiff(file, error) from error
    with opened:
        try:
            series = opened.series[0]
            axes, shape = series.axes, tuple(map(int, series.shape))
        except damaged as error:
            raise _no_tiff(file, error) from error
        bands = [at for at, axis in enumerate(axes) if axis in _BAND_AXES]
        if sorted(axes.translate({ord(axis): None for axis in _BAND_AXES})) != ["X", "Y"] or len(bands) > 1:
            raise ValueError(
                f"{file} has the axes {axes} {list(shape)}; rows, columns and one of bands are read; split it into "
                "files"
            )
        check_pixels(file, shape[axes.index("Y")], shape[axes.index("X")], math.prod(shape[at] for at in bands))
        try:
            values = np.asarray(series.asarray())
        except damaged as error:
            raise _no_tiff(file, error) from error
    return np.moveaxis(values, bands[0], -1) if bands else values


def _no_tiff(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} cannot be read as TIFF: {error}; a whole file, uncompressed or with deflate, is needed; write it again"
    )


def to_bytes(values: NDArray, value_range: tuple[float, float] | None, file: Path, setting: str) -> NDArray[np.uint8]:
    """uint8 of the same shape: `value_range` becomes 0 to 255, rounded; what lies beyond is clipped, NaN is 0.

    Without a range, values of 8 bits stay as they are, and others raise ValueError; `setting` is where it is set.
    """
    if value_range is None:
        if values.dtype == np.uint8:
            return values
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values.ravel()
        low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
        raise ValueError(
            f"{file} is {values.dtype}, {low:g} to {high:g}; the network sees 8 bits, and what is black and white "
            f"there is not known; set {setting}: [LOW, HIGH]"
        )
    low, high = value_range
    scaled = (np.nan_to_num(values.astype(np.float32), nan=low) - low) * np.float32(255 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
