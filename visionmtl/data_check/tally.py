"""What is counted of samples, so that counts of many can be added and stay small."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from visionmtl.structures import IGNORE, LABEL_FIELDS, MAX_CLASSES, Boxes, LabelSpace, Sample

SMALL_PX2, LARGE_PX2 = 32**2, 96**2
"""COCO's limits of small and large objects."""
BINS_PER_OCTAVE = 64  # 1.1 % wide
_LOW, _HIGH = -10, 20  # octaves, 1 mm to 1000 km; what lies beyond counts in the outermost bins
DEPTH_EDGES_M: NDArray[np.float64] = 2.0 ** (np.arange((_HIGH - _LOW) * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE + _LOW)


def _counts(count: int) -> Callable[[], NDArray[np.int64]]:
    return lambda: np.zeros(count, np.int64)


@dataclass
class Tally:
    """Counts over the samples of one data set that could be read."""

    images: int = 0
    unlabelled: int = 0  # images without any label
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (H, W)
    labelled: Counter[str] = field(default_factory=Counter)  # images, by field
    boxes_an_image: Counter[int] = field(default_factory=Counter)
    crowds: int = 0
    by_size: NDArray[np.int64] = field(default_factory=_counts(3))  # small, medium, large, without crowds
    boxes: NDArray[np.int64] = field(default_factory=_counts(MAX_CLASSES))  # by class, with crowds
    boxes_images: NDArray[np.int64] = field(default_factory=_counts(MAX_CLASSES))  # images that show the class
    pixels: NDArray[np.int64] = field(default_factory=_counts(IGNORE + 1))  # by class id
    pixels_images: NDArray[np.int64] = field(default_factory=_counts(IGNORE + 1))
    depth: NDArray[np.int64] = field(default_factory=_counts(len(DEPTH_EDGES_M) - 1))  # measured pixels, by bin
    depth_pixels: int = 0  # measured or not
    depth_range_m: tuple[float, float] = (np.inf, 0.0)

    def add(self, sample: Sample) -> None:
        """Count a sample; what is broken in it counts as far as it can."""
        self.images += 1
        self.sizes[int(sample.image.shape[0]), int(sample.image.shape[1])] += 1
        known = [name for name in LABEL_FIELDS if getattr(sample, name) is not None]
        self.labelled.update(known)
        self.unlabelled += not known
        if sample.boxes is not None:
            self._add_boxes(sample.boxes)
        if sample.segmentation is not None:
            counts = np.bincount(sample.segmentation.ravel(), minlength=IGNORE + 1)[: IGNORE + 1]
            self.pixels += counts
            self.pixels_images += counts > 0
        if sample.depth_m is not None:
            self._add_depth(sample.depth_m)

    def _add_boxes(self, boxes: Boxes) -> None:
        self.boxes_an_image[len(boxes.labels)] += 1
        self.crowds += int(np.count_nonzero(boxes.crowd))
        area = boxes.area[~boxes.crowd]
        large = np.count_nonzero(area >= LARGE_PX2)
        small = np.count_nonzero(area < SMALL_PX2)
        self.by_size += np.array([small, len(area) - small - large, large])
        inside = boxes.labels[(boxes.labels >= 0) & (boxes.labels < MAX_CLASSES)]
        counts = np.bincount(inside, minlength=MAX_CLASSES)
        self.boxes += counts
        self.boxes_images += counts > 0

    def _add_depth(self, depth_m: NDArray[np.float32]) -> None:
        measured = depth_m[np.isfinite(depth_m) & (depth_m > 0)]
        self.depth_pixels += depth_m.size
        if not measured.size:
            return
        position = (np.log2(measured) - np.float32(_LOW)) * np.float32(BINS_PER_OCTAVE)
        bins = np.clip(position, 0, len(self.depth) - 1, out=position).astype(np.int64)
        self.depth += np.bincount(bins, minlength=len(self.depth))
        low, high = self.depth_range_m
        self.depth_range_m = min(low, float(measured.min())), max(high, float(measured.max()))

    def merge(self, other: "Tally") -> None:
        """Add the counts of other samples."""
        low, high = self.depth_range_m
        for name, value in vars(other).items():
            if name == "depth_range_m":
                self.depth_range_m = min(low, value[0]), max(high, value[1])
            else:
                setattr(self, name, getattr(self, name) + value)

    def depth_quantile_m(self, share: float) -> float:
        """The depth below which this share of the measured pixels lies, to 1.1 %; some must be measured."""
        bin_ = int(np.searchsorted(np.cumsum(self.depth), share * self.depth.sum()))
        middle = float(np.sqrt(DEPTH_EDGES_M[bin_] * DEPTH_EDGES_M[bin_ + 1]))
        return min(max(middle, self.depth_range_m[0]), self.depth_range_m[1])


def classes_found(counts: NDArray[np.int64], space: LabelSpace) -> list[int]:
    """Class ids of the space that occur."""
    return [int(k) for k in np.flatnonzero(counts[: len(space.classes)])]
