"""The official NYUv2 file: reversed axes, names by reference, objects from label and instance, two kinds of depth."""

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from write_nyuv2 import NAMES, TO_40, ImageMeta, drawn_frames, official_mapping, real_frames, write_official

from visionmtl.datasets.nyuv2 import CLASSES, INTRINSICS, things_space
from visionmtl.datasets.nyuv2_mat import SEG40_TO_13, NYUv2Mat
from visionmtl.structures import IGNORE

MAT = "nyu_depth_v2_labeled.mat"


def label(name: str) -> int:
    return 1 + NAMES.index(name)


def blank(height: int = 6, width: int = 10) -> ImageMeta:
    zeros = np.zeros((height, width))
    image = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    depth = np.full((height, width), 2, np.float32)
    return ImageMeta(image, zeros.astype(np.uint16), zeros.astype(np.uint8), depth, depth)


def read(folder: Path, meta: ImageMeta, **settings):
    write_official(folder, [meta])
    return NYUv2Mat(root=str(folder), **settings).build().read(0)


def test_rows_columns_and_colours_are_where_they_belong(tmp_path):
    meta = blank()
    meta.labels[1, 7], meta.depth_m[2, 9] = label("sofa"), 3.5
    sample = read(tmp_path, meta, classes=40)

    np.testing.assert_array_equal(sample.image, meta.image)
    assert sample.image_id == "0001"
    assert sample.segmentation[1, 7] == CLASSES[40].index("sofa") and (sample.segmentation == IGNORE).sum() == 59
    assert sample.depth_m[2, 9] == 3.5 and sample.depth_m.shape == (6, 10)
    assert sample.segmentation.dtype == np.uint8 and sample.depth_m.dtype == np.float32


def test_the_camera_is_known_where_the_image_has_the_official_size(tmp_path):
    assert read(tmp_path / "whole", blank(480, 640)).intrinsics == INTRINSICS
    assert read(tmp_path / "small", blank()).intrinsics is None


def test_an_object_is_a_pair_of_label_and_instance(tmp_path):
    meta = blank()
    meta.labels[:, :] = label("wall")
    meta.labels[0:2, 0:6] = label("chair")  # two that touch ...
    meta.instances[0:2, 0:3], meta.instances[0:2, 3:6] = 1, 2
    meta.labels[4, [0, 9]] = label("lamp")  # ... one that is parted, and one whose instance is called 0
    meta.labels[5, 5], meta.instances[5, 5] = label("baby chair"), 1
    boxes = read(tmp_path, meta).boxes

    found = {(*box, things_space().classes[name]) for box, name in zip(boxes.xyxy.tolist(), boxes.labels, strict=True)}
    assert found == {(0, 0, 3, 2, "chair"), (3, 0, 6, 2, "chair"), (0, 4, 10, 5, "lamp"), (5, 5, 6, 6, "chair")}
    assert sorted(boxes.area.tolist()) == [1, 2, 6, 6] and not boxes.crowd.any()


@pytest.mark.parametrize("name", ["wall", "floor", "ceiling", None])
def test_stuff_and_unlabelled_pixels_are_no_objects(tmp_path, name):
    meta = blank()
    meta.labels[2:4], meta.instances[2:4] = label(name) if name else 0, 1
    assert read(tmp_path, meta).boxes.xyxy.shape == (0, 4)


def test_things_keep_their_number_among_the_40_classes():
    space = things_space()
    assert len(space.classes) == 37 and space.name == "nyu_things37"
    assert all(CLASSES[40][number - 1] == name for number, name in zip(space.ids, space.classes, strict=True))
    assert not {"wall", "floor", "ceiling"} & set(space.classes)


def test_labels_reach_13_classes_by_way_of_40(tmp_path):
    meta = blank()
    meta.labels[0, :3] = label("desk"), label("baby chair"), label("television")
    segmentation = read(tmp_path, meta, classes=13).segmentation
    assert [CLASSES[13][number] for number in segmentation[0, :3]] == ["table", "chair", "tv"]
    assert segmentation[0, 3] == IGNORE and SEG40_TO_13[0] == 0


def test_depth_is_rounded_to_millimetres_and_what_is_no_depth_is_not_measured(tmp_path):
    meta = blank()
    meta.depth_m[0, :6] = 1.23449, 1.2346, np.nan, np.inf, -1, 0
    depth_m = read(tmp_path, meta).depth_m
    assert depth_m[0, :6].tolist() == [np.float32(1.234), np.float32(1.235), 0, 0, 0, 0]


