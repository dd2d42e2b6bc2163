"""Image files read as 8-bit RGB, upright or as stored, and maps as their values; a damaged file is named."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from visionmtl.io.images import list_images, read_image, read_map, read_photo, read_png

RNG = np.random.default_rng(0)
SMOOTH = np.stack(np.meshgrid(np.arange(0, 250, 10), np.arange(0, 200, 10)) * 2, axis=2)[..., :3].astype(np.uint8)
SIZE = SMOOTH.shape[:2]
PIXELS = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def test_a_png_reads_as_the_rgb_that_was_written(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")

    image = read_image(tmp_path / "a.png")

    assert image.dtype == np.uint8 and (image == PIXELS).all() and image.flags.writeable


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to show": a phone held upright
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)

    assert (read_image(tmp_path / "a.png") == np.rot90(PIXELS, -1)).all()


def test_grey_is_repeated_over_the_channels(tmp_path):
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "a.png")

    assert (read_image(tmp_path / "a.png") == PIXELS[..., :1]).all()


def test_transparency_shows_white(tmp_path):
    alpha = np.full((6, 9, 1), 255, np.uint8)
    alpha[0, 0] = 0
    Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)).save(tmp_path / "a.png")

    image = read_image(tmp_path / "a.png")

    assert (image[0, 0] == 255).all() and (image[1:] == PIXELS[1:]).all()


def test_a_transparent_value_of_sixteen_bits_shows_white(tmp_path):
    Image.fromarray(np.array([[0, 1000], [1001, 65535]], np.uint16)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    body, at = b"tRNS" + struct.pack(">H", 1000), content.index(b"IDAT") - 4
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(content[:at] + chunk + content[at:])

    assert read_image(tmp_path / "a.png")[..., 0].tolist() == [[0, 255], [3, 255]]


def test_sixteen_bit_keeps_its_high_byte(tmp_path):
    Image.fromarray(np.full((4, 4), 0xABCD, np.uint16)).save(tmp_path / "a.png")

    assert (read_image(tmp_path / "a.png") == 0xAB).all()


def test_cmyk_and_palettes_are_converted(tmp_path):
    flat = Image.new("RGB", (16, 16), (204, 51, 102))
    flat.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    flat.convert("P").save(tmp_path / "b.gif")

    for name in ("a.jpg", "b.gif"):
        assert np.abs(read_image(tmp_path / name).astype(int) - (204, 51, 102)).max() <= 6  # JPEG rounds


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_file_is_named_with_a_way_out(tmp_path, suffix):
    big = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8))
    path = tmp_path / f"broken.{suffix}"
    big.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(
        ValueError,
        match=rf"broken\.{suffix} is (cut short|missing or no readable image): .*; fetch",
    ):
        read_image(path)


def test_a_text_file_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "notes.jpg").write_text("not an image")

    with pytest.raises(ValueError, match=r"notes\.jpg is missing or no readable image"):
        read_image(tmp_path / "notes.jpg")
    with pytest.raises(ValueError, match=r"nothing\.jpg is missing .*; .*correct the path"):
        read_image(tmp_path / "nothing.jpg")


def test_floats_are_refused_because_their_white_is_unknown(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")

    with pytest.raises(ValueError, match="holds floats"):
        read_image(tmp_path / "a.tif")


def test_a_jpeg_reads_as_rgb(tmp_path):
    Image.fromarray(SMOOTH).save(tmp_path / "a.jpg", quality=95)
    expected = np.array(Image.open(tmp_path / "a.jpg"))
    assert np.abs(read_photo(tmp_path / "a.jpg")[0].astype(int) - expected).max() <= 2  # decoders round differently


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SMOOTH).save(tmp_path / "a.jpg", exif=exif)
    assert read_photo(tmp_path / "a.jpg")[0].shape == SMOOTH.shape


@pytest.mark.parametrize(("mode", "name"), [("L", "a.jpg"), ("CMYK", "a.jpg"), ("RGBA", "a.png"), ("P", "a.png")])
def test_grey_cmyk_alpha_and_palettes_become_rgb(tmp_path, mode, name):
    image = Image.fromarray(SMOOTH).convert(mode)
    image.save(tmp_path / name)
    expected = np.array(image.convert("RGB")).astype(int)
    assert np.abs(read_photo(tmp_path / name)[0] - expected).mean() < 4  # JPEG loses a little


@pytest.mark.parametrize("cut", [1, 2, 50, 400])
@pytest.mark.parametrize("name", ["a.jpg", "progressive.jpg", "a.png"])
def test_a_photo_cut_short_is_named(tmp_path, name, cut):
    Image.fromarray(SMOOTH).save(tmp_path / name, **({"progressive": True} if "pro" in name else {}))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-cut])
    with pytest.raises(ValueError, match=rf"{name} is (cut short|missing or no readable image)"):
        read_photo(tmp_path / name)


def test_zeros_after_the_end_of_a_jpeg_are_no_damage(tmp_path):
    Image.fromarray(SMOOTH).save(tmp_path / "a.jpg")
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(bytes(1000))
    assert read_photo(tmp_path / "a.jpg")[0].shape == SMOOTH.shape


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_what_is_no_image_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    for read in (read_photo, read_png):
        with pytest.raises(ValueError, match=r"a.jpg is missing or no readable image: .*; .* fetch"):
            read(tmp_path / "a.jpg")


def test_a_map_keeps_its_values(tmp_path):
    for values in (np.arange(500, dtype=np.uint16).reshape(20, 25), np.full((20, 25), 7, np.uint8)):
        cv2.imwrite(str(tmp_path / "a.png"), values)
        found = read_map(tmp_path / "a.png", SIZE)
        assert found.dtype == values.dtype and (found == values).all()


def test_a_palette_png_where_values_are_meant_is_named(tmp_path):
    Image.fromarray(SMOOTH).convert("P").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png is \(20, 25, 3\).*a palette or colour picture has three"):
        read_map(tmp_path / "a.png", SIZE)


def test_sidecars_of_macos_are_no_images(tmp_path):
    for name in ("b.PNG", "a.jpg", "._a.jpg", "notes.txt"):
        (tmp_path / name).touch()

    assert [file.name for file in list_images(tmp_path)] == ["a.jpg", "b.PNG"]


def test_images_in_folders_of_a_folder_are_its_images_once(tmp_path):
    (tmp_path / "in" / ".cache").mkdir(parents=True)
    for name in ("b.png", "in/a.jpg", "in/.cache/c.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "in" / "back").symlink_to(tmp_path)

    assert [file.relative_to(tmp_path).as_posix() for file in list_images(tmp_path)] == ["b.png", "in/a.jpg"]


def test_pictures_of_formats_that_are_not_read_are_counted(tmp_path):
    for name in ("b.png", "a.JPG", "c.HEIC", "d.gif", "notes.txt"):
        (tmp_path / name).touch()

    with pytest.warns(
        UserWarning, match=r"2 picture\(s\) or video\(s\) that are not read here \(\.gif \.heic\), as .*c\.HEIC"
    ):
        assert [file.name for file in list_images(tmp_path)] == ["a.JPG", "b.png"]


@pytest.mark.parametrize("orientation", range(10))
def test_an_upright_jpeg_is_turned_as_pillow_turns_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(SMOOTH).save(tmp_path / "a.jpg", exif=exif, quality=95)
    expected = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))).astype(int)

    assert np.abs(read_image(tmp_path / "a.jpg") - expected).max() <= 2  # decoders round differently


def test_a_picture_handed_in_and_the_same_of_a_data_set_are_one_to_the_bit(tmp_path):
    Image.fromarray(SMOOTH).save(tmp_path / "a.jpg")

    assert (read_image(tmp_path / "a.jpg") == read_photo(tmp_path / "a.jpg")[0]).all()


@pytest.mark.parametrize("upright", [False, True])
def test_a_jpeg_whose_header_promises_a_flood_of_pixels_is_refused(tmp_path, upright):
    Image.fromarray(SMOOTH).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    at = content.index(b"\xff\xc0") + 5
    (tmp_path / "a.jpg").write_bytes(content[:at] + struct.pack(">HH", 40_000, 40_000) + content[at + 4 :])
    with pytest.raises(ValueError, match=r"a\.jpg is said to have 40000x40000 px, 1600 million; at most"):
        read_photo(tmp_path / "a.jpg", lambda full: 1, upright)
