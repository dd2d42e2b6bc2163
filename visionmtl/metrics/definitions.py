"""One set of predictions under every definition of mIoU and of depth errors that papers use, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from visionmtl.metrics.base import Direction, Meter
from visionmtl.metrics.depth import EIGEN_CROP, NYU_SIZE, DepthMeter
from visionmtl.metrics.segmentation import SegmentationMeter
from visionmtl.structures import IGNORE, Sample

SHOWN = ("miou", "pixel_accuracy", "abs_rel", "rmse_m", "log10", "delta1")
"""The metrics that a table of definitions has, as far as they are measured."""

_SCOPES: tuple[Literal["per_image", "pooled"], ...] = ("per_image", "pooled")
_ALIGNMENTS: tuple[Literal["none", "median"], ...] = ("none", "median")


def with_definitions(meter: Meter) -> Meter:
    """The meter, with `definitions` in its results where there are several: by name, metrics under other rules."""
    if isinstance(meter, SegmentationMeter):
        return cast(Meter, Definitions(meter, _SegmentationDefinitions(meter)))
    if isinstance(meter, DepthMeter):
        limits = meter.min_m, meter.max_m
        others = [
            _DepthDefinition(limits, scope, cropped, align)
            for cropped in (False, True)
            for scope in _SCOPES
            for align in _ALIGNMENTS
        ]
        return cast(Meter, Definitions(meter, *others))
    return meter


class Definitions:
    """A task's own meter and others that see the same images; their results stand in `definitions`."""

    def __init__(self, own: Meter, *others: Any) -> None:
        self.own, self.others = own, others
        definitions = {f"definitions/*/{name}": better for name, better in own.metrics.items() if name in SHOWN}
        self.metrics: Mapping[str, Direction | None] = {**own.metrics, **definitions}

    def update(self, prediction: Any, sample: Sample) -> None:
        """Count one image."""
        for meter in (self.own, *self.others):
            meter.update(prediction, sample)

    def state(self) -> list[Any]:
        """Of each meter."""
        return [meter.state() for meter in (self.own, *self.others)]

    def merge(self, state: Sequence[Any]) -> None:
        """Add another rank's state."""
        for meter, one in zip((self.own, *self.others), state, strict=True):
            meter.merge(one)

    def compute(self) -> dict[str, Any]:
        """What the task's own meter computes, and `definitions`."""
        rows: dict[str, Any] = {}
        for meter in self.others:
            rows |= meter.compute()
        return {**self.own.compute(), "definitions": rows}


class _DepthDefinition:
    """Depth errors, whole or in Eigen's crop, with or without one factor an image."""

    metrics: ClassVar[Mapping[str, Direction | None]] = DepthMeter.metrics

    def __init__(
        self,
        limits: tuple[float, float],
        scope: Literal["per_image", "pooled"],
        cropped: bool,
        align: Literal["none", "median"],
    ) -> None:
        self._meter, self._cropped = DepthMeter(scope, *limits, align=align), cropped
        self.name = ", ".join(
            (
                "mean of images" if scope == "per_image" else "all pixels pooled",
                "crop 45:471 x 41:601" if cropped else "whole image",
                "median-aligned" if align == "median" else "metric",
            )
        )

    def update(self, prediction: Any, sample: Sample) -> None:
        """Count one image; the crop takes those of 480x640 alone."""
        if self._cropped and sample.depth_m is not None:
            if sample.depth_m.shape != NYU_SIZE:
                return
            prediction, sample = prediction[EIGEN_CROP], replace(sample, depth_m=sample.depth_m[EIGEN_CROP])
        self._meter.update(prediction, sample)

    def state(self) -> Any:
        """Of the meter."""
        return self._meter.state()

    def merge(self, state: Any) -> None:
        """Add another rank's images."""
        self._meter.merge(state)

    def compute(self) -> dict[str, Any]:
        """One row; none without images of the crop's size."""
        result = self._meter.compute()
        return {self.name: {name: result[name] for name in SHOWN if name in result}} if result["pixels"] else {}


class _SegmentationDefinitions:
    """mIoU and pixel accuracy from one table of all images and from one for each, void left out or wrong."""

    def __init__(self, own: SegmentationMeter) -> None:
        self._new = lambda: type(own)(own.space, dict(zip(own.classes, own.members, strict=True)))
        self._all = self._new()
        self._images: list[tuple[float, float, float]] = []  # mIoU, that over classes in the truth, pixel accuracy

    def update(self, prediction: Any, sample: Sample) -> None:
        """Count one image."""
        if sample.segmentation is None:
            return
        classes = prediction if isinstance(prediction, np.ndarray) else prediction.cpu().numpy()
        self._all.update(classes, sample)
        of_image = self._new()
        of_image.update(classes, sample)
        if (result := of_image.compute())["pixels"]:
            self._images.append((result["miou"], _over_truth(result), result["pixel_accuracy"]))

    def state(self) -> tuple[Any, list[tuple[float, float, float]]]:
        """The common table, and a row an image."""
        return self._all.state(), self._images

    def merge(self, state: tuple[Any, list[tuple[float, float, float]]]) -> None:
        """Add another rank's images."""
        self._all.merge(state[0])
        self._images = sorted(self._images + state[1])  # one order, whatever the ranks

    def compute(self) -> dict[str, Any]:
        """By definition."""
        if not self._images:
            return {}
        result = self._all.compute()
        void_iou, void_accuracy = self._void_is_wrong()
        miou, over_truth, accuracy = np.array(sorted(self._images)).mean(axis=0).tolist()
        rows = {
            "one table, void left out": (result["miou"], result["pixel_accuracy"]),
            "one table, over classes of the truth": (_over_truth(result), result["pixel_accuracy"]),
            "one table, void pixels are wrong": (void_iou, void_accuracy),
            "mean of images, void left out": (miou, accuracy),
            "mean of images, over classes of the truth": (over_truth, accuracy),
        }
        return {name: dict(zip(("miou", "pixel_accuracy"), row, strict=True)) for name, row in rows.items()}

    def _void_is_wrong(self) -> tuple[float, float]:
        """mIoU and pixel accuracy when whatever is predicted where nobody labelled counts as a false alarm."""
        table = self._all.confusion()
        pixels: NDArray[np.int64] = self._all.state()[0]
        on_void = self._all.joined(pixels[IGNORE])
        hits = np.diag(table)
        true = self._all.joined(pixels.sum(axis=1))
        union = true + table.sum(axis=0) + on_void - hits
        return float((hits / np.maximum(union, 1))[union > 0].mean()), float(hits.sum() / max(pixels.sum(), 1))


def _over_truth(result: Mapping[str, Any]) -> float:
    """mIoU without classes that are predicted, but not in the truth."""
    return float(np.mean([row["iou"] for row in result["per_class"].values() if row["pixels"]]))
