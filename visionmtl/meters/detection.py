"""COCO average precision and recall of boxes, computed by pycocotools."""

import contextlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visionmtl.types import Boxes, Detections, LabelSpace, Sample

_SIZES = {"small": 1, "medium": 2, "large": 3}  # positions in pycocotools' areaRngLbl; 0 is all
_AP50, _AP75 = 0, 5  # positions in pycocotools' iouThrs

_Image = tuple[str, Boxes, Detections]


class DetectionMeter:
    """The COCO protocol: IoU .50:.05:.95, 101 recall points, size bins on the truth's `area`, crowds neither hit
    nor miss.

    max_detections: cut per image *and class*, as in pycocotools; a cap per image is the model's job.
    Every labelled image counts, also one without boxes. Classes without (non-crowd) truth are left out and named.
    """

    def __init__(self, space: LabelSpace, max_detections: int = 100) -> None:
        if max_detections < 1:
            raise ValueError(f"max_detections is {max_detections}; allowed is 1 or more; COCO's own value is 100")
        self.space = space
        self.max_detections = max_detections
        self._images: list[_Image] = []
        self._dropped = 0

    def update(self, prediction: Detections, sample: Sample) -> None:
        """Count one image. Detections that are not finite are dropped, and the report says how many."""
        if sample.boxes is None:
            return
        for whose, labels in (("truth", sample.boxes.labels), ("prediction", prediction.labels)):
            if labels.size and not 0 <= labels.min() <= labels.max() < len(self.space.classes):
                raise ValueError(
                    f"image {sample.image_id!r}: the {whose} has class ids {labels.min()} to {labels.max()}; "
                    f"label space {self.space.name!r} has 0 to {len(self.space.classes) - 1}; "
                    "give the meter the space in which the labels were made"
                )

        finite = np.isfinite(prediction.xyxy).all(axis=1) & np.isfinite(prediction.scores)
        self._dropped += int((~finite).sum())
        kept = Detections(prediction.xyxy[finite], prediction.scores[finite], prediction.labels[finite])
        self._images.append((sample.image_id, sample.boxes, kept))

    def state(self) -> dict[str, Any]:
        """Everything counted; pickles."""
        return {"images": list(self._images), "dropped": self._dropped}

    def merge(self, state: dict[str, Any]) -> None:
        """Add another rank's images."""
        self._images.extend(state["images"])
        self._dropped += state["dropped"]

    def compute(self) -> dict[str, Any]:
        """ap, ap50, ap75, ap_small/medium/large, ar1, ar10, ar100, ar_small/medium/large; None where no truth exists.

        With another `max_detections` than 100 the last recall is called after it. Also: per_class {name: {ap, ap50,
        boxes}}, absent (names of the classes without truth), dropped (detections that were not finite), protocol.
        """
        # ties between equal scores are broken by image order: by number, as COCO's ids, whatever rank an image was on
        images = sorted(self._images, key=lambda image: (len(image[0]), image[0]))
        counts = np.zeros(len(self.space.classes), np.int64)
        for _, boxes, _ in images:
            counts += np.bincount(boxes.labels[~boxes.crowd], minlength=len(counts))
        present = np.flatnonzero(counts).tolist()

        cuts = sorted({cut for cut in (1, 10, self.max_detections) if cut <= self.max_detections})
        precision, recall = _pycocotools(images, present, cuts)  # [T, R, K, A, M], [T, K, A, M]

        result: dict[str, Any] = {
            "ap": _mean(precision[:, :, :, 0, -1]),
            "ap50": _mean(precision[_AP50, :, :, 0, -1]),
            "ap75": _mean(precision[_AP75, :, :, 0, -1]),
        }
        for name, area in _SIZES.items():
            result[f"ap_{name}"] = _mean(precision[:, :, :, area, -1])
        for position, cut in enumerate(cuts):
            result[f"ar{cut}"] = _mean(recall[:, :, 0, position])
        for name, area in _SIZES.items():
            result[f"ar_{name}"] = _mean(recall[:, :, area, -1])

        result["per_class"] = {
            self.space.classes[label]: {
                "ap": _mean(precision[:, :, k, 0, -1]),
                "ap50": _mean(precision[_AP50, :, k, 0, -1]),
                "boxes": int(counts[label]),
            }
            for k, label in enumerate(present)
        }
        result["absent"] = [name for name, count in zip(self.space.classes, counts, strict=True) if not count]
        result["dropped"] = self._dropped
        result["protocol"] = "coco" if self.max_detections == 100 else f"coco with maxDets {self.max_detections}"
        return result


def _pycocotools(
    images: list[_Image], classes: list[int], cuts: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision [T, R, K, A, M] and recall [T, K, A, M] of the given classes; -1 where there is no truth."""
    truths: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, (_, boxes, detections) in enumerate(images, start=1):
        truths += _annotations(number, boxes.xyxy, boxes.labels, area=boxes.area.tolist(), iscrowd=boxes.crowd.tolist())
        found += _annotations(number, detections.xyxy, detections.labels, score=detections.scores.tolist())

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        evaluation = COCOeval(_index(truths, len(images), classes), _index(found, len(images), classes), "bbox")
        evaluation.params.maxDets = cuts
        if classes:
            evaluation.evaluate()
            evaluation.accumulate()
            return evaluation.eval["precision"], evaluation.eval["recall"]
    p = evaluation.params
    shape = len(p.iouThrs), len(p.recThrs), 0, len(p.areaRng), len(cuts)
    return np.zeros(shape), np.zeros((shape[0], *shape[2:]))


def _annotations(number: int, xyxy: NDArray[Any], labels: NDArray[Any], **columns: list[Any]) -> list[dict[str, Any]]:
    corners = xyxy.astype(np.float64)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)  # xywh
    columns.setdefault("area", (boxes[:, 2] * boxes[:, 3]).tolist())
    columns.setdefault("iscrowd", [False] * len(boxes))
    rows = zip(boxes.tolist(), labels.tolist(), *columns.values(), strict=True)
    return [
        {"image_id": number, "bbox": bbox, "category_id": label, **dict(zip(columns, rest, strict=True))}
        for bbox, label, *rest in rows
    ]


def _index(annotations: list[dict[str, Any]], num_images: int, classes: list[int]) -> COCO:
    for number, annotation in enumerate(annotations, start=1):  # 0 would read as "unmatched" in pycocotools
        annotation["id"] = number
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(1, num_images + 1)],
        "categories": [{"id": label} for label in classes],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None
