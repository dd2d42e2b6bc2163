"""Detection meter: values by hand, COCO's traps, and the published result of COCO's own reference files."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from visionmtl.metrics.detection import DetectionMeter
from visionmtl.structures import Boxes, Detections, LabelSpace, Sample
from visionmtl.tasks.detection import Detection

CATS = LabelSpace("animals", ("cat", "dog", "bird"), ((0, 0, 0),) * 3)
PIXEL = np.zeros((1, 1, 3), np.uint8)


def sample(rows=(), image_id="0", area=None, crowd=None):
    """rows: (x1, y1, x2, y2, class id)"""
    table = np.asarray(rows, np.float32).reshape(-1, 5)
    size = (table[:, 2] - table[:, 0]) * (table[:, 3] - table[:, 1])
    boxes = Boxes(
        xyxy=table[:, :4],
        labels=table[:, 4].astype(np.int64),
        crowd=np.zeros(len(table), bool) if crowd is None else np.asarray(crowd),
        area=size if area is None else np.asarray(area, np.float32),
    )
    return Sample(image=PIXEL, image_id=image_id, boxes=boxes)


def found(rows=()):
    """rows: (x1, y1, x2, y2, class id, score)"""
    table = np.asarray(rows, np.float32).reshape(-1, 6)
    return Detections(xyxy=table[:, :4], scores=table[:, 5], labels=table[:, 4].astype(np.int64))


def metered(*pairs, **settings):
    meter = DetectionMeter(CATS, **settings)
    for prediction, truth in pairs:
        meter.update(prediction, truth)
    return meter.compute()


def test_perfect_boxes_score_one_and_the_first_annotation_counts():
    result = metered((found([(0, 0, 50, 50, 0, 0.9)]), sample([(0, 0, 50, 50, 0)])))

    assert result["ap"] == pytest.approx(1)
    assert result["ar1"] == result["ar100"] == 1
    assert result["protocol"] == "coco"


def test_a_box_of_iou_0_6_counts_at_three_of_ten_thresholds():
    result = metered((found([(0, 0, 60, 100, 0, 0.9)]), sample([(0, 0, 100, 100, 0)])))

    assert result["ap50"] == pytest.approx(1)
    assert result["ap75"] == 0
    assert result["ap"] == pytest.approx(0.3)  # IoU 0.6 passes 0.50, 0.55 and 0.60


def test_size_bins_follow_the_area_of_the_truth_not_of_the_box():
    truth = sample([(0, 0, 40, 40, 0)], area=[900])  # a thin object in a 40x40 box

    result = metered((found([(0, 0, 40, 40, 0, 0.9)]), truth))

    assert result["ap_small"] == pytest.approx(1)
    assert result["ap_medium"] is None
    assert result["ap_large"] is None


def test_detections_inside_a_crowd_are_neither_hit_nor_miss():
    truth = sample([(0, 0, 50, 50, 0), (100, 100, 300, 300, 0)], crowd=[False, True])
    inside = [(110, 110, 150, 150, 0, 0.99), (200, 200, 250, 250, 0, 0.98)]

    result = metered((found([*inside, (0, 0, 50, 50, 0, 0.5)]), truth))

    assert result["ap"] == pytest.approx(1)
    assert result["per_class"]["cat"]["boxes"] == 1


def test_classes_without_truth_are_named_and_left_out_of_the_mean():
    prediction = found([(0, 0, 50, 50, 0, 0.9), (0, 0, 50, 50, 1, 0.9)])

    result = metered((prediction, sample([(0, 0, 50, 50, 0)])))

    assert result["ap"] == pytest.approx(1)
    assert list(result["per_class"]) == ["cat"]
    assert result["absent"] == ["dog", "bird"]


def test_false_positives_on_an_image_without_boxes_lower_ap():
    hit = found([(0, 0, 50, 50, 0, 0.5)]), sample([(0, 0, 50, 50, 0)], "1")
    false_alarm = found([(0, 0, 50, 50, 0, 0.9)]), sample([], "2")

    assert metered(hit, false_alarm)["ap"] == pytest.approx(0.5)


def test_an_image_whose_boxes_nobody_looked_for_does_not_count():
    hit = found([(0, 0, 50, 50, 0, 0.5)]), sample([(0, 0, 50, 50, 0)], "1")
    unlabelled = found([(0, 0, 50, 50, 0, 0.9)]), Sample(image=PIXEL, image_id="2")

    assert metered(hit, unlabelled)["ap"] == pytest.approx(1)


def test_no_detections_score_zero():
    result = metered((found(), sample([(0, 0, 50, 50, 2)])))

    assert result["ap"] == 0
    assert result["ar100"] == 0
    assert result["ap_small"] is None


@pytest.mark.parametrize("images", [[], [(found(), sample())], [(found([(0, 0, 9, 9, 0, 0.5)]), sample())]])
def test_without_any_truth_every_score_is_none(images):
    result = metered(*images)

    assert result["ap"] is None
    assert result["ar100"] is None
    assert result["per_class"] == {}
    json.dumps(result, allow_nan=False)


def test_another_cap_names_its_recall_and_its_protocol():
    result = metered((found([(0, 0, 50, 50, 0, 0.9)]), sample([(0, 0, 50, 50, 0)])), max_detections=300)

    assert result["ap"] == pytest.approx(1)
    assert result["ar300"] == 1
    assert "ar100" not in result
    assert result["protocol"] == "coco with maxDets 300"


def test_detections_that_are_not_finite_are_dropped_and_counted():
    prediction = found([(0, 0, np.nan, 50, 0, 0.9), (0, 0, 50, 50, 0, 0.5)])

    result = metered((prediction, sample([(0, 0, 50, 50, 0)])))

    assert result["dropped"] == 1
    assert result["ap"] == pytest.approx(1)


def test_a_class_outside_the_label_space_is_an_error():
    with pytest.raises(ValueError, match="the truth has class ids 3 to 3; label space 'animals' has 0 to 2"):
        metered((found(), sample([(0, 0, 50, 50, 3)])))


def test_precision_over_recall_by_hand():
    rows = [(0, 0, 50, 50, 0, 0.9), (200, 200, 250, 250, 0, 0.8), (100, 0, 150, 50, 0, 0.7)]  # hit, miss, hit

    curves = metered((found(rows), sample([(0, 0, 50, 50, 0), (100, 0, 150, 50, 0)])))["pr_curves"]

    assert curves["iou50"] == pytest.approx([1.0] * 51 + [2 / 3] * 50)
    assert curves["iou75"] == curves["iou50"]


def test_a_backend_that_is_not_installed_is_an_error_before_the_first_image(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(
        ValueError, match=r"'faster_coco_eval' is not installed; .* run `pip install visionmtl\[fast\]`"
    ):
        Detection(ap_backend="faster_coco_eval").meter(CATS)


def test_faster_coco_eval_gives_the_same_numbers():
    pytest.importorskip("faster_coco_eval")
    rng = np.random.default_rng(5)
    images = []
    for number in range(12):
        corners = rng.uniform(0, 80, (9, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(3, 150, (9, 2)), rng.integers(0, 3, (9, 1))], axis=1)
        moved = boxes + np.pad(rng.normal(0, 4, (9, 4)), ((0, 0), (0, 1)))
        scores = rng.choice([0.2, 0.5, 0.7, 0.9], (9, 1))  # many ties
        truth = sample(boxes[number % 9 :], str(number), crowd=rng.random(9 - number % 9) < 0.2)
        images.append((found(np.concatenate([moved, scores], axis=1)), truth))

    one, other = metered(*images), metered(*images, backend="faster_coco_eval")

    curves, other_curves = one.pop("pr_curves"), other.pop("pr_curves")
    assert other_curves["iou75"] == pytest.approx(curves["iou75"], abs=1e-12)
    per_class, other_per_class = one.pop("per_class"), other.pop("per_class")
    assert all(other_per_class[name] == pytest.approx(row, abs=1e-12) for name, row in per_class.items())
    lists = {name: one.pop(name) for name in ("absent", "protocol")}
    assert lists == {name: other.pop(name) for name in lists}
    assert other == pytest.approx(one, abs=1e-12)  # the order of adding differs


def test_nothing_is_printed(capsys):
    metered((found([(0, 0, 50, 50, 0, 0.9)]), sample([(0, 0, 50, 50, 0)])))

    assert capsys.readouterr().out == ""


@pytest.mark.skipif("VISIONMTL_DATA" not in os.environ, reason="VISIONMTL_DATA does not name a folder with real data")
def test_cocos_reference_case_gives_the_published_twelve_numbers():
    folder = Path(os.environ["VISIONMTL_DATA"]) / "coco" / "eval_reference"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    ids = [category["id"] for category in truth["categories"]]

    def rows(annotations, image, *more):
        mine = [a for a in annotations if a["image_id"] == image["id"]]
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in mine)]
        labels = [ids.index(a["category_id"]) for a in mine]
        columns = [[a[name] for a in mine] for name in more]
        return [(*box, label) for box, label in zip(boxes, labels, strict=True)], columns

    space = LabelSpace("coco80", tuple(c["name"] for c in truth["categories"]), ((0, 0, 0),) * len(ids), tuple(ids))
    meter = DetectionMeter(space)
    for image in truth["images"]:
        boxes, (area, crowd) = rows(truth["annotations"], image, "area", "iscrowd")
        guesses, (scores,) = rows(results, image, "score")
        prediction = found([(*guess, score) for guess, score in zip(guesses, scores, strict=True)])
        meter.update(prediction, sample(boxes, str(image["id"]), area=area, crowd=np.array(crowd, bool)))
    result = meter.compute()

    published = {"ap": 0.505, "ap50": 0.697, "ap75": 0.573, "ap_small": 0.586, "ap_medium": 0.519, "ap_large": 0.501}
    published |= {"ar1": 0.387, "ar10": 0.594, "ar100": 0.595, "ar_small": 0.640, "ar_medium": 0.566, "ar_large": 0.564}
    assert {name: round(result[name], 3) for name in published} == published  # val2014_fake_eval_res.txt of COCO
