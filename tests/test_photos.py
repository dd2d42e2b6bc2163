"""Claims about `visionmtl.ops.photos`: pixels as stored, whatever the file's kind; a damaged file is named."""

import cv2
import numpy as np
import pytest
from PIL import Image

from visionmtl.ops.photos import read_map, read_photo, read_png

SMOOTH = np.stack(np.meshgrid(np.arange(0, 250, 10), np.arange(0, 200, 10)) * 2, axis=2)[..., :3].astype(np.uint8)
SIZE = SMOOTH.shape[:2]


def test_a_jpeg_reads_as_rgb(tmp_path):
    Image.fromarray(SMOOTH).save(tmp_path / "a.jpg", quality=95)
    expected = np.array(Image.open(tmp_path / "a.jpg"))
    assert np.abs(read_photo(tmp_path / "a.jpg").astype(int) - expected).max() <= 2  # decoders round differently


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SMOOTH).save(tmp_path / "a.jpg", exif=exif)
    assert read_photo(tmp_path / "a.jpg").shape == SMOOTH.shape


@pytest.mark.parametrize(("mode", "name"), [("L", "a.jpg"), ("CMYK", "a.jpg"), ("RGBA", "a.png"), ("P", "a.png")])
def test_grey_cmyk_alpha_and_palettes_become_rgb(tmp_path, mode, name):
    image = Image.fromarray(SMOOTH).convert(mode)
    image.save(tmp_path / name)
    expected = np.array(image.convert("RGB")).astype(int)
    assert np.abs(read_photo(tmp_path / name) - expected).mean() < 4  # JPEG loses a little


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
    assert read_photo(tmp_path / "a.jpg").shape == SMOOTH.shape


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_what_is_no_image_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    for read in (read_photo, read_png):
        with pytest.raises(ValueError, match=r"a.jpg is missing or no readable image; .* fetch"):
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
