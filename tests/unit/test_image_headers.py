"""What an image file promises is checked before a decoder takes memory for it, in every reader of pictures."""

import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from visionmtl.io import image_headers
from visionmtl.io.channels import read_channels
from visionmtl.io.depth_maps import read_depth
from visionmtl.io.image_headers import MAX_PIXELS, checked_content, max_pixels, open_header
from visionmtl.io.images import (
    has_alpha,
    has_palette,
    image_size,
    is_turned,
    read_image,
    read_photo,
    read_png,
    read_stored,
)

SHAPE = 13, 21
PIXELS = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), np.uint8)
READERS = {
    "as stored": read_photo,
    "as shown": lambda file: read_photo(file, upright=True),
    "reduced": lambda file: read_photo(file, lambda size: 2),
    "labels": lambda file: read_png(file, palette_indices=True),
    "values": read_stored,
    "channels": read_channels,
    "depth": read_depth,
}


def png_chunks(content: bytes) -> list[tuple[int, int, bytes]]:
    """(start, length, kind) of each."""
    at, chunks = 8, []
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        chunks.append((at, length, kind))
        at += 12 + length
    return chunks


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def palette_png(transparency: bool = True) -> bytes:
    picture = Image.fromarray(PIXELS).convert("P", palette=Image.Palette.ADAPTIVE)
    file = io.BytesIO()
    picture.save(file, "PNG", **({"transparency": bytes(range(200))} if transparency else {}))
    return file.getvalue()


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "bmp", "gif", "ppm", "pgm", "jp2"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_size_is_that_which_a_decoder_gives(tmp_path, ending, mode):
    file = tmp_path / f"a.{ending}"
    Image.fromarray(PIXELS).convert(mode).save(file)
    assert checked_content(file) == (file.read_bytes(), SHAPE) and image_size(file, upright=False) == SHAPE
    assert read_photo(file)[1] == SHAPE


@pytest.mark.parametrize("settings", [{"lossless": True}, {"exif": b"Exif\0\0"}, {"quality": 30}])
def test_the_size_of_each_kind_of_webp(tmp_path, settings):
    Image.fromarray(PIXELS).save(tmp_path / "a.webp", **settings)
    assert checked_content(tmp_path / "a.webp")[1] == SHAPE


@pytest.mark.parametrize("settings", [{"progressive": True}, {"restart_marker_blocks": 1}, {"comment": "x" * 60_000}])
def test_the_size_of_each_kind_of_jpeg(tmp_path, settings):
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", **settings)
    assert checked_content(tmp_path / "a.jpg")[1] == SHAPE


@pytest.mark.parametrize("name", ["coco/images/val2017", "cityscapes/gtFine/train/aachen", "nyuv2/depth/test"])
def test_real_files_pass(real_data: Path, name):
    files = [file for file in sorted((real_data / name).iterdir()) if file.suffix in (".jpg", ".png")][:30]
    assert files
    for file in files:
        with Image.open(file) as opened:
            assert checked_content(file)[1] == (opened.height, opened.width)


@pytest.mark.parametrize("reader", READERS)
def test_a_length_that_the_file_does_not_have_is_never_given_to_a_decoder(tmp_path, reader, monkeypatch):
    content = bytearray(cv2.imencode(".png", PIXELS)[1].tobytes()[:366])
    struct.pack_into(">I", content, png_chunks(bytes(content))[1][0], 0xFFFFFFF0)  # of its first IDAT: OpenCV's 4 GB
    (tmp_path / "a.png").write_bytes(content)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("was decoded"))
    with pytest.raises(
        ValueError, match=r"a\.png is .*chunk b'IDAT' at byte 33 promises 4294967280 bytes, of which 321 are"
    ):
        READERS[reader](tmp_path / "a.png")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"])
def test_a_png_with_a_wrong_checksum_is_damaged_for_every_reader(tmp_path, reader, kind):
    content = bytearray(palette_png())
    start, length, _ = next(one for one in png_chunks(bytes(content)) if one[2] == kind)
    content[start + 8 + length] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.png .*chunk {kind!r} at byte {start} has another checksum than its"):
        READERS[reader](tmp_path / "a.png")


def test_a_png_ends_with_its_last_chunk(tmp_path):
    content = palette_png()
    (tmp_path / "more.png").write_bytes(content + b"and more")
    assert read_png(tmp_path / "more.png").shape == (*SHAPE, 4)
    (tmp_path / "less.png").write_bytes(content[:-12])
    with pytest.raises(ValueError, match=r"less\.png .* is cut short"):
        read_png(tmp_path / "less.png")
    twice = content[:33] + content[8:]
    (tmp_path / "twice.png").write_bytes(twice)
    with pytest.raises(ValueError, match=r"twice\.png .* IHDR comes first, and once"):
        read_png(tmp_path / "twice.png")


def bomb(ending: str) -> bytes:
    """A small file that says it has 20,000 x 20,000 pixels."""
    if ending == "png":
        rows = zlib.compress(bytes(20_001) * 20)
        return (
            image_headers.PNG_START
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", rows)
            + chunk(b"IEND", b"")
        )
    if ending == "webp":
        return b"RIFF\x30\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (19_999).to_bytes(3, "little") * 2 + bytes(24)
    if ending == "ppm":
        return b"P5\n# a comment\n20000 20000\n255\n"
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, {"jpg": "JPEG", "tif": "TIFF", "bmp": "BMP", "gif": "GIF"}[ending])
    content = bytearray(file.getvalue())
    if ending == "jpg":
        struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, 20_000, 20_000)
    elif ending == "bmp":
        struct.pack_into("<ii", content, 18, 20_000, -20_000)
    elif ending == "gif":
        struct.pack_into("<HH", content, 6, 20_000, 20_000)
    else:
        for tag in (256, 257):
            at = content.index(struct.pack("<H", tag) + b"\x04\0\1\0\0\0")
            struct.pack_into("<I", content, at + 8, 20_000)
    return bytes(content)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "bmp", "gif", "ppm"])
