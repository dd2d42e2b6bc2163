"""Angles between predicted and true surface normals, pooled over all pixels of a split."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from visionmtl.metrics.base import Direction
from visionmtl.structures import Sample

_BINS_PER_DEGREE = 100
_THRESHOLDS = {"within_11_25": 11.25, "within_22_5": 22.5, "within_30": 30.0}


class NormalsMeter:
    """Mean and median angle and the shares below 11.25, 22.5 and 30 degrees, over all pixels with a known normal.

    The mean and the shares are exact; the median comes from a histogram with bins of 0.01 degrees and is off by at most
    half a bin. Lengths do not matter; a predicted 0 0 0 has no direction and counts as 90 degrees.
    """

    metrics: ClassVar[Mapping[str, Direction | None]] = {
        **dict.fromkeys(("mean_deg", "median_deg"), "min"),
        **dict.fromkeys(_THRESHOLDS, "max"),
        "pixels": None,
    }

    def __init__(self) -> None:
        self._angles = np.zeros(180 * _BINS_PER_DEGREE + 1, np.int64)
        self._within = np.zeros(len(_THRESHOLDS), np.int64)
        self._sums: list[float] = []  # degrees, one an image; added exactly at the end, in any order

    def update(self, prediction: NDArray[np.float32], sample: Sample) -> None:
        """Count one image; prediction: float [H, W, 3] at the truth's size."""
        truth = sample.normals
        if truth is None:
            return
        if prediction.shape != truth.shape:
            raise ValueError(
                f"image {sample.image_id!r}: the prediction is {list(prediction.shape)} and the truth "
                f"{list(truth.shape)}; allowed is [H, W, 3] of one size; resize the prediction, never the truth"
            )
        known = truth.any(axis=2)
        angles = _degrees(prediction[known].astype(np.float64), truth[known].astype(np.float64))
        if np.isnan(angles).any():
            raise ValueError(
                f"image {sample.image_id!r}: {int(np.isnan(angles).sum())} predicted normals are NaN; allowed are "
                "finite vectors; the network has diverged: lower the learning rate or clip gradients"
            )
        self._sums.append(float(angles.sum()))
        self._angles += np.bincount((angles * _BINS_PER_DEGREE).astype(np.int64), minlength=len(self._angles))
        self._within += [int((angles < threshold).sum()) for threshold in _THRESHOLDS.values()]

    def state(self) -> dict[str, Any]:
        """Sums and counts."""
        return {"angles": self._angles.copy(), "within": self._within.copy(), "sums": list(self._sums)}

    def merge(self, state: dict[str, Any]) -> None:
        """Add another rank's counts."""
        self._angles += state["angles"]
        self._within += state["within"]
        self._sums.extend(state["sums"])

    def compute(self) -> dict[str, Any]:
        """mean_deg, median_deg, within_11_25, within_22_5, within_30 (shares 0..1); None when nothing is known.

        Also: pixels, protocol.
        """
        pixels = int(self._angles.sum())
        result: dict[str, Any] = {
            "mean_deg": math.fsum(self._sums) / pixels if pixels else None,
            "median_deg": self._median(pixels) if pixels else None,
        }
        for name, count in zip(_THRESHOLDS, self._within.tolist(), strict=True):
            result[name] = count / pixels if pixels else None
        result["pixels"] = pixels
        result["protocol"] = "pooled over all pixels with a known normal; median in bins of 0.01 degrees"
        return result

    def _median(self, pixels: int) -> float:
        ranks = np.searchsorted(np.cumsum(self._angles), [(pixels - 1) // 2 + 1, pixels // 2 + 1])
        return float((ranks.mean() + 0.5) / _BINS_PER_DEGREE)


def _degrees(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angles [P] in degrees between [P, 3] and [P, 3]; atan2 keeps its digits near 0 and 180, where acos loses half."""
    cross = np.linalg.norm(np.cross(a, b), axis=1)
    angles = np.degrees(np.arctan2(cross, (a * b).sum(axis=1)))
    return np.where(a.any(axis=1), angles, 90.0)