def test_raw_depth_has_holes_where_the_other_is_filled(tmp_path):
    meta = blank()
    meta.raw_depth_m[:] = 0
    meta = replace(meta, depth_m=np.full((6, 10), 2, np.float32), raw_depth_m=np.zeros((6, 10), np.float32))
    assert read(tmp_path, meta, depth="raw").depth_m.max() == 0 and read(tmp_path, meta).depth_m.min() == 2
    with pytest.raises(ValueError, match="depth: raw has no effect"):
        NYUv2Mat(root="x", depth="raw", labels=("boxes",))


def test_the_border_is_black_where_depth_papers_have_it_so(tmp_path):
    meta = blank(480, 640)
    image = read(tmp_path, replace(meta, image=np.full((480, 640, 3), 9, np.uint8)), black_border=True).image
    rows, columns = np.flatnonzero(image.any((1, 2))), np.flatnonzero(image.any((0, 2)))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (7, 473, 7, 631)
    with pytest.raises(ValueError, match=r"defined for \[480, 640, 3\]"):
        read(tmp_path / "small", blank(), black_border=True)


def test_the_split_is_the_official_one(tmp_path):
    write_official(tmp_path, drawn_frames(5), test=(2, 5))
    ids = {
        split: [reader.read(i).image_id for i in range(len(reader))]
        for split in ("train", "test")
        for reader in [NYUv2Mat(root=str(tmp_path), split=split, labels=("depth_m",)).build()]
    }
    assert ids == {"train": ["0001", "0003", "0004"], "test": ["0002", "0005"]}


def test_unwanted_labels_are_not_read(tmp_path):
    sample = read(tmp_path, blank(), labels=("segmentation",))
    assert sample.boxes is None and sample.depth_m is None


def test_each_process_opens_the_file_for_itself(tmp_path):
    write_official(tmp_path, drawn_frames(1))
    reader = NYUv2Mat(root=str(tmp_path)).build()
    first = reader.read(0)
    copy = pickle.loads(pickle.dumps(reader)).read(0)
    np.testing.assert_array_equal(copy.image, first.image)


@pytest.mark.parametrize("name", [MAT, "splits.mat", "classMapping40.mat"])
def test_a_missing_or_cut_file_is_named(tmp_path, name):
    write_official(tmp_path, drawn_frames(1))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} cannot be (opened|read)"):
        NYUv2Mat(root=str(tmp_path)).build()
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"found no .*{name}"):
        NYUv2Mat(root=str(tmp_path)).build()


@pytest.mark.parametrize(
    ("to_40", "message"),
    [
        (TO_40[1:] + TO_40[:1], "maps label '.*' to '.*'; it does not belong to the labels"),
        (TO_40[1:], "maps 41 labels, but .* names 42"),
        (tuple(number - 1 for number in TO_40), "maps to classes 0 to 39"),
    ],
)
def test_a_wrong_class_mapping_is_refused(tmp_path, to_40, message):
    write_official(tmp_path, drawn_frames(1), to_40=to_40)
    with pytest.raises(ValueError, match=message):
        NYUv2Mat(root=str(tmp_path)).build()


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [([1, 2], [2], "1 of them twice"), ([0, 1], [2], "0 to 2"), ([1], [3], "has 2"), ([1], [], "has no test images")],
)
def test_splits_that_leak_or_leave_the_file_are_refused(tmp_path, train, test, message):
    write_official(tmp_path, drawn_frames(2))
    columns = {"trainNdxs": np.array(train)[:, None], "testNdxs": np.array(test)[:, None]}
    scipy.io.savemat(tmp_path / "splits.mat", columns)
    with pytest.raises(ValueError, match=message):
        NYUv2Mat(root=str(tmp_path), split="test").build()


