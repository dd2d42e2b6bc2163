"""The COCO reader on drawn files of the official layout, and on real ones where VISIONMTL_DATA has them."""

import json
import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO as Official
from pydantic import ValidationError
from write_coco import FLOOR, WALL, write_coco

from visionmtl.datasets.coco import COCO, COCO80, COCO133, COCO171
from visionmtl.structures import IGNORE

BOTH = ("boxes", "segmentation")


@pytest.fixture
def root(tmp_path) -> Path:
    write_coco(tmp_path, num_train=4, num_val=2, stuffthingmaps=True)
    return tmp_path


def rewrite(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_label_spaces_have_the_official_names_and_ids():
    assert [len(space.classes) for space in (COCO80, COCO133, COCO171)] == [80, 133, 171]
    assert (COCO80.ids[0], COCO80.ids[11], COCO80.ids[-1]) == (1, 13, 90)
    assert (COCO80.classes[11], COCO80.classes[-1]) == ("stop sign", "toothbrush")
    assert dict(zip(COCO133.ids, COCO133.classes, strict=True))[187] == "sky-other-merged"
    assert (COCO171.ids[80], COCO171.ids[-1]) == (92, 182) and COCO171.classes[-1] == "wood"
    for space in (COCO80, COCO133, COCO171):
        assert len(set(space.colours)) == len(set(space.ids)) == len(space.classes)


def test_boxes_crowds_areas_and_ids_are_those_of_the_file(root):
    reader = COCO(root=str(root)).build()
    written = json.loads((root / "annotations/instances_train2017.json").read_text())
    assert len(reader) == 4 and reader.provides == {"boxes": COCO80}
    for index, image in enumerate(written["images"]):
        sample, expected = reader.read(index), [a for a in written["annotations"] if a["image_id"] == image["id"]]
        assert sample.image_id == str(image["id"]) and sample.image.shape == (96, 128, 3)
        xywh = np.array([one["bbox"] for one in expected]).reshape(-1, 4)
        np.testing.assert_allclose(sample.boxes.xyxy, np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]), atol=1e-4)
        assert [COCO80.ids[label] for label in sample.boxes.labels] == [one["category_id"] for one in expected]
        assert sample.boxes.crowd.tolist() == [bool(one["iscrowd"]) for one in expected]
        np.testing.assert_allclose(sample.boxes.area, [one["area"] for one in expected])
    assert reader.read(0).boxes.xyxy.shape == (0, 4), "an image that shows nothing is labelled and empty"
    assert any(reader.read(index).boxes.crowd.any() for index in range(4))


def test_panoptic_maps_become_133_classes_with_void_left_out(root):
    reader = COCO(root=str(root), labels=BOTH, maps="panoptic").build()
    sample = reader.read(0)
    assert reader.provides["segmentation"] is COCO133
    official = np.array([*COCO133.ids, *[0] * 123])[sample.segmentation]
    assert (official[:50, :-2] == WALL).all() and (official[60:, :-2] == FLOOR).all()
    assert (sample.segmentation[:, -2:] == IGNORE).all()
    things = {COCO133.classes[label] for label in np.unique(reader.read(1).segmentation) if label < 80}
    assert things and things <= {COCO80.classes[label] for label in reader.read(1).boxes.labels}


def test_panoptic_alone_needs_no_instances(root):
    (root / "annotations/instances_train2017.json").unlink()
    reader = COCO(root=str(root), labels=("segmentation",), maps="panoptic").build()
    assert len(reader) == 4 and reader.read(1).boxes is None and reader.read(1).segmentation is not None


def test_stuffthingmaps_become_171_classes(root):
    reader = COCO(root=str(root), labels=("segmentation",), maps="stuffthingmaps").build()
    for index in range(4):
        stored = cv2.imread(str(root / f"stuffthingmaps/train2017/{index + 1:012d}.png"), cv2.IMREAD_UNCHANGED)
        found = reader.read(index).segmentation
        known = found != IGNORE
        assert (np.array(COCO171.ids)[found[known]] - 1 == stored[known]).all() and (stored[~known] == 255).all()


