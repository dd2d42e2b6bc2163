"""Surface normals: a unit vector for every pixel."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from visionmtl.metrics.normals import NormalsMeter
from visionmtl.modeling.decoders.base import Decoder
from visionmtl.modeling.decoders.semantic_fpn import SemanticFPN
from visionmtl.ops.losses import cosine_distance, each_to_original
from visionmtl.ops.resize import upsample
from visionmtl.structures import ImageMeta, LabelSpace, Sample
from visionmtl.tasks.base import Task
from visionmtl.visualization.draw import draw_normals


class Normals(Task, frozen=True):
    """Settings of surface normals. Prediction: float32 [H, W, 3] unit vectors, x right, y down, z forward."""

    type: Literal["normals"] = "normals"
    field: ClassVar[str] = "normals"
    result_field: ClassVar[str | None] = "normals"
    meter_type: ClassVar = NormalsMeter
    primary_metric: ClassVar[str] = "within_11_25"

    decoder: Decoder = SemanticFPN()

    @property
    def levels(self) -> tuple[int, ...]:
        return self.decoder.levels

    def build(self, channels: int, space: LabelSpace | None) -> nn.Module:
        decoder = self.decoder.build(channels)
        return nn.Sequential(decoder, nn.Conv2d(int(decoder.out_channels), 3, 1))

    def collate(self, samples: Sequence[Sample | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """normals: float32 [B, 3, H, W], zero vectors in the padding and where unknown."""
        normals = torch.zeros(len(samples), 3, *size)
        for i, sample in enumerate(samples):
            if sample is not None and sample.normals is not None:
                height, width = sample.normals.shape[:2]
                normals[i, :, :height, :width] = torch.from_numpy(sample.normals).permute(2, 0, 1)
        return {"normals": normals}

    def count(self, targets: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """Pixels with a known direction."""
        return {"pixels": _known(targets["normals"]).sum().float()}

    def loss(
        self, raw: Tensor, targets: dict[str, Tensor], labelled: Tensor, totals: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Part "cosine": 1 - cos of the angle, at full resolution."""
        true = targets["normals"]
        valid = _known(true) & labelled[:, None, None]
        # replaced before use: a masked NaN would still poison the gradient
        true = torch.where(valid[:, None], true, 0.0)
        pred = upsample(raw.float(), true.shape[2] // raw.shape[2])
        return {"cosine": cosine_distance(pred, true, valid, totals["pixels"])}

    def predict(self, raw: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]) -> list[NDArray[np.float32]]:
        return [_unit(vectors).permute(1, 2, 0).cpu().numpy() for vectors in each_to_original(raw, size, metas)]

    def predict_mirrored(
        self, raw: Tensor, mirrored: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]
    ) -> list[NDArray[np.float32]]:
        """The middle direction; turned left to right, a vector's x changes its sign."""
        views = zip(each_to_original(raw, size, metas), each_to_original(mirrored, size, metas), strict=True)
        sign = raw.new_tensor([-1.0, 1.0, 1.0], dtype=torch.float32)[:, None, None]
        middles = (_unit(_unit(one) + sign * _unit(other.flip(-1))) for one, other in views)
        return [vectors.permute(1, 2, 0).cpu().numpy() for vectors in middles]

    def truth(self, sample: Sample) -> NDArray[np.float32] | None:
        return sample.normals

    def draw(
        self, image: NDArray[np.uint8], prediction: NDArray[np.float32], space: LabelSpace | None, min_score: float
    ) -> NDArray[np.uint8]:
        return draw_normals(image, prediction)


def _known(normals: Tensor) -> Tensor:
    return normals.square().sum(dim=1) > 0.25  # zero vectors are unknown


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=0)
