"""Images decoded after the loader are those that workers decode, to a rounding; labels are the same bit for bit."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import write_nyuv2
from PIL import Image
from pydantic import ValidationError
from write_jpegs import SIZES, picture, write_jpeg, write_jpegs

from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.data.loader import Data, TrainLoader
from visionmtl.datasets import open_datasets
from visionmtl.device_decode import _shown
from visionmtl.network import to_device
from visionmtl.structures import Batch, View
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.segmentation import Segmentation

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")  # of torchvision

CPU = torch.device("cpu")
SIZE = (96, 128)
AUGMENT = {"zoom": (0.7, 2.2), "flip": 0.5, "brightness": 0.3, "contrast": 0.4, "saturation": 0.3, "hue_turns": 0.1}
TASKS = {"boxes": Detection(), "classes": Segmentation(), "depth": Depth()}


def loader(spec: dict[str, Any], decode: str = "device", size=SIZE, **changes: Any) -> TrainLoader:
    """Batches of four. changes: of the augmentation."""
    augment = {**AUGMENT, **changes}
    plain = {"train": [spec], "val": [spec], "size": size, "workers": 0, "augment": augment, "decode": decode}
    data = Data.model_validate(plain)
    sources = open_datasets(data.train)
    tasks = {name: task for name, task in TASKS.items() if task.field in sources[0].provides}
    return TrainLoader(data, tasks, resolve_spaces(tasks, sources), sources, 4, seed=3)


def batches(spec: dict[str, Any], decode: str = "device", limit: int = 3, **changes: Any) -> list[Batch]:
    """The first of two epochs each, as the loader gives them."""
    of = loader(spec, decode, **changes)
    return [batch for epoch in range(2) for batch in itertools.islice(of.epoch(epoch), limit)]


def shown(batch: Batch, decoded: Batch, number: int) -> torch.Tensor:
    """The part of an image that is no padding."""
    height, width = batch.encoded.views[number].out
    return decoded.image[number, :, :height, :width].int()


def assert_same_labels(one: Batch, other: Batch) -> None:
    for task, targets in other.targets.items():
        assert torch.equal(one.labelled[task], other.labelled[task]) and other.labelled[task].any()
        assert all(torch.equal(one.targets[task][name], values) for name, values in targets.items())


def check_like_the_workers(spec: dict[str, Any], mean: float, **changes: Any) -> list[Batch]:
    """The batches of both ways, compared; those of the device, not decoded. mean: greatest difference of an image."""
    encoded = batches(spec, **changes)
    for one, other in zip(encoded, batches(spec, "workers", **changes), strict=True):
        decoded = to_device(one, CPU)
        assert_same_labels(decoded, other)
        assert decoded.encoded is None and decoded.image.shape == other.image.shape
        for number in range(len(other.image)):
            difference = (shown(one, decoded, number) - shown(one, other, number)).float()
            assert difference.abs().mean() < mean and difference.mean().abs() < 0.25  # rounded, not cut off
        # the mean grey, about which contrast turns by up to 0.4, differs by no more than the image
        torch.testing.assert_close(decoded.colour, other.colour, rtol=1e-5, atol=mean)
        outside = decoded.image.sum((1, 2, 3)) - torch.stack([shown(one, decoded, i).sum() for i in range(4)])
        assert (outside == 0).all()
    return encoded


# Workers round more often: pixels of a reduced size, and rows before columns are resized; both ways round at the end.
# Rounding is off by a quarter in the mean, so three of them that never cancel come to this.
LEVELS = 0.75


def test_views_are_those_of_the_workers_at_every_zoom(tmp_path):
    views = [view for one in check_like_the_workers(write_jpegs(tmp_path), LEVELS) for view in one.encoded.views]

    assert {view.mirrored for view in views} == {True, False} and {view.choose_scale for view in views} >= {1, 2}
    assert min(view.out[0] / view.crop[0] for view in views) < 0.5
    assert max(view.out[0] / view.crop[0] for view in views) > 1.5
    assert any(view.out[0] < SIZE[0] for view in views) and any(view.top > 0 for view in views)


@pytest.mark.parametrize("options", [{"mode": "L"}, {"progressive": True}, {"subsampling": 0}])
def test_every_kind_of_jpeg_shows_what_workers_read(tmp_path, options):
    check_like_the_workers(write_jpegs(tmp_path, 4, **options), LEVELS)


@pytest.mark.parametrize("orientation", range(10))
def test_photographs_are_turned_as_workers_turn_them(tmp_path, orientation):
    spec = write_jpegs(tmp_path, 4, ((150, 200), (97, 131)), orientation=orientation)
    check_like_the_workers(spec, LEVELS, limit=1)


def test_photographs_stay_as_stored_where_the_reader_says_so(tmp_path):
    spec = write_jpegs(tmp_path, 4, orientation=3)
    views = check_like_the_workers({**spec, "upright": False}, LEVELS)[0].encoded.views
    assert {view.orientation for view in views} == {1}


def test_what_a_worker_would_read_reduced_is_averaged_over_squares():
    values = torch.tensor([[10, 200, 10], [200, 10, 200], [10, 200, 10]], dtype=torch.uint8)
    squares = values.repeat_interleave(2, 0).repeat_interleave(2, 1).expand(3, 6, 6).clone()
    squares[:, ::2, ::2] += 8  # a pixel of each four: 2 more in the mean
    view = View("", 0, (6, 6), 1, top=2, left=0, crop=(4, 6), choose_scale=2, out=(2, 3), mirrored=True)
    assert torch.equal(_shown(squares, view)[0], values[1:].flip(1).float() + 2)


def test_a_batch_can_be_decoded_twice(tmp_path):
    batch = batches(write_jpegs(tmp_path, 4), limit=1)[0]
    one = to_device(batch, CPU)
    first = one.colour.clone()
    other = to_device(batch, CPU)
    assert batch.image.numel() == 0 and one.image.shape == (4, 3, *SIZE)
    assert torch.equal(one.image, other.image) and torch.equal(first, other.colour)
    assert to_device(one, CPU).image is one.image


def test_the_bytes_handed_over_are_those_of_the_files(tmp_path):
    found = batches(write_jpegs(tmp_path, 4), limit=1)[0].encoded
    files = [Path(view.file).read_bytes() for view in found.views]
    assert found.content.numpy().tobytes() == b"".join(files)
    assert [view.num_bytes for view in found.views] == [len(file) for file in files]


def test_without_colours_there_is_no_matrix(tmp_path):
    off = dict.fromkeys(("brightness", "contrast", "saturation", "hue_turns"), 0)
    batch = batches(write_jpegs(tmp_path, 4), limit=1, **off)[0]
    assert batch.colour is None and to_device(batch, CPU).colour is None


@pytest.mark.parametrize("size", [(288, 384), (96, 128)])
def test_real_photographs_of_coco_and_nyuv2(real_data, size):
    """Measured: 0.2 to 0.4 levels in the mean over images, 0.72 in the worst, which is of fine detail and reduced."""
    specs = [
        {"type": "coco", "root": str(real_data / "coco"), "labels": ["boxes", "segmentation"], "maps": "panoptic"},
        {"type": "nyuv2", "root": str(real_data / "nyuv2")},
    ]
    for spec in specs:
        check_like_the_workers(spec, 1.0, limit=2, size=size)


# What cannot work


def png(root: Path) -> dict[str, Any]:
    spec = write_jpegs(root, 4)
    for number in range(4):
        Image.open(root / f"images/{number}.jpg").save(root / f"images/{number}.jpg", "PNG")
    return spec


def one_png(root: Path) -> dict[str, Any]:
    spec = write_jpegs(root, 40)
    Image.open(root / "images/17.jpg").save(root / "images/17.png")
    (root / "images/17.jpg").unlink()
    return {**spec, "boxes": None}


def black_border(root: Path) -> dict[str, Any]:
    write_nyuv2.write_prepared(root, write_nyuv2.drawn_frames(4))
    return {"type": "nyuv2", "root": str(root), "black_border": True}


def nyuv2_png(root: Path) -> dict[str, Any]:
    return {**black_border(root), "black_border": False}


def scenes(root: Path) -> dict[str, Any]:
    return {"type": "scenes", "num_images": 5, "size": SIZE}


def cmyk(root: Path) -> dict[str, Any]:
    return write_jpegs(root, 4, mode="CMYK")


def cut_short(root: Path) -> dict[str, Any]:
    spec = write_jpegs(root, 4)
    file = root / "images/3.jpg"
    file.write_bytes(file.read_bytes()[:-100])
    return spec


def no_header(root: Path) -> dict[str, Any]:
    spec = write_jpegs(root, 4)
    (root / "images/0.jpg").write_bytes(b"\xff\xd8\xff\xd9")
    return spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (png, r"0.jpg is no JPEG inside; data.decode: device takes JPEGs alone; convert .* data.decode: workers"),
        (one_png, r"17.png is no JPEG inside"),
        (nyuv2_png, r"0001.png is no JPEG inside"),
        (
            black_border,
            r"0001.png cannot be handed over undecoded with black_border: true, .*; set black_border: false",
        ),
        (scenes, r"data set scenes gives image \S+ as pixels, .*; data.decode: device decodes JPEGs alone.*; set"),
        (cmyk, r"0.jpg is a JPEG in CMYK; data.decode: device takes grey ones .*; convert it, or set data.decode"),
        (cut_short, r"3.jpg is cut short"),
        (no_header, r"0.jpg is missing or no readable image"),
    ],
)
def test_images_that_cannot_be_decoded_there_are_named_before_the_training(tmp_path, make, message):
    spec = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        loader(spec)


@pytest.mark.parametrize("setting", [{"cache": "somewhere"}, {"augment": {"pipeline": "some.yaml"}}])
def test_settings_that_need_pixels_in_the_workers_are_refused(tmp_path, setting):
    name = "cache" if "cache" in setting else "augment.pipeline"
    spec = scenes(tmp_path)
    with pytest.raises(ValidationError, match=f"without pixels, which data.{name} needs; one of the two is allowed"):
        Data.model_validate({"train": [spec], "val": [spec], "size": SIZE, "decode": "device", **setting})


def test_a_damaged_photograph_is_named_when_it_is_decoded(tmp_path):
    spec = write_jpegs(tmp_path, 4)
    file = tmp_path / "images/2.jpg"
    tables = b"\xff\xdb"  # without those the coefficients mean nothing; called a comment they are skipped
    file.write_bytes(file.read_bytes().replace(tables, b"\xff\xfe"))
    batch = batches(spec, limit=1)[0]
    with pytest.raises(ValueError, match=r"2.jpg cannot be decoded on cpu: .*; a whole JPEG, .* data.decode: workers"):
        to_device(batch, CPU)


def test_a_header_that_says_another_size_is_named(tmp_path):
    batch = batches(write_jpegs(tmp_path, 4), limit=1)[0]
    content, first = batch.encoded.content, batch.encoded.views[0]
    start = content[: first.num_bytes].numpy().tobytes().index(b"\xff\xc0") + 5  # height and width of the meta
    content[start + 1] -= 1
    with pytest.raises(ValueError, match=rf"{first.file} decodes to \d+x\d+ px, but its header says"):
        to_device(batch, CPU)


def test_a_photograph_drawn_later_is_named_too(tmp_path):
    spec = write_jpegs(tmp_path, 40)
    of = loader(spec)
    write_jpeg(tmp_path / "images/13.jpg", picture(13, SIZES[0]), mode="CMYK")
    with pytest.raises(ValueError, match=r"13.jpg is a JPEG in CMYK"):
        list(of.epoch(0))
