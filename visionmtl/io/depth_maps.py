"""Stored depth or disparity to metres, with a check of the unit."""

import io
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from tokenize import TokenError

import cv2
import numpy as np
from numpy.typing import NDArray

from visionmtl.io.image_headers import check_pixels
from visionmtl.io.images import read_png, read_stored
from visionmtl.io.paths import regular_file

PLAUSIBLE_M = (0.1, 300.0)
"""Where the middle of measured depths lies, from hand-held things to street views; air photographs lie beyond."""

_NUM_CHECKED = 4
_BAR = 40  # characters
# what numpy raises on a damaged header: also when it promises more values than memory holds
_UNREADABLE = (
    OSError, ValueError, EOFError, OverflowError, MemoryError, RecursionError, SyntaxError, TokenError, TypeError
)  # fmt: skip
_EXR_ERRORS = (RuntimeError, OSError, ValueError, LookupError)


def to_metres(
    stored: NDArray, metres_per_unit: float, file: Path, invalid: Sequence[float] = (0,)
) -> NDArray[np.float32]:
    """float32 [H, W], 0 = not measured: stored as one of `invalid`, as 0 or less, or not finite.

    Raises ValueError naming `file`, which the values are from, if it has more than one value a pixel.
    """
    if stored.ndim != 2 or stored.dtype.kind not in "uif":
        raise ValueError(
            f"{file} is {stored.dtype} {list(stored.shape)}; one number a pixel, [H, W], is expected (a palette or "
            "colour picture has three: it shows depth, it does not hold it); write it again as 16-bit grey PNG or .npy"
        )
    with np.errstate(over="ignore"):
        # floats of the file's precision: 65.535 in float32 is another number than in float64
        no_depth = np.asarray(invalid, stored.dtype if stored.dtype.kind == "f" else None)
        measured = np.isfinite(stored) & (stored > 0) & ~np.isin(stored, no_depth)
        metres = (np.where(measured, stored, 0).astype(np.float64) * metres_per_unit).astype(np.float32)
    metres[np.isinf(metres)] = 0  # finite as stored, in float64, and beyond float32 in metres
    return metres


def read_array(file: Path) -> NDArray:
    """A file of `numpy.save`; what would run code is refused. Raises ValueError naming a damaged file."""
    try:
        # mapped first: the file must be as long as its header says before memory is taken for it; and np.load would
        # also take a .npz under this name, and give no array
        mapped = np.lib.format.open_memmap(regular_file(file), mode="r")
    except _UNREADABLE as error:
        raise ValueError(
            f"{file} cannot be read as an array: {error}; a file of numpy.save is expected; write it again"
        ) from error
    if mapped.ndim > 1:
        check_pixels(file, mapped.shape[0], mapped.shape[1], int(np.prod(mapped.shape[2:], dtype=object)))
    return np.array(mapped)


def decode_array(file: Path | str, content: bytes) -> NDArray:
    """As `read_array`, of bytes that are there already, as a view of them. file: names them, for messages."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(stream)
        if is_fortran or dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
            raise ValueError(f"{dtype} {list(shape)} with {len(content) - stream.tell()} bytes of values")
        return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape)
    except _UNREADABLE as error:
        raise ValueError(
            f"{file} cannot be read as an array: {error}; a file of numpy.save is expected; write it again"
        ) from error


def to_codes(depth_m: NDArray[np.float32]) -> tuple[NDArray, NDArray[np.float32]] | None:
    """Codes of 8 or 16 bits and the table of their values, which `from_codes` turns into the same bits; None where
    there are more than 65,536 values, which measured depth never has."""
    bits, codes = np.unique(depth_m.view(np.uint32), return_inverse=True)
    if len(bits) > 65_536:
        return None
    small = len(bits) <= 256
    table = np.zeros(256 if small else len(bits), np.uint32)  # cv2.LUT takes 256
    table[: len(bits)] = bits
    narrow: NDArray = codes.reshape(depth_m.shape).astype(np.uint8 if small else np.uint16)
    return narrow, table.view(np.float32)


def from_codes(codes: NDArray, table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Undo `to_codes`. Raises IndexError for a code that the table does not have."""
    if codes.dtype == np.uint8:
        return np.asarray(cv2.LUT(codes, table), np.float32)
    return table[codes]


def read_depth(file: Path) -> NDArray:
    """The values of a depth file as stored, [H, W] where it is sound: .npy, PNG, TIFF or OpenEXR, by its ending.

    Of an EXR the channel Z, or V or Y, is read, or the only one there is; or R where R, G and B are equal.
    """
    ending = file.suffix.lower()
    if ending == ".npy":
        return read_array(file)
    if ending in (".tif", ".tiff"):
        return read_stored(file)
    return _read_exr(file) if ending == ".exr" else read_png(file)


