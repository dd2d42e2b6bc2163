"""Errors of metric depth under a named protocol."""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from visionmtl.types import Sample

DepthProtocol = Literal["eigen", "per_image", "pooled", "batch_mean"]

_HOW = {
    "eigen": "rows 45:471 and columns 41:601 of 480x640, mean over images",
    "per_image": "all pixels, mean over images",
    "pooled": "sums over all valid pixels of the split",
    "batch_mean": "pooled within {} consecutive images, mean over those groups",
}
_EIGEN_SIZE = (480, 640)
_EIGEN_CROP = np.s_[45:471, 41:601]

_Row = dict[str, float]


class DepthMeter:
    """AbsRel, SqRel, RMSE and the rest; valid where min_m < truth < max_m, predictions clamped to [min_m, max_m].

    protocol: "eigen" (NYUv2 depth papers), "per_image" (the same without crop), "pooled" (multi-task papers) or
    "batch_mean" (only to reproduce tables made so: groups of `group_images` in the order of their ids).
    align: "median" scales each prediction by median(truth) / median(prediction) before the clamp, and says so in the
    protocol's name. Sums are float64 and exact in the order: any split over ranks gives the same numbers.
    """

    def __init__(
        self,
        protocol: DepthProtocol = "per_image",
        min_m: float = 1e-3,
        max_m: float = 10.0,
        *,
        align: Literal["none", "median"] = "none",
        group_images: int = 8,
    ) -> None:
        if protocol not in _HOW:
            raise ValueError(f"unknown depth protocol {protocol!r}; allowed are {', '.join(_HOW)}; choose one of them")
        if not 0 < min_m < max_m:
            raise ValueError(f"min_m is {min_m}, max_m {max_m}; allowed is 0 < min_m < max_m; correct the limits")
        if group_images < 1:
            raise ValueError(f"group_images is {group_images}; allowed is 1 or more; give the batch size of the table")
        self.protocol = protocol
        self.min_m, self.max_m = min_m, max_m
        self.align = align
        self.group_images = group_images
        self._rows: list[tuple[str, _Row]] = []

    def update(self, prediction: NDArray[np.float32], sample: Sample) -> None:
        """Count one image; prediction: float [H, W] metres at the truth's size."""
        truth = sample.depth_m
        if truth is None:
            return
        if prediction.shape != truth.shape:
            raise ValueError(
                f"image {sample.image_id!r}: the prediction is {list(prediction.shape)} and the truth "
                f"{list(truth.shape)}; allowed is one size; resize the prediction, never the truth"
            )
        if self.protocol == "eigen":
            if truth.shape != _EIGEN_SIZE:
                raise ValueError(
                    f"image {sample.image_id!r} is {truth.shape[0]}x{truth.shape[1]} px; protocol 'eigen' is defined "
                    "for 480x640 (NYUv2); choose protocol 'per_image' for other data"
                )
            prediction, truth = prediction[_EIGEN_CROP], truth[_EIGEN_CROP]

        valid = (truth > self.min_m) & (truth < self.max_m)
        true, guess = truth[valid].astype(np.float64), prediction[valid].astype(np.float64)
        if np.isnan(guess).any():
            raise ValueError(
                f"image {sample.image_id!r}: {int(np.isnan(guess).sum())} predicted depths are NaN; allowed are "
                "metres; the network has diverged: lower the learning rate or clip gradients"
            )
        if self.align == "median" and true.size:
            middle = np.median(guess)
            if not 0 < middle < math.inf:
                raise ValueError(
                    f"image {sample.image_id!r}: the median of the predicted depths is {middle}; median alignment "
                    "needs a positive finite one; evaluate without align to see the predictions as they are"
                )
            guess = guess * (np.median(true) / middle)
        self._rows.append((sample.image_id, _row(true, np.clip(guess, self.min_m, self.max_m))))

    def state(self) -> list[tuple[str, _Row]]:
        """One row an image."""
        return list(self._rows)

    def merge(self, state: list[tuple[str, _Row]]) -> None:
        """Add another rank's images."""
        self._rows.extend(state)

    def compute(self) -> dict[str, Any]:
        """abs_rel, sq_rel, mae_m, rmse_m, rmse_log, log10, silog, delta1, delta2, delta3; None without valid pixels.

        Also: pixels (valid ones), images_measured (with at least one valid pixel), protocol.
        """
        rows = [row for _, row in sorted(self._rows, key=lambda row: (len(row[0]), row[0])) if row["pixels"]]
        size = {"pooled": max(len(rows), 1), "batch_mean": self.group_images}.get(self.protocol, 1)
        groups = [_metrics(rows[start : start + size]) for start in range(0, len(rows), size)]

        names = _metrics([_row(np.ones(1), np.ones(1))])
        result: dict[str, Any] = {
            name: math.fsum(group[name] for group in groups) / len(groups) if groups else None for name in names
        }
        result["pixels"] = int(sum(row["pixels"] for row in rows))
        result["images_measured"] = len(rows)
        aligned = ", median-aligned" if self.align == "median" else ""
        result["protocol"] = (
            f"{self.protocol}{aligned}: {self.min_m:g} < truth < {self.max_m:g} m, prediction clamped, "
            + _HOW[self.protocol].format(self.group_images)
        )
        return result


def _row(true: NDArray[np.float64], guess: NDArray[np.float64]) -> _Row:
    """Sums over one image's valid pixels [P], in metres; of the log error also its mean and centred sum of squares."""
    difference = np.abs(guess - true)
    log_error = np.log(guess) - np.log(true)
    ratio = np.maximum(guess / true, true / guess)
    bias = log_error.mean() if true.size else 0.0
    row = {
        "pixels": true.size,
        "abs_rel": (difference / true).sum(),
        "sq_rel": (difference**2 / true).sum(),
        "abs": difference.sum(),
        "sq": (difference**2).sum(),
        "log10": np.abs(log_error).sum() / math.log(10),
        "sq_log": (log_error**2).sum(),
        "bias": bias,
        "centred": ((log_error - bias) ** 2).sum(),
        **{f"delta{power}": (ratio < 1.25**power).sum() for power in (1, 2, 3)},
    }
    return {name: float(value) for name, value in row.items()}


def _metrics(rows: list[_Row]) -> dict[str, float]:
    """The metrics of a group of images, pooled over their pixels; every row has pixels > 0."""
    pixels = sum(row["pixels"] for row in rows)
    mean = {name: math.fsum(row[name] for row in rows) / pixels for name in rows[0]}

    # SILog^2 = variance of the log error; centred per image, then joined: no cancellation when all errors are alike
    bias = math.fsum(row["pixels"] * row["bias"] for row in rows) / pixels
    variance = mean["centred"] + math.fsum(row["pixels"] * (row["bias"] - bias) ** 2 for row in rows) / pixels
    return {
        "abs_rel": mean["abs_rel"],
        "sq_rel": mean["sq_rel"],
        "mae_m": mean["abs"],
        "rmse_m": math.sqrt(mean["sq"]),
        "rmse_log": math.sqrt(mean["sq_log"]),
        "log10": mean["log10"],
        "silog": 100 * math.sqrt(variance),
        "delta1": mean["delta1"],
        "delta2": mean["delta2"],
        "delta3": mean["delta3"],
    }
