"""How far objects are: the distance of a box in a depth map, and the errors of such distances over a split."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as masks
from torch import Tensor

from visionmtl.metrics.base import Direction
from visionmtl.structures import Detections, Intrinsics, LabelSpace, Sample

MIN_IOU = 0.5
MAX_DETECTIONS = 100
"""Of an image and class, as in COCO."""
_SPREAD_PERCENTILES = 16, 84


def box_distances(
    depth_m: NDArray[np.float32], xyxy: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[D] metres: the median of depth over the inner half of each box (half its width and height), and its spread.

    The rim of a box shows what lies behind the object. Spread is half the range from the 16th to the 84th percentile,
    which is the standard deviation of a normal distribution.
    depth_m: [H, W] metres, 0 = not measured, which is left out; NaN where a box holds nothing else
    xyxy: [D, 4] pixels of that map. A pixel counts if its centre lies in the inner half; if none does, the middle one.
    """
    inner = [_inner_half(depth_m, box) for box in xyxy]
    measured = [pixels[pixels > 0] for pixels in inner]
    medians = [np.median(pixels) if pixels.size else np.nan for pixels in measured]
    spreads = [np.diff(np.percentile(p, _SPREAD_PERCENTILES))[0] / 2 if p.size else np.nan for p in measured]
    return np.array(medians, np.float32), np.array(spreads, np.float32)


def _inner_half(depth_m: NDArray[np.float32], box: NDArray[np.float32]) -> NDArray[np.float32]:
    spans = []
    for low, high, size in ((box[1], box[3], depth_m.shape[0]), (box[0], box[2], depth_m.shape[1])):
        middle, quarter = (low + high) / 2, (high - low) / 4
        first, last = int(np.ceil(middle - quarter - 0.5)), int(np.floor(middle + quarter - 0.5))
        if first > last:
            first = last = int(middle)
        spans.append(slice(min(max(first, 0), size - 1), min(max(last, 0), size - 1) + 1))
    return depth_m[spans[0], spans[1]]


def box_columns(
    depth_m: NDArray[np.float32], xyxy: NDArray[np.float32], intrinsics: Intrinsics | None
) -> dict[str, NDArray[np.float32]]:
    """What files say of each box: distance_m, distance_spread_m [D]; where the camera is known position_m [D, 3]."""
    distance_m, spread_m = box_distances(depth_m, xyxy)
    columns = {"distance_m": distance_m, "distance_spread_m": spread_m}
    return columns if intrinsics is None else columns | {"position_m": positions(xyxy, distance_m, intrinsics)}


def positions(
    xyxy: NDArray[np.float32], distance_m: NDArray[np.float32], intrinsics: Intrinsics
) -> NDArray[np.float32]:
    """[D, 3] metres in camera coordinates, x right, y down, z forward: the ray through the middle of each box.

    distance_m: [D] metres along the optical axis, so z = distance_m, x = (u - cx) z / fx and y = (v - cy) z / fy.
    """
    focal, centre = np.array(intrinsics[:2]), np.array(intrinsics[2:])
    middle = (xyxy[:, :2].astype(np.float64) + xyxy[:, 2:]) / 2
    across = (middle - centre) / focal * distance_m[:, None]
    return np.concatenate([across, distance_m[:, None]], axis=1).astype(np.float32)


def match(
    detections: Detections, true_xyxy: NDArray[np.float32], true_labels: NDArray[np.int64]
) -> list[tuple[int, int]]:
    """Pairs (position of a detection, position of a true box) as COCO matches them at IoU .5.

    Detections in the order of their scores each take the free true box of their class with the largest IoU, if that is
    .5 or more. true_xyxy, true_labels: [N, 4] pixels and [N] class ids, without crowds.
    """
    pairs: list[tuple[int, int]] = []
    for label in np.intersect1d(detections.labels, true_labels):
        of_class = np.flatnonzero(detections.labels == label)
        of_class = of_class[np.argsort(-detections.scores[of_class], kind="stable")][:MAX_DETECTIONS]
        true = np.flatnonzero(true_labels == label)
        ious = masks.iou(_xywh(detections.xyxy[of_class]), _xywh(true_xyxy[true]), [0] * len(true))
        for row, position in zip(ious, of_class.tolist(), strict=True):
            best = len(row) - 1 - int(np.argmax(row[::-1]))  # of equal ones COCO takes the last
            if row[best] >= MIN_IOU:
                pairs.append((position, int(true[best])))
                ious[:, best] = -1  # taken
    return pairs