@pytest.mark.parametrize(("maps", "rest"), [("instances", IGNORE), ("instances_and_background", 80)])
def test_instances_are_painted_largest_first_over_crowds(root, maps, rest):
    def redo(content):
        image = content["images"][1]
        size = [image["height"], image["width"]]
        rectangles = [(50, 8, 8, 16, 16), (1, 0, 0, 30, 30), (70, 0, 0, 40, 96)]  # category, x, y, width, height
        content["annotations"] = []
        for number, (category, x, y, w, h) in enumerate(rectangles, start=1):
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            code = rle.frPyObjects(outline, *size)[0]
            runs = {"size": size, "counts": code["counts"].decode()}
            content["annotations"].append({
                "id": number, "image_id": image["id"], "category_id": category, "bbox": [x, y, w, h], "area": w * h,
                "iscrowd": int(number == 3), "segmentation": runs if number == 3 else outline,
            })  # fmt: skip

    rewrite(root / "annotations/instances_train2017.json", redo)
    classes = COCO(root=str(root), labels=BOTH, maps=maps).build().read(1).segmentation
    assert (classes[8:24, 8:24] == COCO80.ids.index(50)).all(), "the small one lies on the large one"
    assert (classes[:8, :30] == 0).all() and (classes[30:, :40] == IGNORE).all() and (classes[:, 40:] == rest).all()


def test_notes_say_where_maps_come_from_and_how_many_images_have_none(root):
    rewrite(root / "annotations/panoptic_train2017.json", lambda content: content["annotations"].pop(2))
    reader = COCO(root=str(root), labels=BOTH, maps="panoptic").build()
    assert reader.notes == ["segmentation: coco133 from panoptic", "1 of 4 images have no class map: not labelled"]
    assert [reader.read(index).segmentation is None for index in range(4)] == [False, False, True, False]

    (root / "stuffthingmaps/train2017/000000000002.png").unlink()
    reader = COCO(root=str(root), labels=BOTH, maps="stuffthingmaps").build()
    assert reader.read(1).segmentation is None and reader.read(0).segmentation is not None


def test_dropped_boxes_are_noted(root):
    rewrite(root / "annotations/instances_val2017.json", lambda c: c["annotations"][0].update(bbox=[1, 2, 0, 3]))
    (note,) = COCO(root=str(root), split="val").build().notes
    assert re.search(r"dropped 1 of \d boxes: 1 without width or height", note)


def test_photographs_may_lie_in_a_folder_images(root):
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images" / "train2017")
    assert COCO(root=str(root)).build().read(0).image.shape == (96, 128, 3)


def test_maps_and_labels_must_agree():
    with pytest.raises(ValidationError, match=r"maps: not chosen, .* one of panoptic, stuffthingmaps"):
        COCO(root="x", labels=BOTH)
    with pytest.raises(ValidationError, match="maps: chosen, but `labels` has no segmentation"):
        COCO(root="x", maps="panoptic")


@pytest.mark.parametrize(
    ("remove", "maps", "message"),
    [
        ("annotations/instances_train2017.json", "panoptic", "found no .*instances_train2017.json"),
        ("annotations/panoptic_train2017.json", "panoptic", "found no .*panoptic_train2017.json"),
        ("train2017/000000000003.jpg", "panoptic", "1 of 4 files .* are missing, the first is .*0003.jpg; .*README.md"),
        ("annotations/panoptic_train2017/000000000003.png", "panoptic", "1 of 4 files .* panoptic_train2017.json"),
        ("stuffthingmaps/train2017", "stuffthingmaps", "none of the 4 images has a class map"),
    ],
)
def test_a_missing_file_is_named_with_what_to_do(root, remove, maps, message):
    (root / remove).rename(root / "elsewhere")
    with pytest.raises(ValueError, match=message):
        COCO(root=str(root), labels=BOTH, maps=maps).build()


def test_an_empty_split_and_own_classes_are_refused(root):
    file = root / "annotations/instances_val2017.json"
    rewrite(file, lambda content: content["categories"][3].update(name="motorbike"))
    with pytest.raises(ValueError, match=r"80 categories that are not COCO's 80, e\.g\. .*motor.*type: folder"):
        COCO(root=str(root), split="val").build()
    rewrite(file, lambda content: content["categories"][3].update(name="motorcycle"))
    rewrite(file, lambda content: content.update(images=[], annotations=[]))
    with pytest.raises(ValueError, match="lists no images; a split needs at least one"):
        COCO(root=str(root), split="val").build()


PIXELS = np.zeros((96, 128), np.uint8)


