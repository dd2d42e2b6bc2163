"""`tools/check_data.py` on real data, where VISIONMTL_DATA has them: its counts are those made here from the files."""

import json

import cv2
import numpy as np
import pytest
from test_check_data import check, found


def annotations(file):
    """Images, and of all boxes the category names, crowds and images."""
    content = json.loads(file.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    boxes = content["annotations"]
    shown = {box["image_id"] for box in boxes}
    return {
        "images": len(content["images"]),
        "total": len(boxes),
        "crowds": sum(box.get("iscrowd", 0) for box in boxes),
        "images_without": sum(image["id"] not in shown for image in content["images"]),
        "classes": {name: sum(names[box["category_id"]] == name for box in boxes) for name in names.values()},
    }


def counted(data_set):
    """The same of a report."""
    boxes = data_set["boxes"]
    classes = {one["name"]: one["boxes"] for one in boxes["classes"]}
    return {"images": data_set["read"], **{key: boxes[key] for key in ("total", "crowds", "images_without")}} | {
        "classes": classes
    }


def pixels(files):
    """Pixels by value over label files."""
    return sum(np.bincount(cv2.imread(str(file), cv2.IMREAD_UNCHANGED).ravel(), minlength=256) for file in files)


@pytest.mark.parametrize("classes", [pytest.param(13, marks=pytest.mark.slow), 40])
def test_nyuv2_is_what_its_files_say(real_data, tmp_path, classes):
    root = real_data / "nyuv2"
    settings = {"type": "nyuv2", "root": str(root), "classes": classes}
    train = {**settings, "labels": ["boxes", "segmentation"]}
    limit = [] if classes == 13 else ["--limit", "109"]  # all of the test images once more, the training images once
    status, report = check(tmp_path, {"train": [train], "val": [{**settings, "split": "test"}]}, *limit)
    assert status == 0 and not found(report, "error", "warning"), "no two of the 904 images are alike"

    of_train, of_test = report["data_sets"]
    assert (of_train["images"], of_test["images"], of_test["read"]) == (795, 109, 109)
    assert of_test["sizes"]["most"] == [{"height": 480, "width": 640, "images": 109}]
    assert of_test["labelled"] == {"boxes": 109, "segmentation": 109, "depth_m": 109}
    assert len(of_test["boxes"]["classes"]) == 19
    if classes == 13:
        assert (of_train["read"], of_train["boxes"]["total"]) == (795, 4016)
        assert of_train["segmentation"]["labelled_share"] == pytest.approx(1 - 0.176, abs=5e-4)  # its PROVENANCE.md
        for split, data_set in (("train", of_train), ("test", of_test)):
            assert counted(data_set) == annotations(root / f"annotations/derived_boxes19_{split}.json")

    by_value = pixels(sorted((root / f"seg{classes}" / "test").iterdir()))
    assert [one["pixels"] for one in of_test["segmentation"]["classes"]] == by_value[1 : classes + 1].tolist()
    depth_m = np.repeat(np.arange(256) / 25.5, pixels(sorted((root / "depth/test").iterdir())))
    expected = {"min_m": depth_m.min(), "max_m": depth_m.max(), "measured_share": (depth_m > 0).mean()}
    assert {key: of_test["depth_m"][key] for key in expected} == pytest.approx(expected)
    assert of_test["depth_m"]["median_m"] == pytest.approx(np.median(depth_m), rel=0.011)


def test_coco_is_what_its_files_say(real_data, tmp_path):
    root = real_data / "coco"
    coco = {"type": "coco", "root": str(root)}
    train = {**coco, "labels": ["boxes", "segmentation"], "maps": "panoptic"}
    status, report = check(tmp_path, {"train": [train], "val": [{**coco, "split": "val"}]})
    assert status == 0
    # an excerpt: classes are missing, and that is all there is to say
    assert {rule for rule, _ in found(report, "error", "warning")} <= {"class_absent", "class_untrained"}

    of_train, of_val = report["data_sets"]
    assert (of_train["read"], of_val["read"]) == (140, 60)
    assert of_train["labelled"] == {"boxes": 140, "segmentation": 100}, "100 panoptic maps"
    for split, data_set in (("train", of_train), ("val", of_val)):
        assert counted(data_set) == annotations(root / f"annotations/instances_{split}2017.json")
        assert data_set["boxes"]["crowds"] and data_set["boxes"]["images_without"]
        assert (data_set["boxes"]["space"], len(data_set["boxes"]["classes"])) == ("coco80", 80)


def test_cityscapes_is_what_its_files_say(real_data, tmp_path):
    root = real_data / "cityscapes"
    city = {"type": "cityscapes", "root": str(root)}
    status, report = check(tmp_path, {"train": [city], "val": [{**city, "split": "val"}]})
    assert status == 0
    of_train, of_val = report["data_sets"]
    assert (of_train["read"], of_val["read"]) == (4, 3)
    assert of_train["labelled"] == {"boxes": 3, "segmentation": 4, "depth_m": 3}
    assert of_val["labelled"] == {"boxes": 3, "segmentation": 3}, "the val split has no disparity"
    told = [one["text"] for one in report["findings"] if one["rule"] == "told_by_reader"]
    assert sum("depth_m: 1 of 4 images not labelled" in text for text in told) == 1
    assert sum("depth_m: 3 of 3 images not labelled" in text for text in told) == 1

    panoptic = json.loads((root / "gtFine/cityscapes_panoptic_val.json").read_text())
    metas = {file.name.removesuffix("_leftImg8bit.png") for file in (root / "leftImg8bit/val").rglob("*.png")}
    things = [
        segment
        for image in panoptic["annotations"]
        if image["image_id"] in metas
        for segment in image["segments_info"]
        if segment["category_id"] in (24, 25, 26, 27, 28, 31, 32, 33)
    ]
    assert of_val["boxes"]["total"] == len(things)
    assert of_val["boxes"]["crowds"] == sum(segment["iscrowd"] for segment in things)
    label_ids = pixels(sorted((root / "gtFine/train").rglob("*_labelIds.png")))
    road, building = label_ids[7], label_ids[11]
    by_name = {one["name"]: one["pixels"] for one in of_train["segmentation"]["classes"]}
    assert (by_name["road"], by_name["building"]) == (road, building)


def test_training_images_in_the_validation_split_are_found_among_the_real_ones(real_data, tmp_path):
    settings = {"type": "nyuv2", "root": str(real_data / "nyuv2"), "labels": ["boxes"], "split": "test"}
    status, report = check(tmp_path, {"train": [settings], "val": [settings]}, "--limit", "5")
    assert status == 1 and report["counts"]["error"] == 5 and found(report, "error") == {("leak", "val")}