def _xywh(xyxy: NDArray[np.float32]) -> NDArray[np.float64]:
    corners = xyxy.astype(np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


class DistanceMeter:
    """AbsRel and delta1 (Eigen et al. 2014, arXiv:1406.2283) of the distances of matched boxes, see `match`.

    The distance of a prediction is that of the predicted box in predicted depth, the true one that of the true box in
    measured depth, see `box_distances`. True boxes in which nothing is measured are left out and counted. Numbers are
    exact in the order: any split over ranks gives the same ones.
    """

    metrics: ClassVar[Mapping[str, Direction | None]] = {
        **dict.fromkeys(("abs_rel", "per_class/*/abs_rel"), "min"),
        **dict.fromkeys(("delta1", "per_class/*/delta1"), "max"),
        **dict.fromkeys(("matched", "boxes", "unmeasured", "per_class/*/matched", "per_class/*/boxes")),
    }

    def __init__(self, space: LabelSpace) -> None:
        self.space = space
        self._pairs: list[tuple[int, float, float]] = []  # class, predicted and true metres
        self._boxes = np.zeros(len(space.classes), np.int64)
        self._unmeasured = 0

    def update(self, prediction: tuple[Detections, NDArray[np.float32] | Tensor], sample: Sample) -> None:
        """Count one image; prediction: boxes, and float [H, W] metres at the truth's size."""
        detections, depth = prediction
        if sample.boxes is None or sample.depth_m is None:
            return
        if tuple(depth.shape) != sample.depth_m.shape:
            raise ValueError(
                f"image {sample.image_id!r}: the predicted depth is {list(depth.shape)} and the truth "
                f"{list(sample.depth_m.shape)}; allowed is one size; resize the prediction, never the truth"
            )
        objects = ~sample.boxes.crowd
        true_xyxy, labels = sample.boxes.xyxy[objects], sample.boxes.labels[objects]
        true_m, _ = box_distances(sample.depth_m, true_xyxy)
        measured = ~np.isnan(true_m)
        self._boxes += np.bincount(labels[measured], minlength=len(self._boxes))
        self._unmeasured += int((~measured).sum())

        finite = np.isfinite(detections.xyxy).all(axis=1) & np.isfinite(detections.scores)
        kept = Detections(detections.xyxy[finite], detections.scores[finite], detections.labels[finite])
        pairs = [(found, true) for found, true in match(kept, true_xyxy, labels) if measured[true]]
        if pairs:
            depth_m = depth.float().cpu().numpy() if isinstance(depth, Tensor) else depth
            predicted_m, _ = box_distances(depth_m, kept.xyxy[[found for found, _ in pairs]])
            for (_, true), metres in zip(pairs, predicted_m.tolist(), strict=True):
                if not metres > 0:
                    raise ValueError(
                        f"image {sample.image_id!r}: the predicted distance of a box is {metres}; allowed are metres "
                        "above 0; the network has diverged: lower the learning rate or clip gradients"
                    )
                self._pairs.append((int(labels[true]), metres, float(true_m[true])))

    def state(self) -> dict[str, Any]:
        """Every pair of distances; pickles."""
        return {"pairs": list(self._pairs), "boxes": self._boxes.copy(), "unmeasured": self._unmeasured}

    def merge(self, state: dict[str, Any]) -> None:
        """Add another rank's boxes."""
        self._pairs.extend(state["pairs"])
        self._boxes += state["boxes"]
        self._unmeasured += state["unmeasured"]

    def compute(self) -> dict[str, Any]:
        """abs_rel, delta1 (None where nothing is matched); matched, boxes (true ones with a distance), unmeasured.

        Also: per_class {name: {abs_rel, delta1, matched, boxes}} of the classes that have boxes, protocol.
        """
        per_class = {
            self.space.classes[label]: _errors([pair for pair in self._pairs if pair[0] == label], int(count))
            for label, count in enumerate(self._boxes)
            if count
        }
        return {
            **_errors(self._pairs, int(self._boxes.sum())),
            "unmeasured": self._unmeasured,
            "per_class": per_class,
            "protocol": "distance of boxes matched as COCO's at IoU .5: median depth over the inner half of the box, "
            "mean over matched boxes",
        }


def _errors(pairs: list[tuple[int, float, float]], num_boxes: int) -> dict[str, float | int | None]:
    num = len(pairs)
    relative = math.fsum(abs(predicted - true) / true for _, predicted, true in pairs)
    close = sum(max(predicted / true, true / predicted) < 1.25 for _, predicted, true in pairs)
    return {
        "abs_rel": relative / num if num else None,
        "delta1": close / num if num else None,
        "matched": num,
        "boxes": num_boxes,
    }
