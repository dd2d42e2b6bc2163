"""Pictures of the wrong kind, in every reader of files: named with what to do, or read as what they show.

Photographs are read whatever their kind; maps, whose values are labels, are read as they are or not at all.
"""

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from bad_rows import Row, check, content, cut, make_folder, rows
from drawn_layouts import LAYOUTS, SIZE, smooth
from PIL import Image

PHOTOS = "coco cityscapes folder nyuv2"
STORED = "coco cityscapes nyuv2"  # read pixels as they are stored
MAPS = "cityscapes folder nyuv2"
DEPTHS = "cityscapes folder nyuv2"


def write(file: Path, pixels: np.ndarray, kind: str = ".png") -> None:
    """In the format of `kind`, whatever the file is called; colours in OpenCV's order."""
    done, data = cv2.imencode(kind, pixels)
    assert done
    file.write_bytes(data.tobytes())


def cut_jpeg(file: Path) -> None:
    """Most of it is pixels, so that these are what is lacking."""
    write(file, np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8), ".jpg")
    cut(file)


def pipe(file: Path) -> None:
    """In its place: opening it would wait for ever."""
    file.unlink()
    os.mkfifo(file)


def sixteen_bits(file: Path) -> np.ndarray:
    write(file, smooth(5)[..., ::-1].astype(np.uint16) * 256 + 255)
    return smooth(5)


def converted(mode: str, kind: str = "PNG"):
    def spoil(file: Path) -> np.ndarray:
        picture = Image.fromarray(smooth(5)).convert(mode)
        picture.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
        return np.array(picture.convert("RGB"))

    return spoil


