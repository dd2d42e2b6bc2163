"""Claims about `visionmtl.ops.images`: every common kind of image file reads as upright 8-bit RGB."""

import numpy as np
import pytest
from PIL import Image

from visionmtl.ops.images import read_image

RNG = np.random.default_rng(0)
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

    with pytest.raises(ValueError, match=rf"broken\.{suffix} cannot be read as an image: .*; it must be .*; fetch"):
        read_image(path)


def test_a_text_file_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "notes.jpg").write_text("not an image")

    with pytest.raises(ValueError, match=r"notes\.jpg cannot be read"):
        read_image(tmp_path / "notes.jpg")
    with pytest.raises(ValueError, match=r"nothing\.jpg is no file; .*; check the path"):
        read_image(tmp_path / "nothing.jpg")


def test_floats_are_refused_because_their_white_is_unknown(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")

    with pytest.raises(ValueError, match="holds floats"):
        read_image(tmp_path / "a.tif")
