"""Intersection over union and accuracies from one integer confusion matrix over all pixels of a split."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionmtl.types import IGNORE, LabelSpace, Sample


class SegmentationMeter:
    """Pixels of all images and ranks in one table, as the official Cityscapes script does it.

    Pixels whose truth is IGNORE count nowhere. A class without truth is left out of miou when it is never predicted,
    and counts as 0 when it is (the official Cityscapes rule); both are named.
    """

    def __init__(self, space: LabelSpace) -> None:
        self.space = space
        self._pixels = np.zeros((256, 256), np.int64)  # [truth, predicted] over all values of uint8

    def update(self, prediction: NDArray[np.uint8], sample: Sample) -> None:
        """Count one image; prediction: uint8 [H, W] class ids at the truth's size."""
        truth = sample.segmentation
        if truth is None:
            return
        if prediction.shape != truth.shape or prediction.dtype != np.uint8 or truth.dtype != np.uint8:
            raise ValueError(
                f"image {sample.image_id!r}: the prediction is {prediction.dtype} {list(prediction.shape)} and the "
                f"truth {truth.dtype} {list(truth.shape)}; allowed is uint8 [H, W] of one size; resize the logits to "
                "the original size before the argmax, never the truth"
            )
        pairs = np.bincount((truth.astype(np.int64) << 8 | prediction).ravel(), minlength=65536).reshape(256, 256)

        num_classes = len(self.space.classes)
        for whose, used in (("truth", pairs[:IGNORE].sum(axis=1)), ("prediction", pairs[:IGNORE].sum(axis=0))):
            wrong = np.flatnonzero(used[num_classes:]) + num_classes
            if wrong.size:
                raise ValueError(
                    f"image {sample.image_id!r}: the {whose} has class ids {wrong.tolist()}; label space "
                    f"{self.space.name!r} has 0 to {num_classes - 1}; give the meter the space of the labels"
                )
        self._pixels += pairs

    def state(self) -> NDArray[np.int64]:
        """The table, int64 [256, 256]."""
        return self._pixels.copy()

    def merge(self, state: NDArray[np.int64]) -> None:
        """Add another rank's table."""
        self._pixels += state

    def confusion(self) -> NDArray[np.int64]:
        """int64 [K, K] pixels, rows are the truth."""
        num_classes = len(self.space.classes)
        return self._pixels[:num_classes, :num_classes].copy()

    def compute(self) -> dict[str, Any]:
        """miou, pixel_accuracy, mean_accuracy, fw_iou in 0..1, None when no pixel is labelled.

        per_class {name: {iou, accuracy, pixels}} (iou None: neither in the truth nor predicted; accuracy None: not in
        the truth), absent and absent_but_predicted (class names), pixels, protocol.
        """
        table = self.confusion()
        hits, true, predicted = np.diag(table), table.sum(axis=1), table.sum(axis=0)
        union = true + predicted - hits
        total = int(true.sum())
        iou = hits / np.maximum(union, 1)
        accuracy = hits / np.maximum(true, 1)

        return {
            "miou": float(iou[union > 0].mean()) if total else None,
            "pixel_accuracy": int(hits.sum()) / total if total else None,
            "mean_accuracy": float(accuracy[true > 0].mean()) if total else None,
            "fw_iou": float((true * iou).sum() / total) if total else None,
            "per_class": {
                name: {
                    "iou": float(iou[k]) if union[k] else None,
                    "accuracy": float(accuracy[k]) if true[k] else None,
                    "pixels": int(true[k]),
                }
                for k, name in enumerate(self.space.classes)
            },
            "absent": [name for k, name in enumerate(self.space.classes) if not true[k]],
            "absent_but_predicted": [name for k, name in enumerate(self.space.classes) if predicted[k] and not true[k]],
            "pixels": total,
            "protocol": "one confusion matrix over all pixels at original size; classes absent but predicted score 0",
        }
