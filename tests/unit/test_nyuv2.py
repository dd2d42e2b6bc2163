"""The NYUv2 reader on a folder of the real layout, and on the real one where VISIONMTL_DATA has it."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from write_nyuv2 import write_pixels

from visionmtl.datasets.nyuv2 import INTRINSICS, NYUv2
from visionmtl.structures import IGNORE

H, W = 12, 16


def annotate(root: Path, images: list[int], boxes: list[tuple[int, int, list[float]]]) -> None:
    content = {
        "images": [{"id": number, "file_name": f"{number:04}.jpg", "width": W, "height": H} for number in images],
        "categories": [{"id": 7, "name": "sofa"}, {"id": 3, "name": "chair"}],
        "annotations": [
            {"id": i + 1, "image_id": number, "category_id": category, "bbox": bbox, "area": 5.0, "iscrowd": i % 2}
            for i, (number, category, bbox) in enumerate(boxes)
        ],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "drawn_train.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images 0002, 0005 and 0009; 0005 has two boxes, 0002 none, and nobody looked for boxes in 0009."""
    for number in (2, 5, 9):
        blue = np.zeros((H, W, 3), np.uint8)
        blue[..., 0] = 250  # OpenCV writes BGR
        write_pixels(tmp_path / f"image/train/{number:04}.jpg", blue)
        codes = np.arange(H * W, dtype=np.uint8).reshape(H, W)
        write_pixels(tmp_path / f"seg13/train/{number:04}.png", codes % 14)
        write_pixels(tmp_path / f"seg40/train/{number:04}.png", codes % 41)
        write_pixels(tmp_path / f"depth/train/{number:04}.png", codes)
    (tmp_path / "train.txt").write_text("0002\n0005\n0009\n")
    (tmp_path / "meta.json").write_text('{"depth_scale": "metres = png_value / 25.5 (8-bit quantised, step 39 mm)"}')
    annotate(tmp_path, [2, 5], [(5, 7, [1, 2, 3, 4]), (5, 3, [0, 0, 16, 12])])
    return tmp_path


def test_labels_mean_what_the_vocabulary_says(root):
    reader = NYUv2(root=str(root)).build()
    sample = reader.read(1)

    assert len(reader) == 3 and sample.image_id == "0005"
    assert sample.image[0, 0, 2] > 200 > sample.image[0, 0, 0]  # RGB
    assert sample.boxes.xyxy.tolist() == [[1, 2, 4, 6], [0, 0, 16, 12]]
    assert sample.boxes.labels.tolist() == [1, 0] and sample.boxes.crowd.tolist() == [False, True]
    assert sample.segmentation[0, :3].tolist() == [IGNORE, 0, 1]
    assert sample.depth_m[0, 0] == 0 and sample.depth_m[3, 3] == np.float32(51) / np.float32(25.5) == 2
    assert sample.depth_m.dtype == np.float32 and sample.segmentation.dtype == np.uint8


def test_no_boxes_and_nobody_looked_are_told_apart(root):
    reader = NYUv2(root=str(root)).build()
    assert reader.read(0).boxes.xyxy.shape == (0, 4)
    assert reader.read(2).boxes is None


def test_images_that_nobody_looked_at_and_entries_of_other_images_are_noted(root):
    annotate(root, [2, 5, 7, 8], [(5, 7, [1, 2, 3, 4])])
    missing, others = NYUv2(root=str(root)).build().notes
    assert (
        "does not list 1 of 3 images: boxes not labelled there" in missing and "2 of its 4 images are not in" in others
    )
    annotate(root, [7], [])
    with pytest.raises(ValueError, match="lists none of the 3 images of the split"):
        NYUv2(root=str(root)).build()


@pytest.mark.parametrize(("scale", "word"), [(25.5e3, "below"), (0.025, "beyond")])
def test_a_depth_scale_that_cannot_be_meant_is_noted_with_a_histogram(root, scale, word):
    (root / "meta.json").write_text(json.dumps({"depth_scale": scale}))
    if scale > 256:
        for number in (2, 5, 9):
            write_pixels(root / f"depth/train/{number:04}.png", np.full((H, W), 51, np.uint16))
    note = NYUv2(root=str(root)).build().notes[-1]
    assert word in note and f"depth_scale {scale:g} in meta.json" in note and " m |###" in note


def test_boxes_reach_their_image_in_whatever_order_the_file_lists_them(root):
    annotate(root, [9, 5, 2], [(9, 3, [9, 0, 1, 1]), (2, 3, [2, 0, 1, 1]), (9, 7, [8, 0, 1, 1]), (5, 3, [5, 0, 1, 1])])
    reader = NYUv2(root=str(root)).build()
    assert [reader.read(index).boxes.xyxy[:, 0].tolist() for index in range(3)] == [[2], [5], [9, 8]]


