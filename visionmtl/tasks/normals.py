"""Surface normals: a unit vector for every pixel."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from visionmtl.metrics.normals import NormalsMeter
from visionmtl.modeling.decoders.base import Decoder
from visionmtl.modeling.decoders.top_down import TopDown
from visionmtl.ops.losses import cosine_distance, each_to_original
from visionmtl.ops.resize import resize, upsample
from visionmtl.ops.soft_losses import direction_distance, resize_like
from visionmtl.structures import ImageMeta, LabelSpace, Sample
from visionmtl.tasks.base import SoftLoss, Task, count_true
from visionmtl.visualization.draw import DrawOptions, draw_angle_errors, draw_normals


class Normals(Task, frozen=True):
    """Settings of surface normals. Prediction: float32 [H, W, 3] unit vectors, x right, y down, z forward."""

    type: Literal["normals"] = "normals"
    field: ClassVar[str] = "normals"
    result_field: ClassVar[str | None] = "normals"
    counting_when_trained: ClassVar = ("learns_from",)
    meter_type: ClassVar = NormalsMeter
    primary_metric: ClassVar[str] = "within_11_25"

    decoder: Decoder = TopDown()

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
        return {"pixels": count_true(_known(targets["normals"]).numpy())}

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

    def check_teacher(self, teacher: Task) -> None:
        """Any decoder teaches any other."""

    def soft_targets(
        self, raw: Tensor, settings: SoftLoss, order: Tensor | None, mirrored: bool, zoom: float
    ) -> dict[str, Tensor]:
        """normals: unit vectors [B, 3, h, w]; their mean is shorter where teachers disagree."""
        vectors = F.normalize(raw.float(), dim=1, eps=1e-6)
        return {"normals": _mirrored(vectors) if mirrored else vectors}

    def distill(
        self, raw: Tensor, soft: dict[str, Tensor], totals: dict[str, Tensor], settings: SoftLoss
    ) -> dict[str, Tensor]:
        """Part "cosine", over all pixels of images."""
        pred = raw.float()
        teacher = resize_like(soft["normals"], pred)
        return {"cosine": direction_distance(pred, teacher, soft["content"], totals["soft_area"])}

    def predict(self, raw: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]) -> list[NDArray[np.float32]]:
        return [_unit(vectors).permute(1, 2, 0).cpu().numpy() for vectors in each_to_original(raw, size, metas)]

    def predict_mirrored(
        self, raw: Tensor, mirrored: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]
    ) -> list[NDArray[np.float32]]:
        """The middle direction; turned left to right, a vector's x changes its sign."""
        views = zip(each_to_original(raw, size, metas), each_to_original(mirrored, size, metas), strict=True)
        middles = (_unit(_unit(one) + _mirrored(_unit(other)[None])[0]) for one, other in views)
        return [vectors.permute(1, 2, 0).cpu().numpy() for vectors in middles]

    decoded_outputs: ClassVar[dict[str, str]] = {
        "vectors": "float32 [B, H, W, 3]: unit vectors, x right, y down, z forward, at the input's size",
    }

    def decode_in_graph(self, raw: Tensor, size: tuple[int, int], content: Tensor, zoom: float) -> dict[str, Tensor]:
        return {"vectors": F.normalize(resize(raw.float(), size), dim=1).permute(0, 2, 3, 1)}

    def from_decoded(self, outputs: dict[str, NDArray[Any]], metas: Sequence[ImageMeta]) -> list[NDArray[np.float32]]:
        predictions = []
        for vectors, meta in zip(outputs["vectors"], metas, strict=True):
            inside = meta.content_of(vectors)
            resized = torch.from_numpy(cv2.resize(inside, meta.size[::-1]))
            predictions.append(F.normalize(resized, dim=2).numpy())
        return predictions

    def truth(self, sample: Sample) -> NDArray[np.float32] | None:
        return sample.normals

    def draw(
        self, image: NDArray[np.uint8], prediction: NDArray[np.float32], space: LabelSpace | None, options: DrawOptions
    ) -> NDArray[np.uint8]:
        return draw_normals(image, prediction)

    def draw_errors(
        self,
        image: NDArray[np.uint8],
        prediction: NDArray[np.float32],
        truth: NDArray[np.float32],
        space: LabelSpace | None,
        options: DrawOptions,
    ) -> NDArray[np.uint8]:
        return draw_angle_errors(image, prediction, truth)


def _known(normals: Tensor) -> Tensor:
    return normals.square().sum(dim=1) > 0.25  # zero vectors are unknown


def _mirrored(vectors: Tensor) -> Tensor:
    """[B, 3, h, w] of an image turned left to right, turned back: x changes its sign."""
    x, others = vectors.flip(-1).split([1, 2], dim=1)
    return torch.cat([-x, others], dim=1)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=0)