@pytest.mark.parametrize(
    ("file", "pixels", "maps", "message"),
    [
        ("train2017/{}.jpg", np.zeros((128, 96, 3), np.uint8), "panoptic", r"\(128, 96\), .* says \(96, 128\).*EXIF"),
        ("annotations/panoptic_train2017/{}.png", PIXELS, "panoptic", "three channels of 8 bits"),
        (
            "annotations/panoptic_train2017/{}.png",
            np.full((96, 128, 3), 9, np.uint8),
            "panoptic",
            "holds segment 592137",
        ),
        ("stuffthingmaps/train2017/{}.png", PIXELS + 11, "stuffthingmaps", "uint8 values that are no class"),
        ("stuffthingmaps/train2017/{}.png", PIXELS.astype(np.uint16), "stuffthingmaps", "uint16 values that are no"),
        ("stuffthingmaps/train2017/{}.png", PIXELS[:9], "stuffthingmaps", "one value a pixel is expected"),
    ],
)
def test_a_wrong_picture_is_named(root, file, pixels, maps, message):
    file = root / file.format("000000000001")
    assert cv2.imwrite(str(file), pixels)
    with pytest.raises(ValueError, match=f"{file.name} .*{message}"):
        COCO(root=str(root), labels=BOTH, maps=maps).build().read(0)


@pytest.mark.parametrize("maps", ["panoptic", "stuffthingmaps", "instances"])
def test_reader_survives_pickling_to_a_worker(root, maps):
    reader = COCO(root=str(root), labels=BOTH, maps=maps).build()
    copy, sample = pickle.loads(pickle.dumps(reader)).read(1), reader.read(1)
    np.testing.assert_array_equal(copy.boxes.xyxy, sample.boxes.xyxy)
    np.testing.assert_array_equal(copy.segmentation, sample.segmentation)


@pytest.mark.parametrize(("split", "num_images", "num_crowds", "num_empty"), [("train", 140, 15, 3), ("val", 60, 6, 1)])
def test_real_boxes_agree_with_the_official_reader(real_data, split, num_images, num_crowds, num_empty):
    reader = COCO(root=str(real_data / "coco"), split=split).build()
    official = Official(str(real_data / f"coco/annotations/instances_{split}2017.json"))
    boxes = [reader.boxes_of(index) for index in range(len(reader))]
    assert len(reader) == num_images and not reader.notes
    assert (
        sum(one.crowd.sum() for one in boxes) == num_crowds and sum(not len(one.labels) for one in boxes) == num_empty
    )
    for index in range(0, len(reader), 10):
        sample = reader.read(index)
        expected = official.imgToAnns[int(sample.image_id)]
        assert sorted(COCO80.ids[i] for i in sample.boxes.labels) == sorted(one["category_id"] for one in expected)
        np.testing.assert_allclose(sorted(sample.boxes.area), sorted(one["area"] for one in expected), rtol=1e-6)


def test_real_panoptic_maps_agree_with_the_areas_of_their_segments(real_data):
    reader = COCO(root=str(real_data / "coco"), labels=("segmentation",), maps="panoptic").build()
    content = json.loads((real_data / "coco/annotations/panoptic_train2017.json").read_text())
    for index in range(0, 100, 10):
        sample = reader.read(index)
        entry = next(one for one in content["annotations"] if str(one["image_id"]) == sample.image_id)
        areas = dict.fromkeys(range(133), 0)
        for segment in entry["segments_info"]:
            areas[COCO133.ids.index(segment["category_id"])] += segment["area"]
        assert np.bincount(sample.segmentation.ravel(), minlength=133)[:133].tolist() == list(areas.values())
    both = COCO(root=str(real_data / "coco"), labels=BOTH, maps="panoptic").build()
    assert both.notes[-1] == "40 of 140 images have no class map: not labelled"


def test_real_instances_paint_what_the_panoptic_map_shows(real_data):
    painted, panoptic = (
        COCO(root=str(real_data / "coco"), labels=BOTH, maps=maps).build() for maps in ("instances", "panoptic")
    )
    agree = 0.0
    for index in range(0, 140, 20):
        one, other = painted.read(index).segmentation, panoptic.read(index).segmentation
        if other is not None and (both := (one != IGNORE) & (other < 80)).any():
            agree += (one[both] == other[both]).mean() > 0.97
    assert agree >= 3
