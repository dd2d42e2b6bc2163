"""Errors of metric depth under a named protocol."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionmtl.metrics.base import Direction
from visionmtl.ops.upload import beside
from visionmtl.structures import Sample

DepthProtocol = Literal["nyu_eigen", "nyu_median", "per_image", "pooled", "batch_mean"]

_HOW = {
    "nyu_eigen": "rows 45:471 and columns 41:601 of 480x640, mean over images",
    "nyu_median": "each prediction scaled by median(truth) / median(prediction), sums over all valid pixels",
    "per_image": "all pixels, mean over images",
    "pooled": "sums over all valid pixels of the split",
    "batch_mean": "pooled within {} consecutive images, mean over those groups",
}
NYU_PROTOCOLS = "nyu_eigen", "nyu_median"
"""Those of 480x640 alone, with limits of their own."""
NYU_EIGEN_LIMITS_M = 1e-3, 10.0
NYU_SIZE = (480, 640)
EIGEN_CROP = np.s_[45:471, 41:601]
"""Rows and columns of NYUv2 that depth papers score (Eigen et al. 2014, arXiv:1406.2283)."""

_COLUMNS = (
    *("pixels", "abs_rel", "sq_rel", "abs", "sq", "log10", "sq_log", "bias", "centred"),
    *("delta1", "delta2", "delta3", "aligned_delta1", "log_factor", "wrong"),
)

_Row = dict[str, float]
"""By _COLUMNS but the last: sums over one image's valid pixels, in metres; log_factor: ln of its median factor."""


class DepthMeter:
    """AbsRel, SqRel, RMSE and the rest; valid where min_m < truth < max_m, predictions clamped to [min_m, max_m].

    protocol: "nyu_eigen" (NYUv2 depth papers), "nyu_median" ("pooled" with align "median"), "per_image"
    ("nyu_eigen" without crop), "pooled" (multi-task papers) or "batch_mean"
    (only to reproduce tables made so: groups of `group_images` in the order of their ids).
    align: "median" scales each prediction by median(truth) / median(prediction) before the clamp, and says so in the
    protocol's name. Aligned or not, `scale_spread` and `aligned_delta1` tell how much of the error is one factor an
    image: the standard deviation over images of ln(median(truth) / median(clamped prediction)), and delta1 after that
    scaling. `log_bias` is the mean of ln(prediction) - ln(truth): below 0 predictions are too near.
    Sums are float64 and exact in the order: any split over ranks gives the same numbers.
    """

    metrics: ClassVar[Mapping[str, Direction | None]] = {
        **dict.fromkeys(("abs_rel", "sq_rel", "mae_m", "rmse_m", "rmse_log", "log10", "silog"), "min"),
        **dict.fromkeys(("delta1", "delta2", "delta3"), "max"),
        "log_bias": None,
        "scale_spread": "min",
        "aligned_delta1": "max",
        **dict.fromkeys(("pixels", "images_measured")),
    }

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
        self.align = "median" if protocol == "nyu_median" else align
        self.group_images = group_images
        self._rows: list[tuple[str, _Row]] = []
        self._pending: list[tuple[str, Tensor]] = []  # sums that may still be computing on a device

    def update(self, prediction: NDArray[np.float32] | Tensor, sample: Sample) -> None:
        """Count one image; prediction: float [H, W] metres at the truth's size.

        A prediction that is a tensor is summed where it lies, and nothing waits for it until `state` or `compute`.
        """
        if sample.depth_m is None:
            return
        guess = torch.as_tensor(prediction)
        truth = beside(sample.depth_m, guess)
        if guess.shape != truth.shape:
            raise ValueError(
                f"image {sample.image_id!r}: the prediction is {list(guess.shape)} and the truth "
                f"{list(truth.shape)}; allowed is one size; resize the prediction, never the truth"
            )
        if self.protocol in NYU_PROTOCOLS and truth.shape != NYU_SIZE:
            raise ValueError(
                f"image {sample.image_id!r} is {truth.shape[0]}x{truth.shape[1]} px; protocol {self.protocol!r} is "
                "defined for 480x640 (NYUv2); for other data leave --protocol out and set tasks.NAME.protocol=per_image"
            )
        if self.protocol == "nyu_eigen":
            guess, truth = guess[EIGEN_CROP], truth[EIGEN_CROP]
        self._pending.append((sample.image_id, self._sums(guess.double(), truth.double(), guess.device.type == "cpu")))
        if isinstance(prediction, np.ndarray):
            self._collect()

    def _sums(self, guess: Tensor, truth: Tensor, on_cpu: bool) -> Tensor:
        """float64 [len(_COLUMNS)] over one image's valid pixels.

        on_cpu: the others are taken out first; on a device, their number would have to be waited for
        """
        valid = (truth > self.min_m) & (truth < self.max_m)
        median: Callable[[Tensor, Tensor], Tensor] = _median if on_cpu else _masked_median
        if on_cpu:
            counted = valid.numpy()
            guess, truth = (torch.from_numpy(depth_m.numpy()[counted]) for depth_m in (guess, truth))
            valid = torch.ones_like(truth, dtype=torch.bool)
        wrong = (guess.isnan() & valid).sum()
        middle = median(guess if self.align == "median" else guess.clamp(self.min_m, self.max_m), valid)
        if self.align == "median":
            wrong = torch.where(wrong > 0, wrong, -((middle <= 0) | middle.isinf()).long())
        factor = torch.where(valid.any() & (wrong == 0), median(truth, valid) / middle, 1.0)

        # pixels that do not count become 1 m on both sides: no error, and no NaN either
        def limited(depth_m: Tensor) -> Tensor:
            return torch.where(valid, torch.where(valid, depth_m, 1.0).clamp(self.min_m, self.max_m), 1.0)

        true, aligned = torch.where(valid, truth, 1.0), limited(guess * factor)
        guess = aligned if self.align == "median" else limited(guess)
        return _sums(guess, true, aligned, valid, wrong, factor)

    def _collect(self) -> None:
        for image_id, sums in self._pending:
            row = dict(zip(_COLUMNS, sums.tolist(), strict=True))
            wrong = row.pop("wrong")
            if wrong > 0:
                raise ValueError(
                    f"image {image_id!r}: {int(wrong)} predicted depths are NaN; allowed are metres; the network has "
                    "diverged: lower the learning rate or clip gradients"
                )
            if wrong < 0:
                raise ValueError(
                    f"image {image_id!r}: the median of the predicted depths is not positive or not finite; median "
                    "alignment needs a positive finite one; evaluate without align to see the predictions as they are"
                )
            self._rows.append((image_id, row))
        self._pending.clear()

    def state(self) -> list[tuple[str, _Row]]:
        """One row an image."""
        self._collect()
        return list(self._rows)

    def merge(self, state: list[tuple[str, _Row]]) -> None:
        """Add another rank's images."""
        self._rows.extend(state)

    def compute(self) -> dict[str, Any]:
        """abs_rel, sq_rel, mae_m, rmse_m, rmse_log, log10, silog, delta1, delta2, delta3, log_bias,
        aligned_delta1, scale_spread; None without valid pixels.

        Also: pixels (valid ones), images_measured (with at least one valid pixel), protocol.
        """
        self._collect()
        rows = [row for _, row in sorted(self._rows, key=lambda row: (len(row[0]), row[0])) if row["pixels"]]
        whole = max(len(rows), 1)
        size = {"pooled": whole, "nyu_median": whole, "batch_mean": self.group_images}.get(self.protocol, 1)
        groups = [_metrics(rows[start : start + size]) for start in range(0, len(rows), size)]

        names = _metrics([dict.fromkeys(_COLUMNS, 1.0)])
        result: dict[str, Any] = {
            name: math.fsum(group[name] for group in groups) / len(groups) if groups else None for name in names
        }
        result["scale_spread"] = _spread([row["log_factor"] for row in rows]) if rows else None
        result["pixels"] = int(sum(row["pixels"] for row in rows))
        result["images_measured"] = len(rows)
        aligned = ", median-aligned" if self.align == "median" and self.protocol != "nyu_median" else ""
        result["protocol"] = (
            f"{self.protocol}{aligned}: {self.min_m:g} < truth < {self.max_m:g} m, prediction clamped, "
            + _HOW[self.protocol].format(self.group_images)
        )
        return result