def _read_exr(file: Path) -> NDArray:
    try:
        import OpenEXR
    except ImportError as error:
        raise ValueError(
            f"{file} is an OpenEXR file, and the package OpenEXR is not installed; .npy, PNG and TIFF need none; pip "
            "install 'visionmtl[formats]'"
        ) from error
    try:
        with OpenEXR.File(str(regular_file(file)), header_only=True) as opened:
            headers = [opened.header(part) for part in range(len(opened.parts))]
            windows = [[*map(int, (*header["dataWindow"][0], *header["dataWindow"][1]))] for header in headers]
            num_channels = sum(len(header["channels"]) for header in headers)
    except _EXR_ERRORS as error:
        raise _no_exr(file, error) from error
    for x1, y1, x2, y2 in windows:
        check_pixels(file, y2 - y1 + 1, x2 - x1 + 1, num_channels)
    try:
        with OpenEXR.File(str(file), separate_channels=True) as opened:
            channels = {name: channel.pixels for name, channel in opened.channels().items()}
    except _EXR_ERRORS as error:
        raise _no_exr(file, error) from error
    for name in ("Z", "V", "Y"):
        if name in channels:
            return np.asarray(channels[name])
    values = list(channels.values())
    if len(values) > 1 and not all(np.array_equal(values[0], other, equal_nan=True) for other in values[1:]):
        raise ValueError(
            f"{file} has the channels {', '.join(channels)}, which differ; depth is one channel, called Z, V or Y; "
            "write it alone"
        )
    return np.asarray(values[0])


def _no_exr(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} cannot be read as OpenEXR: {str(error) or type(error).__name__}; a complete file is needed; write it "
        "again"
    )


def check_positions(total: int) -> NDArray[np.int64]:
    """Positions of the few files, of `total`, that are read at the start to check the unit."""
    return np.unique(np.linspace(0, total - 1, _NUM_CHECKED).astype(np.int64))


def unit_notes(read: Callable[[int], NDArray[np.float32]], total: int, where: object, unit: str) -> list[str]:
    """What is odd about a few of `total` depth maps, one sentence at most; see `range_complaint`.

    read: gives the metres of the map at a position; where: names the maps
    """
    complaint = range_complaint([read(position) for position in check_positions(total).tolist()], unit)
    return [f"{where}: {complaint}"] if complaint else []


def range_complaint(depth_m: Sequence[NDArray[np.float32]], unit: str) -> str:
    """What is odd about the measured depths of some images, with their histogram; "" when they can be metres.

    unit: the setting that says what the stored values mean, its value, and usual ones
    """
    measured = np.concatenate([depth[depth > 0].ravel() for depth in depth_m]) if depth_m else np.zeros(0, np.float32)
    if not len(measured):
        return f"{len(depth_m)} depth files looked at hold no measured pixel; positive values are expected"
    middle, (low, high) = float(np.median(measured)), PLAUSIBLE_M
    if low <= middle <= high:
        return ""
    return (
        f"half of the measured depths are {'beyond' if middle > high else 'below'} {middle:.4g} m with {unit}; "
        f"{low:g} to {high:g} m is usual; correct the unit, or leave it if this is meant\n{histogram(measured)}"
    )


def histogram(metres: NDArray[np.float32]) -> str:
    """Decades of metres as lines of text: range, bar, share; the outermost are open."""
    edges = 10.0 ** np.arange(-3, 6)
    counts = np.bincount(np.searchsorted(edges, metres, side="right"), minlength=len(edges) + 1)
    names = [f"< {edges[0]:g}", *(f"{a:g} to {b:g}" for a, b in pairwise(edges)), f">= {edges[-1]:g}"]
    lines = []
    for number in range(np.flatnonzero(counts)[0], np.flatnonzero(counts)[-1] + 1):
        share = counts[number] / counts.sum()
        lines.append(f"  {names[number]:>16} m |{'#' * round(share * _BAR):<{_BAR}}| {share:6.1%}")
    return "\n".join(lines)


def depth_from_codes(
    codes: NDArray[np.uint16], baseline_m: float, focal_px: float, hidden: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """baseline * focal length / disparity, with the disparity in 16 bits as Cityscapes stores it.

    codes: uint16 [H, W]; disparity in pixels = (code - 1) / 256. Code 0 was not measured; code 1 is infinitely far.
    hidden: bool [H, W], pixels without a meaning (the car that carries the camera, borders)

    Returns float32 [H, W] metres along the optical axis, 0 where not measured, infinitely far or hidden.
    Each value is the float64 formula rounded once.
    """
    assert codes.dtype == np.uint16, codes.dtype
    # one value for each of the 65536 codes: as int64 first, since 0 - 1 is 65535 in uint16 and 1.85 m of false depth
    disparity_px = (np.arange(65536) - 1) / 256
    metres = np.zeros(65536)
    metres[2:] = baseline_m * focal_px / disparity_px[2:]
    depth: NDArray[np.float32] = metres.astype(np.float32)[codes]
    if hidden is not None:
        depth[hidden] = 0
    return depth