def test_label_spaces_have_the_official_names(root):
    coarse, fine = (NYUv2(root=str(root), classes=classes).build().provides for classes in (13, 40))
    assert coarse["segmentation"].name == "nyu13" and coarse["segmentation"].classes[8:10] == ("sofa", "table")
    assert fine["segmentation"].name == "nyu40" and fine["segmentation"].classes[-1] == "otherprop"
    assert len(set(fine["segmentation"].colours)) == 40
    assert coarse["boxes"].classes == ("chair", "sofa") and coarse["boxes"].ids == (3, 7)
    assert coarse["depth_m"] is None


def test_unwanted_labels_are_neither_read_nor_needed(root):
    (root / "annotations" / "drawn_train.json").unlink()
    (root / "meta.json").unlink()
    reader = NYUv2(root=str(root), labels=("segmentation",)).build()
    sample = reader.read(0)
    assert list(reader.provides) == ["segmentation"] and sample.boxes is None and sample.depth_m is None


def test_sixteen_bit_depth_is_read_as_declared(root):
    for number in (2, 5, 9):
        write_pixels(root / f"depth/train/{number:04}.png", np.full((H, W), 2345, np.uint16))
    with pytest.raises(ValueError, match=r"0002.png is uint16, but meta.json declares 25.5 units per metre"):
        NYUv2(root=str(root)).build().read(0)
    (root / "meta.json").write_text('{"depth_scale": 1000}')
    assert NYUv2(root=str(root)).build().read(0).depth_m[0, 0] == pytest.approx(2.345)


def test_boxes_without_extent_are_dropped_and_counted(root):
    annotate(root, [2, 5, 9], [(5, 7, [1, 2, 0, 4]), (5, 7, [1, 2, 3, 4]), (2, 3, [0, 0, float("nan"), 1])])
    reader = NYUv2(root=str(root)).build()
    assert "dropped 2 of 3 boxes" in reader.notes[0]
    assert [len(reader.read(index).boxes.labels) for index in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("train.txt", "found no .*train.txt"),
        (
            "seg13/train/0005.png",
            "1 of 3 files listed in train.txt are missing, .*0005.png.*prepare.py nyuv2",
        ),
        ("annotations/drawn_train.json", "found nothing as annotations/.*_train.json"),
        ("meta.json", "declares no depth scale"),
    ],
)
def test_a_missing_file_is_named_with_what_to_do(root, remove, message):
    (root / remove).unlink()
    with pytest.raises(ValueError, match=message):
        NYUv2(root=str(root)).build()


@pytest.mark.parametrize(
    ("file", "pixels", "message"),
    [
        ("seg13/train/0002.png", np.full((H, W), 14, np.uint8), "uint8 values up to 14; allowed"),
        ("depth/train/0002.png", np.zeros((H, W + 1), np.uint8), "one value a pixel"),
        ("seg13/train/0002.png", np.zeros((H, W, 3), np.uint8), "one value a pixel"),
    ],
)
def test_a_wrong_map_is_named(root, file, pixels, message):
    write_pixels(root / file, pixels)
    with pytest.raises(ValueError, match=message):
        NYUv2(root=str(root)).build().read(0)


@pytest.mark.parametrize("file", ["image/train/0002.jpg", "seg13/train/0002.png", "depth/train/0002.png"])
def test_a_file_cut_short_is_named(root, file):
    (root / file).write_bytes((root / file).read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{file} is (missing or no readable image|cut short)"):
        NYUv2(root=str(root)).build().read(0)


def test_reader_survives_pickling_to_a_worker(root):
    reader = NYUv2(root=str(root)).build()
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy.read(1).boxes.xyxy, reader.read(1).boxes.xyxy)


@pytest.mark.parametrize(("split", "classes"), [("train", 13), ("test", 40)])
def test_the_real_data_set_reads(real_data, split, classes):
    reader = NYUv2(root=str(real_data / "nyuv2"), split=split, classes=classes).build()
    assert len(reader) == 795 if split == "train" else len(reader) > 0

    for index in range(0, len(reader), 20):
        sample = reader.read(index)
        assert sample.image.shape == (480, 640, 3) and sample.intrinsics == INTRINSICS
        assert sample.segmentation[sample.segmentation != IGNORE].max() < classes
        assert sample.depth_m.min() > 0.7 and sample.depth_m.max() <= 10
        corners = sample.boxes.xyxy
        assert (corners >= 0).all() and (corners <= [640, 480, 640, 480]).all()
        assert (corners[:, 2:] > corners[:, :2]).all() and (sample.boxes.labels < 19).all()
