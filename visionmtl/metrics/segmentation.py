"""Intersection over union and accuracies from one integer confusion matrix over all pixels of a split."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionmtl.metrics.base import Direction
from visionmtl.ops.upload import beside
from visionmtl.structures import IGNORE, LabelSpace, Sample

_VALUES = 256


class SegmentationMeter:
    """Pixels of all images and ranks in one table, as the official Cityscapes script does it.

    Pixels whose truth is IGNORE count nowhere; a predicted IGNORE ("no class", in files made elsewhere) is a miss.
    A class without truth is left out of miou when it is never predicted, and counts as 0 when it is (the official
    Cityscapes rule); both are named.

    groups: score these unions of classes instead, by name, e.g. {"vehicle": ("car", "bus")}; the table is joined
    after counting. Classes in no group count as IGNORE.

    Of a data set that annotates some of the classes only (`Sample.annotated`), the others are left out: they are in no
    mean, predicting one is a miss, and they are named.

    Of predictions that are tensors the table lies where they lie, and nothing waits for it until `state` or `compute`.
    """

    metrics: ClassVar[Mapping[str, Direction | None]] = {
        **dict.fromkeys(("miou", "pixel_accuracy", "mean_accuracy", "fw_iou"), "max"),
        **dict.fromkeys(("per_class/*/iou", "per_class/*/accuracy"), "max"),
        **dict.fromkeys(("per_class/*/pixels", "pixels", "void_pixels")),
    }

    def __init__(self, space: LabelSpace, groups: Mapping[str, Sequence[str]] | None = None) -> None:
        self.space = space
        self.classes = tuple(groups or space.classes)
        members = groups or {name: (name,) for name in space.classes}
        self.members = tuple(map(tuple, members.values()))
        unknown = sorted({name for names in members.values() for name in names} - set(space.classes))
        if unknown:
            raise ValueError(
                f"groups name {', '.join(unknown)}; label space {space.name!r} has {', '.join(space.classes)}; "
                "group those"
            )
        # [_VALUES, groups]: which values of uint8 count for which row of the joined table
        self._joins = np.zeros((_VALUES, len(members)), np.int64)
        for column, names in enumerate(members.values()):
            self._joins[[space.classes.index(name) for name in names], column] = 1
        self._pixels = np.zeros((_VALUES, _VALUES), np.int64)  # [truth, predicted] over all values of uint8
        self._annotated = np.zeros(len(space.classes), np.bool_)  # of some image
        self._on_device: dict[torch.device, Tensor] = {}  # int64 [_VALUES**2], not yet in `_pixels`

    def update(self, prediction: NDArray[np.uint8] | Tensor, sample: Sample) -> None:
        """Count one image; prediction: uint8 [H, W] class ids at the truth's size."""
        truth = sample.segmentation
        if truth is None:
            return
        guess = torch.as_tensor(prediction)
        if guess.shape != truth.shape or guess.dtype != torch.uint8 or truth.dtype != np.uint8:
            raise ValueError(
                f"image {sample.image_id!r}: the prediction is {str(guess.dtype).removeprefix('torch.')} "
                f"{list(guess.shape)} and the truth {truth.dtype} {list(truth.shape)}; allowed is uint8 [H, W] of one "
                "size; resize the logits to the original size before the argmax, never the truth"
            )
        annotated = sample.annotated.get("segmentation")
        self._annotated |= True if annotated is None else annotated
        if annotated is not None:
            values = np.full(_VALUES, IGNORE, np.uint8)
            values[: len(annotated)][annotated] = np.flatnonzero(annotated)
            prediction = beside(values, guess)[guess.int()] if isinstance(prediction, Tensor) else values[prediction]
            guess = torch.as_tensor(prediction)
        if isinstance(prediction, np.ndarray):
            pairs = np.bincount((truth.astype(np.int64) << 8 | prediction).ravel(), minlength=_VALUES**2)
            pairs = pairs.reshape(_VALUES, _VALUES)
            self._check(pairs, f"image {sample.image_id!r}")
            self._pixels += pairs
            return

        # index_add: bincount would wait for the largest value
        codes = (beside(truth, guess).int() << 8 | guess).flatten()
        zeros = torch.zeros(_VALUES**2, dtype=torch.int64, device=guess.device)
        table = self._on_device.setdefault(guess.device, zeros)
        table.index_add_(0, codes, torch.ones_like(codes, dtype=torch.int64))

    def state(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The table, int64 [256, 256], and bool [K]: which classes some image annotates."""
        for table in self._on_device.values():
            pairs = table.cpu().numpy().reshape(_VALUES, _VALUES)
            self._check(pairs, "some image")  # which one is not known any more
            self._pixels += pairs
        self._on_device.clear()
        return self._pixels.copy(), self._annotated.copy()

    def merge(self, state: tuple[NDArray[np.int64], NDArray[np.bool_]]) -> None:
        """Add another rank's table."""
        self._pixels += state[0]
        self._annotated |= state[1]

    def confusion(self) -> NDArray[np.int64]:
        """int64 [K, K] pixels, rows are the truth; K classes, or groups."""
        table: NDArray[np.int64] = self._joins.T @ self.state()[0] @ self._joins
        return table

    def joined(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Counts by value of uint8 [256] -> by class, or group [K]."""
        summed: NDArray[np.int64] = counts @ self._joins
        return summed

    def compute(self) -> dict[str, Any]:
        """miou, pixel_accuracy, mean_accuracy, fw_iou in 0..1, None when no pixel is labelled.

        per_class {name: {iou, accuracy, pixels}} (iou None: neither in the truth nor predicted; accuracy None: not in
        the truth), absent and absent_but_predicted (class names), pixels, void_pixels (labelled ones for which no
        class was predicted), protocol; where some classes are not annotated, also not_annotated (their names).
        """
        table = self.confusion()
        hits, predicted = np.diag(table), table.sum(axis=0)
        void = self._joins.T @ self._pixels @ (1 - self._joins.sum(axis=1))  # by true class
        true = table.sum(axis=1) + void
        union = true + predicted - hits
        total = int(true.sum())
        iou = hits / np.maximum(union, 1)
        accuracy = hits / np.maximum(true, 1)
        annotated: NDArray[np.bool_] = self._joins[: len(self._annotated)][self._annotated].sum(axis=0) > 0
        if not annotated.any():  # nothing was counted
            annotated[:] = True
        protocol = "one confusion matrix over all labelled pixels; classes absent but predicted score 0"
        if not annotated.all():
            protocol += f"; over the {annotated.sum()} of {len(annotated)} classes that are annotated"

        result = {
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
                for k, name in enumerate(self.classes)
                if annotated[k]
            },
            "absent": [name for k, name in enumerate(self.classes) if annotated[k] and not true[k]],
            "absent_but_predicted": [name for k, name in enumerate(self.classes) if predicted[k] and not true[k]],
            "pixels": total,
            "void_pixels": int(void.sum()),
            "protocol": protocol,
        }
        if not annotated.all():
            result["not_annotated"] = [name for k, name in enumerate(self.classes) if not annotated[k]]
        return result

    def _check(self, pairs: NDArray[np.int64], where: str) -> None:
        num_classes = len(self.space.classes)
        for whose, used in (("truth", pairs[:IGNORE].sum(axis=1)), ("prediction", pairs[:IGNORE].sum(axis=0))):
            wrong = np.flatnonzero(used[num_classes:IGNORE]) + num_classes
            if wrong.size:
                raise ValueError(
                    f"{where}: the {whose} has class ids {wrong.tolist()}; label space {self.space.name!r} has 0 to "
                    f"{num_classes - 1}; give the meter the space of the labels"
                )
