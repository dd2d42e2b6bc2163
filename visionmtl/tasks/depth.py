"""Monocular metric depth: metres along the optical axis for every pixel."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from visionmtl.metrics.base import Meter
from visionmtl.metrics.depth import NYU_EIGEN_LIMITS_M, NYU_PROTOCOLS, DepthMeter, DepthProtocol
from visionmtl.modeling.decoders.base import Decoder
from visionmtl.modeling.decoders.top_down import TopDown
from visionmtl.ops.losses import each_to_original, gradient_matching, neighbours, scale_invariant_log
from visionmtl.ops.resize import resize, upsample
from visionmtl.ops.soft_losses import log_distance, log_distance_up_to_scale, resize_like
from visionmtl.ops.virtual_normals import valid_groups, virtual_normal_loss
from visionmtl.structures import ImageMeta, Intrinsics, LabelSpace, Maps, Sample
from visionmtl.tasks.base import SoftLoss, Task, count_true
from visionmtl.visualization.draw import DrawOptions, draw_depth, draw_depth_errors


class Depth(Task, frozen=True):
    """Settings of depth. Prediction: float32 [H, W] metres within the metric range, at the original size."""

    type: Literal["depth"] = "depth"
    field: ClassVar[str] = "depth_m"
    result_field: ClassVar[str | None] = "depth_m"
    counting_when_trained: ClassVar = ("learns_from", "max_depth_m", "min_depth_m", "protocol")
    meter_type: ClassVar = DepthMeter
    primary_metric: ClassVar[str] = "rmse_m"
    soft_settings: ClassVar[tuple[str, ...]] = ("scale",)

    min_depth_m: float = Field(0.1, gt=0, description="nearer measurements count as missing")
    max_depth_m: float = Field(10.0, gt=0, description="farther measurements count as missing")
    decoder: Decoder = TopDown()
    head: Literal["log", "bins"] = Field("log", description="regress log depth, or its expectation over log bins")
    num_bins: int | None = Field(None, ge=2, description="log-spaced depths of head 'bins'; unset = 64")
    variance_focus: float = Field(0.85, ge=0, lt=1, description="lambda of the scale-invariant loss")
    gradient_weight: float = Field(0.5, ge=0, description="factor of the multi-scale gradient term; 0 = off")
    gradient_scales: int = Field(4, ge=1, le=16, description="scale k has every 2^k-th pixel")
    virtual_normal_weight: float = Field(
        0.0, ge=0, description="factor of virtual normals (arXiv:1907.12209), which keep surfaces flat; 0 = off"
    )
    """Needs a camera: that of the sample where its data set knows it, else one that sees 60 degrees across."""
    protocol: DepthProtocol = "per_image"

    @field_validator("protocol", mode="before")
    @classmethod
    def _older_name(cls, value: Any) -> Any:
        return "nyu_eigen" if value == "eigen" else value  # as configs and checkpoints had it

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_depth_m >= self.max_depth_m:
            raise ValueError(
                f"min_depth_m is {self.min_depth_m} and max_depth_m {self.max_depth_m}; "
                "the first must be smaller; correct the metric range"
            )
        if self.head == "log" and self.num_bins is not None:
            raise ValueError(
                f"num_bins is {self.num_bins}, but head is 'log', so it would have no effect; "
                "choose head 'bins' or remove num_bins"
            )
        return self

    @property
    def levels(self) -> tuple[int, ...]:
        return self.decoder.levels

    def build(self, channels: int, space: LabelSpace | None) -> nn.Module:
        decoder = self.decoder.build(channels)
        limits = math.log(self.min_depth_m), math.log(self.max_depth_m)
        return _LogBins(decoder, limits, self.num_bins or 64) if self.head == "bins" else _LogDepth(decoder, limits)

    @property
    def settings_in_weights(self) -> tuple[str, ...]:
        """The depths of bins lie between the limits."""
        return ("min_depth_m", "max_depth_m") if self.head == "bins" else ()

    def size_problem(self, size: tuple[int, int]) -> str | None:
        most = (min(size) - 1).bit_length()
        if not self.gradient_weight or self.gradient_scales <= most:
            return None
        return (
            f"gradient_scales is {self.gradient_scales}, but of {size[0]}x{size[1]} pixels scale {most} has one in a "
            f"row or column, which has no neighbour; {most} is the most; lower it"
        )

    def rescale(self, module: nn.Module, slope: float, offset: float) -> None:
        """Let a module that `build` made predict slope * log depth + offset from now on."""
        assert isinstance(module, _LogDepth | _LogBins)
        with torch.no_grad():
            module.rescale(slope, offset)

    def collate(self, samples: Sequence[Sample | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """depth_m: float32 [B, H, W], 0 in the padding and where not measured.

        With virtual normals also camera: float32 [B, 4], fx, fy, cx, cy in pixels of the input.
        """
        depth_m = torch.zeros(len(samples), *size)
        for i, sample in enumerate(samples):
            if sample is not None and sample.depth_m is not None:
                height, width = sample.depth_m.shape
                depth_m[i, :height, :width] = torch.from_numpy(sample.depth_m)
        targets = {"depth_m": depth_m}
        if self.virtual_normal_weight:
            usual = _usual_camera(size)
            cameras = [sample.intrinsics if sample and sample.intrinsics else usual for sample in samples]
            targets["camera"] = torch.tensor(cameras, dtype=torch.float32)
        return targets

    def count(self, targets: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """Images with a measured pixel, pairs of measured neighbours by scale and direction, groups of three points."""
        seen = self._valid(targets["depth_m"].numpy())
        counts, valid = {"images": count_true(seen.any(axis=(1, 2)))}, torch.from_numpy(seen)
        if self.gradient_weight:
            for k, (in_row, in_column) in enumerate(neighbours(valid, self.gradient_scales)):
                counts[f"row_pairs_{k}"] = count_true(in_row.numpy())
                counts[f"column_pairs_{k}"] = count_true(in_column.numpy())
        if self.virtual_normal_weight:
            counts["groups"] = valid_groups(targets["depth_m"], valid, targets["camera"]).sum().float()
        return counts

    def _valid(self, depth_m: Any) -> Any:
        """Of a tensor or an array."""
        return (depth_m >= self.min_depth_m) & (depth_m <= self.max_depth_m)

    def loss(
        self, raw: Tensor, targets: dict[str, Tensor], labelled: Tensor, totals: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Parts "silog" and, when chosen, "gradient" and "virtual_normals"; at full resolution, in float32."""
        depth_m = targets["depth_m"]
        valid = self._valid(depth_m) & labelled[:, None, None]
        # replaced before the log: a masked NaN would still poison the gradient
        log_true = torch.where(valid, depth_m, 1.0).log()
        log_pred = upsample(raw.float(), depth_m.shape[1] // raw.shape[2]).squeeze(1)
        parts = {"silog": scale_invariant_log(log_pred, log_true, valid, self.variance_focus, totals["images"])}
        if self.gradient_weight:
            names = [f"{axis}_pairs_{k}" for k in range(self.gradient_scales) for axis in ("row", "column")]
            loss = gradient_matching(log_pred, log_true, valid, [totals[name] for name in names])
            parts["gradient"] = self.gradient_weight * loss
        if self.virtual_normal_weight:
            # an e beyond the range, where silog teaches alone: further out, the exponential would overflow
            limits = math.log(self.min_depth_m) - 1, math.log(self.max_depth_m) + 1
            loss = virtual_normal_loss(
                log_pred.clamp(*limits).exp(), depth_m, valid, targets["camera"], totals["groups"]
            )
            parts["virtual_normals"] = self.virtual_normal_weight * loss
        return parts

    def check_teacher(self, teacher: Task) -> None:
        """Any head and range teaches any other: both give the logarithm of metres."""

    def soft_targets(
        self, raw: Tensor, settings: SoftLoss, order: Tensor | None, mirrored: bool, zoom: float
    ) -> dict[str, Tensor]:
        """log_depth: [B, 1, h, w], natural log of metres; clamped to the teacher's range."""
        limits = math.log(self.min_depth_m), math.log(self.max_depth_m)
        log_depth = (raw.float() + math.log(zoom)).clamp(*limits)
        return {"log_depth": log_depth.flip(-1) if mirrored else log_depth}

    def distill(
        self, raw: Tensor, soft: dict[str, Tensor], totals: dict[str, Tensor], settings: SoftLoss
    ) -> dict[str, Tensor]:
        """Part "log", over all pixels of images."""
        log_pred = raw.float()
        log_teacher = resize_like(soft["log_depth"], log_pred)
        distance = log_distance_up_to_scale if settings.scale == "free" else log_distance
        return {"log": distance(log_pred[:, 0], log_teacher[:, 0], soft["content"], totals["soft_area"])}

    def predict(self, raw: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]) -> list[NDArray[np.float32]]:
        return [depth_m.cpu().numpy() for depth_m in self.predict_for_meter(raw, metas, size)]

    def predict_for_meter(self, raw: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]) -> list[Tensor]:
        return [self._metres(one, meta) for one, meta in zip(each_to_original(raw, size, metas), metas, strict=True)]

    def predict_mirrored(
        self, raw: Tensor, mirrored: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]
    ) -> list[NDArray[np.float32]]:
        """The geometric mean of the two depths."""
        views = zip(*_both_views(raw, mirrored, metas, size), metas, strict=True)
        return [self._metres((view + turned) / 2, meta).cpu().numpy() for view, turned, meta in views]

    def labels_need_mirror(self, confidence: float) -> bool:
        """The two views of an image tell how sure a depth is."""
        return confidence > 0

    def pseudo_labels(
        self,
        raw: Tensor,
        mirrored: Tensor | None,
        metas: Sequence[ImageMeta],
        size: tuple[int, int],
        confidence: float,
        unsure: float | None,
    ) -> list[NDArray[np.float32]]:
        """The predicted metres; 0 where the smaller of the two views' depths is below `confidence` times the larger.

        With two views, the geometric mean of both.
        """
        if mirrored is None:
            return self.predict(raw, metas, size)
        labels = []
        for view, turned, meta in zip(*_both_views(raw, mirrored, metas, size), metas, strict=True):
            agreement = (-(view - turned).abs()).exp()[0]  # of the logs: smaller / larger
            depth_m = self._metres((view + turned) / 2, meta)
            labels.append(torch.where(agreement < confidence, 0.0, depth_m).cpu().numpy())
        return labels

    def _metres(self, log_depth: Tensor, meta: ImageMeta) -> Tensor:
        return (log_depth[0].exp() * meta.zoom).clamp(self.min_depth_m, self.max_depth_m)

    decoded_outputs: ClassVar[dict[str, str]] = {
        "m": "float32 [B, H, W]: metres along the optical axis, at the input's size",
    }

    def decode_in_graph(self, raw: Tensor, size: tuple[int, int], content: Tensor, zoom: float) -> dict[str, Tensor]:
        metres = resize(raw.float(), size)[:, 0].exp() * zoom
        return {"m": metres.clamp(self.min_depth_m, self.max_depth_m)}

    def from_decoded(self, outputs: dict[str, NDArray[Any]], metas: Sequence[ImageMeta]) -> list[NDArray[np.float32]]:
        predictions = []
        for metres, meta in zip(outputs["m"], metas, strict=True):
            inside = meta.content_of(metres)
            predictions.append(np.asarray(cv2.resize(inside, meta.size[::-1]), np.float32))
        return predictions

    def meter(self, space: LabelSpace | None) -> Meter:
        own = self.min_depth_m, self.max_depth_m
        return DepthMeter(self.protocol, *(NYU_EIGEN_LIMITS_M if self.protocol in NYU_PROTOCOLS else own))

    def truth(self, sample: Sample) -> NDArray[np.float32] | None:
        return sample.depth_m

    def draw(
        self, image: NDArray[np.uint8], prediction: NDArray[np.float32], space: LabelSpace | None, options: DrawOptions
    ) -> NDArray[np.uint8]:
        if options.depth_range_m is None:
            return draw_depth(image, prediction, max_m=self.max_depth_m)
        return draw_depth(image, prediction, *(() if options.depth_range_m == "auto" else options.depth_range_m))

    def draw_errors(
        self,
        image: NDArray[np.uint8],
        prediction: NDArray[np.float32],
        truth: NDArray[np.float32],
        space: LabelSpace | None,
        options: DrawOptions,
    ) -> NDArray[np.uint8]:
        return draw_depth_errors(image, prediction, truth)


