"""Errors of stereo disparity in the units of Cityscapes' files, pooled over all pixels of a split."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visionmtl.metrics.base import Direction
from visionmtl.structures import Sample

_CODES_PER_PX = 256
_MAX_CODE = 65535


class DisparityMeter:
    """Mean absolute and mean relative error of disparity, over all pixels with min_m < truth < max_m.

    Disparity in pixels of the whole image is `Sample.disparity_px_metre` / depth, at whatever size it is scored.
    Multi-task papers call inverse depth, or depth, what Cityscapes' 16-bit files hold brought to 0..1:
    (256 x disparity + 1) / 65535. `abs_err` is in that unit (1 is about 256 px of 2048), `abs_err_px` in pixels.
    """

    metrics: ClassVar[Mapping[str, Direction | None]] = {
        **dict.fromkeys(("abs_err", "abs_err_px", "rel_err"), "min"),
        "pixels": None,
    }

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
        if sample.disparity_px_metre is None:
            raise ValueError(
                f"image {sample.image_id!r} has depth, but no stereo camera; disparity needs its baseline and focal "
                "length, as Cityscapes has them; score this data set with another protocol"
            )
        if isinstance(prediction, Tensor):
            prediction = prediction.cpu().numpy()
        if prediction.shape != truth.shape:
            raise ValueError(
                f"image {sample.image_id!r}: the predicted depth is {list(prediction.shape)} and the truth "
                f"{list(truth.shape)}; allowed is one size; resize the prediction, never the truth"
            )
        valid = (truth > self.min_m) & (truth < self.max_m)
        guess, true = prediction[valid].astype(np.float64), truth[valid].astype(np.float64)
        if not (guess > 0).all():
            raise ValueError(
                f"image {sample.image_id!r}: {int((~(guess > 0)).sum())} predicted depths are not positive; disparity "
                "needs metres > 0; predict a depth for every pixel"
            )
        codes, true_codes = (_CODES_PER_PX * sample.disparity_px_metre / metres + 1 for metres in (guess, true))
        difference = np.abs(codes - true_codes)
        self._rows.append((true.size, float(difference.sum()), float((difference / true_codes).sum())))

    def state(self) -> list[tuple[int, float, float]]:
        """One row an image."""
        return list(self._rows)

    def merge(self, state: list[tuple[int, float, float]]) -> None:
        """Add another rank's images."""
        self._rows.extend(state)

    def compute(self) -> dict[str, Any]:
        """abs_err, abs_err_px, rel_err; None without valid pixels. Also: pixels, protocol."""
        pixels = sum(row[0] for row in self._rows)
        in_codes = math.fsum(row[1] for row in self._rows) / pixels if pixels else None
        return {
            "abs_err": None if in_codes is None else in_codes / _MAX_CODE,
            "abs_err_px": None if in_codes is None else in_codes / _CODES_PER_PX,
            "rel_err": math.fsum(row[2] for row in self._rows) / pixels if pixels else None,
            "pixels": pixels,
            "protocol": f"pooled disparity as stored, (256 px + 1) / 65535, px of the whole image, "
            f"{self.min_m:g} < truth < {self.max_m:g} m",
        }
