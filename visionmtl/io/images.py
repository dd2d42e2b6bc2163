"""Image files as arrays, decoded whole or reduced, as stored or upright; label maps as the values they hold."""

import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from visionmtl.io import video
from visionmtl.io.atomic import write_bytes
from visionmtl.io.image_headers import (
    FORMATS,
    JPEG_START,
    PILLOW_ERRORS,
    PNG_START,
    TIFF_STARTS,
    check_content,
    checked_content,
    open_header,
    unreadable,
)
from visionmtl.io.paths import is_hidden, regular_file
from visionmtl.structures import JpegScale, at_full_size

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
_NOT_READ = (  # pictures all the same, and videos
    ".heic", ".heif", ".avif", ".gif", ".jxl", ".jp2", ".jfif", ".tga", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw",
    *video.SUFFIXES,
)  # fmt: skip

_JPEG_END = b"\xff\xd9"
_SAMPLES_PER_PIXEL = 277  # TIFF tag
_PNG_GREY, _PNG_PALETTE = 0, 3  # colour types in the header
_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
_TURNS = {  # by EXIF orientation: whether rows and columns change places first, then which axes are reversed
    2: (False, (1,)), 3: (False, (0, 1)), 4: (False, (0,)),
    5: (True, ()), 6: (True, (1,)), 7: (True, (0, 1)), 8: (True, (0,)),
}  # fmt: skip

Pixels = NDArray[np.uint8]


def read_image(path: str | Path) -> Pixels:
    """uint8 [H, W, 3] RGB of any image file, upright, as viewers show it; see `read_photo`."""
    return read_photo(Path(path), upright=True)[0]


def read_photo(
    file: Path, choose_scale: JpegScale = at_full_size, upright: bool = False
) -> tuple[Pixels, tuple[int, int], int]:
    """Pixels uint8 [h, w, 3] RGB, the (H, W) of the whole image, and the divisor by which a JPEG was reduced.

    choose_scale: asked about the whole (H, W), allows a JPEG to be decoded at a fraction of its size: h = H / divisor,
    rounded up. The decoder computes fewer frequencies of each block, which is within half a grey level of averaging
    squares of pixels and takes 0.6 to 0.8 of the time.
    upright: turned as the EXIF orientation says, and transparency shows white. Otherwise pixels are as stored, to which
    boxes and maps of data sets refer, and transparency is dropped.

    Grey is repeated over the channels, CMYK and palettes are converted, 16 bits keep the high byte, animations give
    their first frame. Raises ValueError naming a file that is missing, damaged, cut short or too large, see
    `image_headers.checked_content`.
    """
    return _decode_photo(file, *checked_content(file), choose_scale, upright)


def decode_photo(
    file: Path | str, content: bytes, choose_scale: JpegScale = at_full_size, upright: bool = False
) -> tuple[Pixels, tuple[int, int], int]:
    """As `read_photo`, of bytes that are there already. file: names them, for messages."""
    return _decode_photo(file, content, check_content(file, content), choose_scale, upright)


def _decode_photo(
    file: Path | str, content: bytes, size: tuple[int, int], choose_scale: JpegScale, upright: bool
) -> tuple[Pixels, tuple[int, int], int]:
    if content.startswith(JPEG_START):
        return _decode_jpeg(file, content, size, choose_scale, upright)
    if content.startswith(TIFF_STARTS):
        _check_colors(file, content)
    if upright:
        pixels = _decode_as_shown(file, content)
    else:
        pixels = np.asarray(_decode(file, content, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION), np.uint8)
    return pixels, (pixels.shape[0], pixels.shape[1]), 1


def _check_colors(file: Path | str, content: bytes) -> None:
    """Raise ValueError for a TIFF that is neither grey nor RGB, of which decoders would take a part in silence."""
    found = ""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            samples = opened.tag_v2.get(_SAMPLES_PER_PIXEL, 1)  # type: ignore[attr-defined]
            if opened.mode not in ("RGBA", "LA", "PA", "CMYK") and samples not in (1, 3):
                found = f"has {samples} channels"
            found = found or _several_pages(opened)
    except PILLOW_ERRORS:
        try:
            decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error:
            decoded = None
        if decoded is None or (decoded.ndim == 3 and decoded.shape[2] != 3):
            found = "is no TIFF of grey or RGB"
    if found:
        raise ValueError(
            f"{file} {found}; a photograph has one channel or three, and none is left out or mixed in silence; in a "
            "`folder`, set `channels` to their number (and model.encoder.in_chans), or write the three that you mean"
        )


def _several_pages(opened: Image.Image) -> str:
    """What is wrong with a file of which decoders would take the first page in silence; smaller previews may follow."""
    size, pages = opened.size, getattr(opened, "n_frames", 1)
    for page in range(1, pages):
        opened.seek(page)
        if opened.size == size:
            return f"has {pages} pages, of which two or more have one size"
    return ""