def _usual_camera(size: tuple[int, int]) -> Intrinsics:
    """One that sees 60 degrees across an input of (H, W) pixels, straight ahead in the middle."""
    focal_px = size[1] / 2 / math.tan(math.radians(30))
    return focal_px, focal_px, size[1] / 2, size[0] / 2


def _both_views(
    raw: Tensor, mirrored: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Log depths [1, H, W] of each image at its own size, and those of its mirror image turned back."""
    turned = [view.flip(-1) for view in each_to_original(mirrored, size, metas)]
    return list(each_to_original(raw, size, metas)), turned


class _LogDepth(nn.Module):
    """Decoder and a 1x1 convolution: maps -> natural log of metres [B, 1, h, w]."""

    def __init__(self, decoder: nn.Module, limits: tuple[float, float]) -> None:
        super().__init__()
        self.decoder = decoder
        self.out = nn.Conv2d(int(decoder.out_channels), 1, 1)  # type: ignore[arg-type]
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.constant_(self.out.bias, sum(limits) / 2)  # type: ignore[arg-type]  # start at the middle of the range

    def rescale(self, slope: float, offset: float) -> None:
        """See `Depth.rescale`."""
        assert self.out.bias is not None
        self.out.weight *= slope
        self.out.bias.mul_(slope).add_(offset)

    def forward(self, maps: Maps) -> Tensor:
        features = self.decoder(maps).float()
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 would round depth to steps of 1.6 %
            if torch.compiler.is_compiling():  # one pass together with what stands before; cuDNN would make several
                assert self.out.bias is not None
                return (features * self.out.weight).sum(dim=1, keepdim=True) + self.out.bias.view(1, 1, 1, 1)
            log_depth: Tensor = self.out(features)
        return log_depth


class _LogBins(nn.Module):
    """Decoder and a softmax over log-spaced depths; the expectation of the log, [B, 1, h, w]."""

    centres: Tensor

    def __init__(self, decoder: nn.Module, limits: tuple[float, float], num_bins: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.out = nn.Conv2d(int(decoder.out_channels), num_bins, 1)  # type: ignore[arg-type]
        self.register_buffer("centres", torch.linspace(*limits, num_bins).view(1, -1, 1, 1))

    def rescale(self, slope: float, offset: float) -> None:
        """See `Depth.rescale`; the expectation is linear in the centres."""
        self.centres.mul_(slope).add_(offset)

    def forward(self, maps: Maps) -> Tensor:
        shares = self.out(self.decoder(maps)).float().softmax(dim=1)
        return (shares * self.centres).sum(dim=1, keepdim=True)
