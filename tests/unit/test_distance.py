"""Distances of boxes: medians by hand, matching as pycocotools has it, errors by hand."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visionmtl.metrics.distance import DistanceMeter, box_distances, match
from visionmtl.structures import Boxes, Detections, LabelSpace, Sample

SPACE = LabelSpace("two", ("chair", "lamp"), ((0, 0, 0),) * 2)


def boxes(*rows: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 4)


def labelled(xyxy, labels, depth_m, crowd=None) -> Sample:
    crowd = np.zeros(len(labels), bool) if crowd is None else np.array(crowd)
    truth = Boxes(xyxy, np.array(labels), crowd, np.ones(len(labels), np.float32))
    return Sample(image=np.zeros((*depth_m.shape, 3), np.uint8), image_id="a", boxes=truth, depth_m=depth_m)


def test_distance_is_the_median_of_the_inner_half_and_spread_half_the_16_to_84_percent_range():
    depth_m = np.full((40, 40), 9, np.float32)
    depth_m[10:30, 10:30] = np.linspace(1, 3, 20, dtype=np.float32)  # the inner half of the first box, by column

    median, spread = box_distances(depth_m, boxes((0, 0, 40, 40), (39, 39, 40, 40), (5.2, 5.2, 5.4, 5.4)))

    assert median.tolist() == [2, 9, 9] and median.dtype == spread.dtype == np.float32
    assert spread[1:].tolist() == [0, 0]
    assert spread[0] == pytest.approx(0.68, abs=0.03)  # 2 m evenly spread: 68 % of it, halved


def test_what_is_not_measured_is_left_out():
    depth_m = np.zeros((8, 8), np.float32)
    depth_m[3, 3] = 2
    median, spread = box_distances(depth_m, boxes((0, 0, 8, 8), (6, 6, 8, 8)))
    assert median[0] == 2 and spread[0] == 0 and np.isnan(median[1]) and np.isnan(spread[1])


def test_errors_by_hand():
    """Two chairs at 2 and 4 m, found at 1 and 4.4 m; a lamp that nobody finds, and a chair without measured depth."""
    true_m, depth_m = np.zeros((10, 40), np.float32), np.zeros((10, 40), np.float32)
    true_m[:, :10], true_m[:, 10:20], true_m[:, 20:30] = 2, 4, 5
    depth_m[:, :10], depth_m[:, 10:20], depth_m[:, 20:] = 1, 4.4, 5
    truth = boxes((0, 0, 10, 10), (10, 0, 20, 10), (20, 0, 30, 10), (30, 0, 40, 10))
    found = Detections(truth[[0, 1, 3]], np.array([0.9, 0.8, 0.7], np.float32), np.zeros(3, np.int64))
    meter = DistanceMeter(SPACE)

    meter.update((found, torch.from_numpy(depth_m)), labelled(truth, [0, 0, 1, 0], true_m))
    result = meter.compute()

    assert result["abs_rel"] == pytest.approx((1 / 2 + 0.4 / 4) / 2, abs=1e-7) and result["delta1"] == 0.5
    assert (result["matched"], result["boxes"], result["unmeasured"]) == (2, 3, 1)
    of_class = result["per_class"]
    assert of_class["lamp"] == {"abs_rel": None, "delta1": None, "matched": 0, "boxes": 1}
    assert of_class["chair"] == {"abs_rel": result["abs_rel"], "delta1": 0.5, "matched": 2, "boxes": 2}


def test_each_true_box_is_matched_once_by_the_best_score_and_crowds_by_none():
    depth_m = np.ones((10, 20), np.float32)
    truth = boxes((0, 0, 10, 10), (10, 0, 20, 10))
    found = Detections(truth[[0, 0, 1]], np.array([0.5, 0.9, 0.9], np.float32), np.zeros(3, np.int64))
    meter = DistanceMeter(SPACE)

    meter.update((found, depth_m), labelled(truth, [0, 0], depth_m, crowd=[False, True]))

    assert match(found, truth[:1], np.zeros(1, np.int64)) == [(1, 0)]
    assert (meter.compute()["matched"], meter.compute()["boxes"]) == (1, 1)


def test_matches_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = rng.integers(0, 30, (12, 2))
        truth = np.concatenate([corners, corners + rng.integers(6, 20, (12, 2))], axis=1).astype(np.float32)
        labels = rng.integers(0, 2, 12)
        chosen = rng.integers(0, 12, 30)
        xyxy = truth[chosen] + rng.integers(-2, 3, (30, 4)).astype(np.float32)
        found = Detections(xyxy, rng.choice([0.2, 0.5, 0.8], 30).astype(np.float32), rng.integers(0, 2, 30))

        assert sorted(match(found, truth, labels)) == sorted(matches_of_pycocotools(found, truth, labels))


def matches_of_pycocotools(found: Detections, truth: np.ndarray, labels: np.ndarray) -> list[tuple[int, int]]:
    def index(xyxy, classes, **columns) -> COCO:
        coco = COCO()
        rows = [
            {"id": i + 1, "image_id": 1, "category_id": int(classes[i]), "iscrowd": 0, "area": 1.0}
            | {"bbox": [*map(float, box[:2]), *map(float, box[2:] - box[:2])]}
            | {name: float(values[i]) for name, values in columns.items()}
            for i, box in enumerate(xyxy)
        ]
        coco.dataset = {"images": [{"id": 1}], "categories": [{"id": 0}, {"id": 1}], "annotations": rows}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(index(truth, labels), index(found.xyxy, found.labels, score=found.scores), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    pairs = []
    for image in filter(None, evaluation.evalImgs):
        for position, true in zip(image["dtIds"], image["dtMatches"][0], strict=True):
            if true:
                pairs.append((position - 1, int(true) - 1))
    return pairs