def test_another_mapping_to_13_classes_is_refused(tmp_path):
    write_official(tmp_path, drawn_frames(1))
    scipy.io.savemat(tmp_path / "class13Mapping.mat", {"classMapping13": {"labels13": np.arange(1, 41)[None]}})
    with pytest.raises(ValueError, match="differs from the official 13 classes"):
        NYUv2Mat(root=str(tmp_path)).build()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("splits.mat", {"trainNdxs": "text", "testNdxs": [1]}),
        ("splits.mat", {"trainNdxs": [[1.5]], "testNdxs": [1]}),
        ("splits.mat", {"trainNdxs": [[np.nan]], "testNdxs": [1]}),
        ("splits.mat", {"trainNdxs": {"a": 1}, "testNdxs": [1]}),
        ("classMapping40.mat", {"mapClass": np.array(["wall"] * 42, object)}),
        ("class13Mapping.mat", {"classMapping13": 3}),
        ("class13Mapping.mat", {"classMapping13": {"labels": [1]}}),
    ],
)
def test_variables_of_other_types_are_refused(tmp_path, file, content):
    write_official(tmp_path, drawn_frames(1))
    scipy.io.savemat(tmp_path / file, content)
    with pytest.raises(ValueError, match=rf"{file}:? .* official .*get"):
        NYUv2Mat(root=str(tmp_path)).build()


@pytest.mark.parametrize("way", ["link", "storage", "virtual"])
def test_an_array_that_lies_in_another_file_is_not_read(tmp_path, way):
    write_official(tmp_path, drawn_frames(1))
    (tmp_path / "secret").write_bytes(bytes(10_000))
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["images"] = np.zeros((1, 3, 32, 24), np.uint8)
    with h5py.File(tmp_path / MAT, "a") as file:
        shape = file["images"].shape
        del file["images"]
        if way == "link":
            file["images"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "images")
        elif way == "storage":
            file.create_dataset("images", shape, np.uint8, external=[(str(tmp_path / "secret"), 0, 10_000)])
        else:
            layout = h5py.VirtualLayout(shape, np.uint8)
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "images", shape)
            file.create_virtual_dataset("images", layout)
    with pytest.raises(ValueError, match="images lie in other files, to which it leads; the official file holds"):
        NYUv2Mat(root=str(tmp_path)).build()


@pytest.mark.parametrize("name", ["names", "labels"])
def test_a_group_or_numbers_where_something_else_is_meant_are_refused(tmp_path, name):
    write_official(tmp_path, drawn_frames(1))
    with h5py.File(tmp_path / MAT, "a") as file:
        del file[name]
        file.create_group(name)
    with pytest.raises(ValueError, match=f"has no {name}; wanted are"):
        NYUv2Mat(root=str(tmp_path)).build()
    with h5py.File(tmp_path / MAT, "a") as file:
        del file[name]
        file[name] = np.float32(3)
    with pytest.raises(ValueError, match=r"names cannot be read|labels"):
        NYUv2Mat(root=str(tmp_path)).build()


def test_arrays_in_another_order_of_axes_are_refused(tmp_path):
    write_official(tmp_path, drawn_frames(2))
    with h5py.File(tmp_path / MAT, "a") as file:
        images = file["images"][()]
        del file["images"]
        file["images"] = images.transpose(0, 3, 2, 1)
    with pytest.raises(
        ValueError, match=r"images are uint8 \[2, 24, 32, 3\].*expected are uint8 images \[N, 3, W, H\]"
    ):
        NYUv2Mat(root=str(tmp_path)).build()


def test_depth_in_millimetres_is_refused(tmp_path):
    meta = blank()
    meta.depth_m[:] = 2000
    with pytest.raises(ValueError, match=r"depths of image 1 reaches 2000; allowed are metres"):
        read(tmp_path, meta)


def test_a_label_without_a_name_is_refused(tmp_path):
    meta = blank()
    meta.labels[0, 0] = len(NAMES) + 1
    with pytest.raises(ValueError, match="image 1 has label 43, but only 42 labels"):
        read(tmp_path, meta)


def test_without_h5py_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_official(tmp_path, drawn_frames(1))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"needs h5py.*pip install 'visionmtl\[prepare\]'"):
        NYUv2Mat(root=str(tmp_path)).build()


def test_the_official_mapping_gives_back_the_official_segmentation(real_data, tmp_path):
    metas = real_frames(real_data / "nyuv2", "test", 2)
    write_official(tmp_path, metas, (), *official_mapping(real_data / "nyuv2"))
    reader = NYUv2Mat(root=str(tmp_path), classes=40).build()
    for index, meta in enumerate(metas):
        to_40 = np.array([0, *official_mapping(real_data / "nyuv2")[1]])
        expected = to_40[meta.labels].astype(np.int64) - 1
        np.testing.assert_array_equal(reader.read(index).segmentation, np.where(expected < 0, IGNORE, expected))