def image_size(file: Path, upright: bool) -> tuple[int, int]:
    """(H, W) of an image as `read_photo` gives it, from its header alone."""
    with open_header(file) as opened:
        size = opened.height, opened.width
        try:
            orientation = opened.getexif().get(ExifTags.Base.Orientation, 1) if upright else 1
        except PILLOW_ERRORS as error:
            raise unreadable(file, error) from error
    return size[::-1] if orientation in _TURNS and orientation >= 5 else size


def picture_format(path: Path) -> str:
    """Pillow's name of the format to write. Raises ValueError where the ending names none."""
    suffixes = {ending: name for ending, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} names no format of image files; endings such as .png, .jpg, .webp do; correct it")
    return suffixes[path.suffix.lower()]


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder and of those in it, by name; macOS's `._NAME` beside NAME is none."""
    return images_among(_files_below(folder, (folder.resolve(),)))


def _files_below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """above: real folders that this one lies in, itself included; a link back to one of them is not followed."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            if (real := entry.resolve()) not in above:
                yield from _files_below(entry, (*above, real))
        else:
            yield entry


def images_among(files: Iterable[Path]) -> list[Path]:
    """The image files among files, sorted; a warning counts pictures of formats that are not read."""
    files = sorted(files)
    if other := [file for file in files if file.suffix.lower() in _NOT_READ]:
        endings = " ".join(sorted({file.suffix.lower() for file in other}))
        warnings.warn(
            f"{len(other)} picture(s) or video(s) that are not read here ({endings}), as {other[0]}, are passed over; "
            f"{' '.join(SUFFIXES)} are read; convert pictures if they are meant, and name videos one by one",
            stacklevel=2,
        )
    return [file for file in files if file.suffix.lower() in SUFFIXES]


def check_pixels(images: Iterable[Pixels], in_chans: int) -> None:
    """Raise ValueError for an image in memory that is not uint8 [H, W, in_chans] of one pixel or more."""
    for number, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != in_chans:
            kind = "[H, W, 3] RGB" if in_chans == 3 else f"[H, W, {in_chans}], as training read it,"
            raise ValueError(
                f"image {number} is {image.dtype} {list(image.shape)}; uint8 {kind} is needed; "
                "read files with visionmtl.io.images.read_image, or convert the array"
            )
        if not image.size:
            raise ValueError(
                f"image {number} is {image.shape[0]}x{image.shape[1]} px; one pixel or more is needed; leave it out "
                "or correct how it is cut"
            )


def read_map(file: Path, size: tuple[int, ...]) -> NDArray:
    """The values of a PNG with one channel, uint8 or uint16 [H, W]; `size` is that of its image."""
    values = read_png(file)
    if values.shape != size:
        hint = " (a palette or colour picture has three)" if values.ndim == 3 else ""
        raise ValueError(
            f"{file} is {values.shape}, its image {size}; one value a pixel is expected{hint}; prepare it again"
        )
    return values


def read_png(file: Path, palette_indices: bool = False) -> NDArray:
    """A PNG as stored: [H, W] or [H, W, 3 or 4] (BGR, BGRA), uint8 or uint16; palettes come out as colours.

    palette_indices: palettes come out as their indices, uint8 [H, W], as PNGs of VOC mean them.

    Raises ValueError naming a file that is missing, damaged, of another format (a JPEG changes labels along their
    edges, whatever it is called), or grey with fewer than 8 bits (decoders stretch those: of 4 bits 1 becomes 17).
    """
    content, _ = checked_content(file)
    return _decode_png(file, content, palette_indices)


def write_png(file: Path, values: NDArray) -> None:
    """Write a PNG; three channels are BGR, as OpenCV has them. Raises OSError, and leaves nothing, where it fails.

    OpenCV's own `imwrite` calls a file that a full disk has cut off a success.
    """
    encoded, content = cv2.imencode(".png", values)
    assert encoded
    write_bytes(file, content.tobytes())


def decode_png(file: Path | str, content: bytes) -> NDArray:
    """As `read_png`, of bytes that are there already. file: names them, for messages."""
    check_content(file, content)
    return _decode_png(file, content, palette_indices=False)


def _decode_png(file: Path | str, content: bytes, palette_indices: bool) -> NDArray:
    values = _decode(file, content, cv2.IMREAD_UNCHANGED)
    if not content.startswith(PNG_START):
        raise ValueError(
            f"{file} is no PNG inside; values must be stored as they are, which JPEG does not; write it anew as PNG "
            "from the source"
        )
    bits, colour = content[24], content[25]  # of the header, which comes first
    if palette_indices and colour == _PNG_PALETTE:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            return np.array(opened, np.uint8)
    if colour == _PNG_GREY and bits < 8:
        raise ValueError(
            f"{file} stores {bits} bit(s) a pixel, which decoders stretch to 0..255, so that other values come out; 8 "
            "or 16 bits are needed; write it anew without optimising the bit depth"
        )
    return values


def read_stored(file: Path) -> NDArray:
    """The values of a TIFF (or another image) with one channel as stored, whatever their type; [H, W] or [H, W, C].

    Raises ValueError for a file of several pages, and for floats of 16 bits, which OpenCV does not read in TIFF.
    """
    content, _ = checked_content(file)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            found = _several_pages(opened)
    except PILLOW_ERRORS:  # floats of 64 bits, which OpenCV reads
        found = f"has {pages} pages" if (pages := cv2.imcount(str(file))) > 1 else ""
    if found:
        raise ValueError(f"{file} {found}; one image is read, and none is left out in silence; write it as a file each")
    try:
        return _decode(file, content, cv2.IMREAD_UNCHANGED)
    except ValueError as error:
        if file.suffix.lower() not in (".tif", ".tiff"):
            raise
        raise ValueError(f"{error}; floats in TIFF need 32 or 64 bits") from error


def is_turned(file: Path) -> bool:
    """Whether an EXIF orientation turns or mirrors the image; False for what cannot be opened."""
    try:
        with open_header(file) as opened:
            return opened.getexif().get(ExifTags.Base.Orientation, 1) in _TURNS
    except PILLOW_ERRORS:
        return False


def stored_mode(file: Path) -> str:
    """Pillow's name of what a pixel holds, as L, LA, RGB; "" for what cannot be opened."""
    try:
        with open_header(file) as opened:
            return opened.mode
    except PILLOW_ERRORS:
        return ""


