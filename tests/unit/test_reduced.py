"""Images decoded at a fraction of their size show what whole ones show, in the same place; labels stay untouched."""

import cv2
import numpy as np
import pytest
from PIL import Image

from visionmtl.data.transforms.augment import Augment
from visionmtl.data.transforms.crop_resize import CropParams, CropResize
from visionmtl.datasets import read_part
from visionmtl.datasets.folder import Folder
from visionmtl.datasets.nyuv2 import NYUv2
from visionmtl.io.images import read_image, read_photo
from visionmtl.structures import EVERYTHING, ReadRequest, Sample

ORIENTATION = 0x0112
SIZE = (96, 128)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture without fine detail, different everywhere: what moves, by however little, changes."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    channels = [128 + 100 * np.sin(x / 31 + y / 53), 128 + 100 * np.cos(y / 37), 255 * x / width]
    return np.stack(channels, axis=2).astype(np.uint8)


def save(path, pixels: np.ndarray, orientation: int = 1, mode: str = "RGB", **options):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).convert(mode).save(path, quality=97, exif=exif, **options)
    return path


@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(512, 768), (513, 771), (250, 333)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"mode": "L"}, {"mode": "CMYK"}])
def test_a_reduced_photo_shows_squares_of_the_whole_one(tmp_path, size, divisor, options):
    file = save(tmp_path / "a.jpg", smooth(*size), **options)
    seen = []
    for upright in (False, True):
        pixels, *photo = read_photo(file, lambda full: seen.append(full) or divisor, upright)
        assert tuple(photo) == (size, divisor) and seen.pop() == size
        assert pixels.shape == (*(-(-side // divisor) for side in size), 3)

        h, w = (side // divisor * divisor for side in size)
        squares = read_photo(file)[0][:h, :w].reshape(h // divisor, divisor, w // divisor, divisor, 3).mean(axis=(1, 3))
        difference = np.abs(pixels[: h // divisor, : w // divisor] - squares)
        assert difference.mean() < 1 and difference.max() < 12


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("size", [(512, 768), (516, 772), (513, 768)])
def test_upright_photos_are_reduced_where_turning_moves_nothing(tmp_path, orientation, size):
    file = save(tmp_path / "a.jpg", smooth(*size), orientation)
    whole = read_image(file)
    pixels, full_size, jpeg_scale = read_photo(file, lambda full: 8 if full == whole.shape[:2] else 0, upright=True)

    allowed = 8 if orientation in (0, 1, 9) else {512: 8, 516: 4, 513: 1}[size[0]]
    assert jpeg_scale == allowed and full_size == whole.shape[:2]
    h, w = (side // allowed for side in full_size)
    squares = whole[: h * allowed, : w * allowed].reshape(h, allowed, w, allowed, 3).mean(axis=(1, 3))
    assert np.abs(pixels[:h, :w] - squares).mean() < 1


def test_a_png_is_read_whole_and_nobody_asks(tmp_path):
    Image.fromarray(smooth(64, 64)).save(tmp_path / "a.png")
    for upright in (False, True):
        pixels, _, jpeg_scale = read_photo(tmp_path / "a.png", lambda full: pytest.fail("asked"), upright)
        assert jpeg_scale == 1 and pixels.shape == (64, 64, 3)


@pytest.mark.parametrize("upright", [False, True])
def test_a_damaged_jpeg_is_named_when_reduced_too(tmp_path, upright):
    whole = save(tmp_path / "a.jpg", smooth(256, 256)).read_bytes()
    for content in (whole[:-40], whole[:100], b"\xff\xd8\xff"):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"a.jpg (is|cannot)"):
            read_photo(tmp_path / "a.jpg", lambda full: 2, upright)


@pytest.mark.parametrize("seed", range(40))
def test_a_window_on_the_grid_moves_by_less_than_a_pixel_of_the_view(seed):
    rng = np.random.default_rng(seed)
    original, zoom = tuple(int(side) for side in rng.integers(60, 1500, 2)), float(rng.uniform(0.7, 2))
    params = CropParams(zoom, rng.random(), rng.random())
    fine, crop = CropResize._cut(original, SIZE, params), CropResize.cut(original, SIZE, params)

    k = crop.jpeg_scale
    assert all(value % k == 0 for value in (crop.top, crop.left, *crop.size)) and crop.out == fine.out
    assert k == 1 or all(side // k >= out - 1 for side, out in zip(crop.size, crop.out, strict=True))  # rounding
    smaller = CropParams(zoom * float(rng.uniform(0.3, 1)), rng.random(), rng.random())
    assert CropResize.cut(original, SIZE, smaller).jpeg_scale % k == 0
    for moved in (crop.top - fine.top, crop.left - fine.left, *np.subtract(crop.size, fine.size)):
        assert -k < moved <= 0 and abs(moved) * max(crop.scale) < 1
    if max(crop.scale) > 0.51:
        assert k == 1 and (crop.top, crop.left, crop.size) == (fine.top, fine.left, fine.size)


@pytest.mark.parametrize("seed", range(12))
def test_a_view_of_a_reduced_photo_is_that_of_the_whole_one(tmp_path, seed):
    rng = np.random.default_rng(seed)
    size = tuple(int(side) for side in rng.integers(400, 1300, 2))
    file, augment = save(tmp_path / "a.jpg", smooth(*size)), Augment(zoom=(1.0, 2.0), flip=0.5)
    params = augment.draw(rng)
    whole = Sample(image=read_photo(file)[0], image_id="")
    pixels, full_size, jpeg_scale = read_photo(file, lambda full: CropResize.cut(full, SIZE, params).jpeg_scale)
    part = Sample(image=pixels, image_id="", full_size=full_size, jpeg_scale=jpeg_scale)

    one, other = (augment.view(sample, SIZE, params, rng).image for sample in (whole, part))
    assert jpeg_scale > 1 and one.shape == other.shape
    assert np.abs(one.astype(int) - other).mean() < 1.5  # a grey level; the picture changes by up to 7 in a pixel
    (x, y), _ = cv2.phaseCorrelate(one[..., 0].astype(np.float64), other[..., 0].astype(np.float64))
    assert abs(x) < 0.1 and abs(y) < 0.1


def test_labels_that_are_not_wanted_are_not_opened(tmp_path):
    (tmp_path / "images").mkdir()
    save(tmp_path / "images" / "a.jpg", smooth(64, 64))
    (tmp_path / "a.png").write_bytes(b"no picture")
    spec = {"files": "{stem}.png", "classes": ["floor"]}
    reader = Folder(root=str(tmp_path), images="images/*.jpg", segmentation=spec).build()

    assert read_part(reader, 0, ReadRequest(frozenset({"boxes"}))).segmentation is None
    with pytest.raises(ValueError, match=r"a.png is missing or no readable image"):
        read_part(reader, 0, EVERYTHING)


def test_a_reduced_image_keeps_the_labels_of_the_whole_one(real_data):
    reader = NYUv2(root=str(real_data / "nyuv2")).build()
    whole = reader.read(3)
    part = read_part(reader, 3, ReadRequest(EVERYTHING.fields, lambda size: 4))
    assert part.image.shape == (120, 160, 3) and part.size == whole.size == (480, 640)
    np.testing.assert_array_equal(part.segmentation, whole.segmentation)
    np.testing.assert_array_equal(part.depth_m, whole.depth_m)
    np.testing.assert_array_equal(part.boxes.xyxy, whole.boxes.xyxy)