def _sums(guess: Tensor, true: Tensor, aligned: Tensor, valid: Tensor, wrong: Tensor, factor: Tensor) -> Tensor:
    """The columns; guess, true and aligned float64 metres, 1 where not valid.

    Of the log error also its mean and centred sum. aligned: the guess scaled by `factor`
    """
    pixels = valid.sum()
    difference, quotient = (guess - true).abs(), guess / true
    square = difference.square()
    log_error = quotient.log()
    ratio = torch.maximum(quotient, true / guess)
    bias = log_error.sum() / pixels.clamp(min=1)
    sums = {
        "pixels": pixels,
        "abs_rel": (difference / true).sum(),
        "sq_rel": (square / true).sum(),
        "abs": difference.sum(),
        "sq": square.sum(),
        "log10": log_error.abs().sum() / math.log(10),
        "sq_log": log_error.square().sum(),
        "bias": bias,
        "centred": ((log_error - bias) * valid).square().sum(),
        **{f"delta{power}": ((ratio < 1.25**power) & valid).sum() for power in (1, 2, 3)},
        "aligned_delta1": ((torch.maximum(aligned / true, true / aligned) < 1.25) & valid).sum(),
        "log_factor": factor.log(),
        "wrong": wrong,
    }
    return torch.stack([sums[name].double() for name in _COLUMNS])


def _median(values: Tensor, _valid: Tensor) -> Tensor:
    """Of all values, the mean of the middle two; NaN without any. Need not sort them."""
    return torch.tensor(np.median(values.numpy()) if values.numel() else np.nan, dtype=values.dtype)


def _masked_median(values: Tensor, valid: Tensor) -> Tensor:
    """The same of the valid values, without waiting for a device."""
    ordered = torch.where(valid, values, torch.inf).flatten().sort().values
    count = valid.sum()
    middle = torch.stack([(count - 1).clamp(min=0) // 2, count // 2])
    return torch.where(count > 0, ordered.index_select(0, middle).mean(), torch.nan)


def _spread(values: list[float]) -> float:
    """The standard deviation, exact in the order."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


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
        "log_bias": bias,
        "aligned_delta1": mean["aligned_delta1"],
    }