def has_alpha(file: Path) -> bool:
    """Whether an image has an alpha channel, as its header says; False for what cannot be opened."""
    return stored_mode(file) in ("RGBA", "LA", "PA", "La", "RGBa")


def has_palette(file: Path) -> bool:
    """Whether a PNG stores indices into a palette; False for what is no PNG, or cannot be read."""
    try:
        with regular_file(file).open("rb") as stream:
            start = stream.read(26)
    except (OSError, ValueError):
        return False
    return start.startswith(PNG_START) and len(start) == 26 and start[25] == _PNG_PALETTE


def _decode_jpeg(
    file: Path | str, content: bytes, size: tuple[int, int], choose_scale: JpegScale, upright: bool
) -> tuple[Pixels, tuple[int, int], int]:
    """size: (H, W) as stored."""
    orientation = _orientation(file, content) if upright else 1
    divisor = choose_scale(size[::-1] if orientation >= 5 else size)
    # turning would move the incomplete pixels at the right and lower edge to the others, and everything with them
    while orientation in _TURNS and (size[0] % divisor or size[1] % divisor):
        divisor //= 2
    if divisor > 1:  # a reduced image comes as BGR only
        pixels = _decode(file, content, _REDUCED[divisor] | cv2.IMREAD_IGNORE_ORIENTATION)
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    else:
        pixels = _decode(file, content, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels.shape[:2] != tuple(-(-side // divisor) for side in size):
        raise unreadable(file, f"its header says {size[0]}x{size[1]} px, and other ones come out")
    # decoders paint what is missing grey and say nothing; some writers pad with zeros, so only a missing end counts
    if _JPEG_END not in content.rstrip(b"\0")[-64:]:
        raise ValueError(f"{file} is cut short: its JPEG data has no end; a whole file is needed; fetch it again")
    if orientation in _TURNS:
        transposed, reversed_axes = _TURNS[orientation]
        turned = pixels.transpose(1, 0, 2) if transposed else pixels
        pixels, size = np.ascontiguousarray(np.flip(turned, reversed_axes)), size[::-1] if transposed else size
    return np.asarray(pixels, np.uint8), size, divisor


def _orientation(file: Path | str, content: bytes) -> int:
    """As EXIF says, 1 to 8; 1 where it says nothing of use."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    except PILLOW_ERRORS as error:
        raise unreadable(file, error) from error
    return orientation if orientation in _TURNS else 1


def _decode_as_shown(file: Path | str, content: bytes) -> Pixels:
    """What is no JPEG, upright and with white where it is transparent."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except PILLOW_ERRORS as error:
        raise unreadable(file, error) from error
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        shown = (values >> 8).astype(np.uint8)
        shown[values == image.info.get("transparency", -1)] = 255
        return np.repeat(shown[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "integers of more bits than 8, perhaps with a sign,"
        raise ValueError(
            f"{file} holds {kind} whose white is unknown; 8 bits a channel, or 16 without a sign, are allowed; convert "
            "it to 8 bit with the range you mean"
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _decode(file: Path | str, content: bytes, flags: int) -> NDArray:
    try:
        values = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:  # a header that promises more pixels than OpenCV takes
        raise unreadable(file, "its header promises more pixels than can be decoded") from error
    if values is None:
        raise unreadable(file, "it cannot be decoded")
    return np.asarray(values)
