"""Accuracy, F1 and average precision of image labels, one or many an image."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from visionmtl.metrics.base import Direction
from visionmtl.structures import ImageClasses, LabelSpace, Sample

TOP = 5
MIN_SCORE = 0.5
"""Of several labels those of this score or more count as predicted."""


class ClassificationMeter:
    """Counts over the images of a split, each weighing the same.

    many: an image may have any number of labels. Else one: the class of the highest score is the prediction, and an
    image without a label does not count.
    F1 is the macro mean over the classes that occur in the truth or among the predictions, 0 where a class is never
    right; mAP the mean over the classes in the truth, without interpolation (sum of precision times the growth of
    recall; equal scores are one step), as scikit-learn does both.
    Of a data set that annotates some of the classes only (`Sample.annotated`), the others are left out and named.
    """

    metrics: ClassVar[Mapping[str, Direction | None]] = {
        **dict.fromkeys(("accuracy", "top5_accuracy", "mean_accuracy", "f1", "micro_f1", "map"), "max"),
        **dict.fromkeys(("per_class/*/precision", "per_class/*/recall", "per_class/*/f1", "per_class/*/ap"), "max"),
        "per_class/*/images": None,
    }

    def __init__(self, space: LabelSpace, many: bool = False) -> None:
        self.space, self.many = space, many
        self._scores: list[NDArray[np.float32]] = []  # [K] of each image
        self._truth: list[NDArray[np.bool_]] = []  # [K]
        self._known: list[NDArray[np.bool_]] = []  # [K] which classes are annotated

    def update(self, prediction: ImageClasses, sample: Sample) -> None:
        """Count one image; classes that the prediction does not name have score 0."""
        labels = sample.image_labels
        if labels is None or (not self.many and not len(labels)):
            return
        num_classes = len(self.space.classes)
        for whose, ids in (("truth", labels), ("prediction", prediction.labels)):
            if ids.size and not 0 <= ids.min() <= ids.max() < num_classes:
                raise ValueError(
                    f"image {sample.image_id!r}: the {whose} has class ids {ids.min()} to {ids.max()}; label space "
                    f"{self.space.name!r} has 0 to {num_classes - 1}; give the meter the space of the labels"
                )
        if not self.many and len(labels) > 1:
            raise ValueError(
                f"image {sample.image_id!r} has {len(labels)} labels; one is allowed here; judge it with many labels"
            )
        scores, truth = np.zeros(num_classes, np.float32), np.zeros(num_classes, np.bool_)
        scores[prediction.labels], truth[labels] = prediction.scores, True
        known = sample.annotated.get("image_labels")
        self._known.append(np.ones(num_classes, np.bool_) if known is None else known)
        self._scores.append(np.where(self._known[-1], scores, -1.0).astype(np.float32))
        self._truth.append(truth)

    def state(self) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
        """Scores, truth and which classes are annotated, each [N, K]."""
        shape = -1, len(self.space.classes)
        return (
            np.array(self._scores, np.float32).reshape(shape),
            np.array(self._truth, np.bool_).reshape(shape),
            np.array(self._known, np.bool_).reshape(shape),
        )

    def merge(self, state: tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]) -> None:
        """Add another rank's images."""
        scores, truth, known = state
        self._scores.extend(scores)
        self._truth.extend(truth)
        self._known.extend(known)

    def compute(self) -> dict[str, Any]:
        """One label: accuracy, mean_accuracy (over classes), top5_accuracy (with more than 5 classes), f1.

        Many: map, f1, micro_f1. None where no image tells it. Also per_class {name: {precision, recall, f1, images}},
        of many labels with ap; absent (classes without truth), protocol; where some classes are not annotated,
        not_annotated.
        """
        scores, truth, known = self.state()
        if self.many:
            predicted = (scores >= MIN_SCORE) & known
        else:
            predicted = np.zeros_like(truth)
            predicted[np.arange(len(scores)), scores.argmax(axis=1)] = True
        hits, found, true = ((predicted & truth).sum(0), predicted.sum(0), truth.sum(0))
        f1 = 2 * hits / np.maximum(found + true, 1)
        seen = (found + true) > 0
        annotated: NDArray[np.bool_] = known.sum(axis=0) > 0
        if not len(known):
            annotated[:] = True

        result: dict[str, Any] = {"f1": float(f1[seen].mean()) if seen.any() else None}
        table = {
            "precision": np.where(found > 0, hits / np.maximum(found, 1), np.nan),
            "recall": np.where(true > 0, hits / np.maximum(true, 1), np.nan),
            "f1": np.where(seen, f1, np.nan),
        }
        if self.many:
            ap = [
                average_precision(scores[known[:, k], k], truth[known[:, k], k]) for k in range(len(self.space.classes))
            ]
            table["ap"] = np.array([np.nan if one is None else one for one in ap])
            result["map"] = float(np.nanmean(table["ap"])) if true.any() else None
            result["micro_f1"] = float(2 * hits.sum() / (found + true).sum()) if seen.any() else None
            result["protocol"] = f"each class by itself; F1 of scores from {MIN_SCORE:g} on"
        else:
            result["accuracy"] = int(hits.sum()) / len(scores) if len(scores) else None
            result["mean_accuracy"] = float(table["recall"][true > 0].mean()) if true.any() else None
            if len(self.space.classes) > TOP:
                best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
                right = np.take_along_axis(truth, best, axis=1).any(axis=1)
                result[f"top{TOP}_accuracy"] = float(np.mean(right)) if len(scores) else None
            result["protocol"] = "one class an image, that of the highest score"
        result["per_class"] = {
            name: {
                **{column: None if np.isnan(of_all[k]) else float(of_all[k]) for column, of_all in table.items()},
                "images": int(true[k]),
            }
            for k, name in enumerate(self.space.classes)
            if annotated[k]
        }
        result["absent"] = [name for k, name in enumerate(self.space.classes) if annotated[k] and not true[k]]
        if not annotated.all():
            result["protocol"] += f"; over the {annotated.sum()} of {len(annotated)} classes that are annotated"
            result["not_annotated"] = [name for k, name in enumerate(self.space.classes) if not annotated[k]]
        return result


def average_precision(scores: NDArray[np.floating], truth: NDArray[np.bool_]) -> float | None:
    """Sum over thresholds of precision times the growth of recall; None where nothing is true.

    scores, truth: [N]; equal scores make one threshold
    """
    if not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of each run of equal scores
    hits = np.cumsum(truth[order])[ends]
    precision = hits / (ends + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])
