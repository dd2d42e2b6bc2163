"""Errors of inverse depth, which is disparity up to the camera's constant, pooled over all pixels of a split."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visionmtl.types import Sample


class DisparityMeter:
    """Mean absolute and mean relative error of 1 / depth, over all pixels with min_m < truth < max_m.

    Disparity in pixels is baseline x focal length / depth. Samples carry metres, so the absolute error is in 1/m: times
    baseline x focal length of the images as they are scored, it is in pixels. The relative error has no unit.
    """

    def __init__(self, min_m: float, max_m: float) -> None:
        if not 0 < min_m < max_m:
            raise ValueError(f"min_m is {min_m}, max_m {max_m}; allowed is 0 < min_m < max_m; correct the limits")
        self.min_m, self.max_m = min_m, max_m
        self._rows: list[tuple[int, float, float]] = []  # pixels, sum of absolute and of relative errors, one an image

    def update(self, prediction: NDArray[np.float32] | Tensor, sample: Sample) -> None:
        """Count one image; prediction: float [H, W] metres > 0 at the truth's size."""
        truth = sample.depth_m
        if truth is None:
            return
        if isinstance(prediction, Tensor):
            prediction = prediction.cpu().numpy()
        if prediction.shape != truth.shape:
            raise ValueError(
                f"image {sample.image_id!r}: the predicted depth is {list(prediction.shape)} and the truth "
                f"{list(truth.shape)}; allowed is one size; resize the prediction, never the truth"
            )
        valid = (truth > self.min_m) & (truth < self.max_m)
        guess, true = prediction[valid].astype(np.float64), 1 / truth[valid].astype(np.float64)
        if not (guess > 0).all():
            raise ValueError(
                f"image {sample.image_id!r}: {int((~(guess > 0)).sum())} predicted depths are not positive; inverse "
                "depth needs metres > 0; predict a depth for every pixel"
            )
        difference = np.abs(1 / guess - true)
        self._rows.append((true.size, float(difference.sum()), float((difference / true).sum())))

    def state(self) -> list[tuple[int, float, float]]:
        """One row an image."""
        return list(self._rows)

    def merge(self, state: list[tuple[int, float, float]]) -> None:
        """Add another rank's images."""
        self._rows.extend(state)

    def compute(self) -> dict[str, Any]:
        """abs_err_per_m, rel_err; None without valid pixels. Also: pixels, protocol."""
        pixels = sum(row[0] for row in self._rows)
        return {
            "abs_err_per_m": math.fsum(row[1] for row in self._rows) / pixels if pixels else None,
            "rel_err": math.fsum(row[2] for row in self._rows) / pixels if pixels else None,
            "pixels": pixels,
            "protocol": f"pooled inverse depth in 1/m, {self.min_m:g} < truth < {self.max_m:g} m",
        }