def half_transparent(shown: int | None):
    """The left half is transparent: `shown` is seen there, or what is stored."""

    def spoil(file: Path) -> np.ndarray:
        pixels, left = smooth(5), np.s_[:, : SIZE[1] // 2]
        alpha = np.full((*SIZE, 1), 255, np.uint8)
        alpha[left] = 0
        Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(file, "PNG")
        if shown is not None:
            pixels[left] = shown
        return pixels

    return spoil


def rotated(kind: str):
    def spoil(file: Path) -> np.ndarray:
        exif = Image.Exif()
        exif[0x0112] = 6  # a phone held upright
        Image.fromarray(smooth(5)).save(file, kind, exif=exif)
        return smooth(5)

    return spoil


def map_of(values: np.ndarray, kind: str = ".png"):
    return lambda file: write(file, values, kind)


def palette(file: Path) -> None:
    picture = Image.fromarray(np.ones(SIZE, np.uint8)).convert("P")
    picture.putpalette([10, 20, 30] * 256)
    picture.save(file, "PNG")


def png(bits: int, width: int, height: int, data: bytes) -> bytes:
    """A grey PNG by its specification, of which OpenCV writes only some."""
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0),
        b"IDAT" + zlib.compress(data),
        b"IEND",
    ]
    packed = (struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


FOUR_BITS = png(4, SIZE[1], SIZE[0], (b"\0" + bytes([0x11] * (SIZE[1] // 2))) * SIZE[0])  # 1 everywhere
HUGE = png(8, 200_000, 200_000, b"\0")
EIGHT, SIXTEEN = np.ones(SIZE, np.uint8), np.ones(SIZE, np.uint16)
STUFF = {"maps": "stuffthingmaps"}
UNREADABLE = "missing or no readable image|cannot be read as an image|is no file"

ROWS = [
    *rows("truncated JPEG", PHOTOS, "photo", cut_jpeg, f"is cut short|{UNREADABLE}"),
    *rows("16-bit PNG", PHOTOS, "photo", sixteen_bits),
    *rows("palette PNG", PHOTOS, "photo", converted("P")),
    *rows("grayscale", PHOTOS, "photo", converted("L")),
    *rows("grayscale", PHOTOS, "photo", converted("L", "JPEG")),
    *rows("RGBA", STORED, "photo", half_transparent(None)),
    *rows("RGBA", "folder", "photo", half_transparent(255), noted="alpha channel, .*: transparency shows white"),
    *rows("EXIF-rotated", STORED, "photo", rotated("JPEG")),
    *rows("EXIF-rotated", STORED, "photo", rotated("PNG")),
    *rows("EXIF-rotated", "folder", "photo", rotated("JPEG"), "change `upright` if the image has an EXIF orientation"),
    *rows("EXIF-rotated", "folder", "photo", rotated("JPEG"), upright=False),
    *rows("CMYK JPEG", PHOTOS, "photo", converted("CMYK", "JPEG")),
    *rows("PNG called .jpg or JPEG called .png", PHOTOS, "photo", converted("RGB", "PNG")),
    *rows("PNG called .jpg or JPEG called .png", PHOTOS, "photo", converted("RGB", "JPEG")),
    *rows("zero bytes", PHOTOS, "photo", content(b""), UNREADABLE),
    *rows("a folder", PHOTOS, "photo", make_folder, "is a folder; only regular files"),
    *rows("a named pipe", PHOTOS, "photo", pipe, r"is a named pipe \(FIFO\); only regular files"),
    *rows("a named pipe", DEPTHS, "depth", pipe, r"is a named pipe \(FIFO\); only regular files"),
    *rows("a web page", PHOTOS, "photo", content("<html>404"), UNREADABLE),
    *rows("gigantic", PHOTOS, "photo", content(HUGE), "200000x200000 px, .* million; at most"),
    # maps of classes
    *rows("16-bit PNG", MAPS, "classes", map_of(SIXTEEN), "uint16"),
    *rows("16-bit PNG", "coco", "classes", map_of(np.ones((*SIZE, 3), np.uint16)), "three channels of 8 bits"),
    *rows("16-bit PNG", "coco", "stuff", map_of(SIXTEEN), "uint16 values that are no class", **STUFF),
    *rows("palette PNG", "cityscapes nyuv2", "classes", palette, "palette"),
    *rows("palette PNG", "folder", "classes", palette, noted="have a palette, whose indices are the values"),
    *rows("palette PNG", "coco", "stuff", palette, "palette", **STUFF),
    *rows("map as JPEG", f"coco {MAPS}", "classes", map_of(EIGHT, ".jpg"), "is no PNG inside"),
    *rows("map as JPEG", "coco", "stuff", map_of(EIGHT, ".jpg"), "is no PNG inside", **STUFF),
    *rows("4-bit PNG", f"coco {MAPS}", "classes", content(FOUR_BITS), r"stores 4 bit\(s\) a pixel"),
    *rows("4-bit PNG", "coco", "stuff", content(FOUR_BITS), r"stores 4 bit\(s\) a pixel", **STUFF),
    *rows("RGBA", MAPS, "classes", map_of(np.ones((*SIZE, 4), np.uint8)), "channel|one value a pixel"),
    *rows("RGBA", "coco", "classes", map_of(np.ones((*SIZE, 4), np.uint8)), "three channels of 8 bits"),
    *rows("map of another size", MAPS, "classes", map_of(EIGHT[1:]), "23"),
    *rows("map of another size", "coco", "classes", map_of(np.ones((9, 9, 3), np.uint8)), "size of its image"),
    *rows("truncated PNG", f"coco {MAPS}", "classes", cut, UNREADABLE),
    *rows("zero bytes", f"coco {MAPS}", "classes", content(b""), UNREADABLE),
    *rows("a folder", f"coco {MAPS}", "classes", make_folder, "is a folder; only regular files"),
    *rows("gigantic", f"coco {MAPS}", "classes", content(HUGE), "200000x200000 px, .* million; at most"),
    # depth and disparity
    *rows("palette PNG", DEPTHS, "depth", palette, "palette|is uint8"),
    *rows("8-bit PNG where 16 bits are meant", "cityscapes nyuv2", "depth", map_of(EIGHT), "is uint8"),
    *rows("map as JPEG", DEPTHS, "depth", map_of(EIGHT, ".jpg"), "is no PNG inside"),
    *rows("4-bit PNG", DEPTHS, "depth", content(FOUR_BITS), r"stores 4 bit\(s\) a pixel"),
    *rows("map of another size", DEPTHS, "depth", map_of(SIXTEEN[:, 1:] * 2000), "31"),
    *rows("truncated PNG", DEPTHS, "depth", cut, UNREADABLE),
    *rows("zero bytes", DEPTHS, "depth", content(b""), UNREADABLE),
    *rows("a folder", DEPTHS, "depth", make_folder, "is a folder; only regular files"),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A folder with every layout, to be copied."""
    root = tmp_path_factory.mktemp("drawn")
    for name, layout in LAYOUTS.items():
        (root / name).mkdir()
        layout.write(root / name)
    return root


@pytest.mark.parametrize("row", ROWS)
def test_a_picture_of_the_wrong_kind_is_named_or_read_as_what_it_shows(row: Row, drawn: Path, tmp_path: Path):
    check(row, drawn, tmp_path / "root")