def test_a_bomb_is_refused_by_every_reader_in_the_same_words(tmp_path, ending):
    file = tmp_path / f"a.{ending}"
    file.write_bytes(bomb(ending))
    assert file.stat().st_size < 400_000
    depth = {"depth": read_depth} if ending in ("png", "tif") else {}
    for read in [*READERS.values(), *depth.values(), lambda file: image_size(file, True), read_image]:
        if read is read_channels and ending == "tif":
            continue  # tifffile reads it, and finds that its pixels are not there
        with pytest.raises(ValueError, match=r"a\.\w+ is said to have 20000x20000 px, 400 million; at most 134\.2 mi"):
            read(file)
    assert not is_turned(file) and not has_alpha(file)


def test_arrays_tiffs_and_exrs_have_the_same_limit(tmp_path, monkeypatch):
    OpenEXR, tifffile = pytest.importorskip("OpenEXR"), pytest.importorskip("tifffile")
    np.save(tmp_path / "a.npy", np.ones(SHAPE, np.float32))
    tifffile.imwrite(tmp_path / "a.tif", np.ones((*SHAPE, 5), np.uint16), planarconfig="contig")
    OpenEXR.File({"type": OpenEXR.scanlineimage}, {"Z": np.ones(SHAPE, np.float32)}).write(str(tmp_path / "a.exr"))
    reads = [(read_depth, "a.npy"), (read_depth, "a.exr"), (read_channels, "a.npy"), (read_channels, "a.tif")]
    assert [read(tmp_path / name).shape[:2] for read, name in reads] == [SHAPE] * 4
    monkeypatch.setattr(image_headers, "max_pixels", lambda: SHAPE[0] * SHAPE[1] - 1)
    for read, name in reads:
        times = " of 5 channels" if name == "a.tif" else ""
        with pytest.raises(ValueError, match=rf"{name} is said to have 13x21 px{times}, "):
            read(tmp_path / name)


def test_an_array_that_promises_more_than_its_file_holds_takes_no_memory(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 2)))
    content = (tmp_path / "a.npy").read_bytes().replace(b"(2, 2), }", b"(2e4, }  "[:0] + b"(99999, 9999), }"[:16])
    header = content[:10] + content[10:].replace(b" " * 7, b"", 1)
    (tmp_path / "a.npy").write_bytes(header)
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as an array: mmap length is greater than file size"):
        read_depth(tmp_path / "a.npy")


def test_the_environment_sets_the_limit_for_all(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    try:
        for text, passes in (("273", True), ("272", False)):
            monkeypatch.setenv("VISIONMTL_MAX_PIXELS", text)
            max_pixels.cache_clear()
            if passes:
                assert read_image(tmp_path / "a.png").shape[:2] == SHAPE
            else:
                with pytest.raises(ValueError, match=r"set the environment variable VISIONMTL_MAX_PIXELS=273 if you"):
                    read_image(tmp_path / "a.png")
        monkeypatch.setenv("VISIONMTL_MAX_PIXELS", "many")
        max_pixels.cache_clear()
        with pytest.raises(ValueError, match=r"VISIONMTL_MAX_PIXELS is 'many'; a whole number"):
            read_image(tmp_path / "a.png")
    finally:
        monkeypatch.undo()
        max_pixels.cache_clear()
    assert max_pixels() == MAX_PIXELS == 2**27


def test_pillows_own_limit_does_not_stand_below_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # it warns from there, and refuses from twice as many
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == PIXELS).all()


def test_a_jpeg_of_very_many_scans_is_refused(tmp_path):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(content[:-2] + content[last:-2] * 200 + content[-2:])
    with pytest.raises(ValueError, match=r"a\.jpg .* it has 2\d\d scans, where about ten are usual"):
        read_photo(tmp_path / "a.jpg")


def test_a_file_that_runs_a_program_is_no_image(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.eps")  # Pillow would give it to Ghostscript
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    for read in (*READERS.values(), lambda file: image_size(file, True)):
        with pytest.raises(ValueError, match=r"a\.png .* of no image format that is read"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("reader", READERS)
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path, reader):
    for ending in ("png", "jpg", "tif", "npy", "exr"):
        os.mkfifo(tmp_path / f"a.{ending}")
        with pytest.raises(ValueError, match=rf"a\.{ending} .*is a named pipe"):
            READERS[reader](tmp_path / f"a.{ending}")
        assert not has_palette(tmp_path / f"a.{ending}") and not is_turned(tmp_path / f"a.{ending}")


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(ValueError, match=r"a\.png has 1099\.5 GB; at most 134\.2 million pixels"):
        read_png(tmp_path / "a.png")


def test_a_tiff_without_its_dimensions_is_refused_by_name(tmp_path: Path):
    """Pillow raises TypeError for it."""
    file = tmp_path / "a.tif"
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(file)
    content = file.read_bytes()
    width = b"\x00\x01\x04\x00" if b"\x00\x01\x04\x00" in content else b"\x00\x01\x03\x00"  # tag 256, its type
    assert content.count(width) == 1
    file.write_bytes(content.replace(width, b"\xff\xfe" + width[2:]))
    with pytest.raises(ValueError, match=r"a\.tif"):
        checked_content(file)
    with pytest.raises(ValueError, match=r"a\.tif"):
        open_header(file)
