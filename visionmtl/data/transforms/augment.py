"""Label-consistent augmentation: one crop and resize, one flip and one colour draw, every label kept in step."""

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from typing_extensions import Self

from visionmtl.config.registry import Spec
from visionmtl.data.transforms.crop_resize import CropParams, CropResize, Size
from visionmtl.data.transforms.photometric import open_pipeline, repaint
from visionmtl.ops.color import color_matrix
from visionmtl.structures import Boxes, ImageMeta, Sample


def fit(image: NDArray[np.uint8], size: Size, train_size: Size | None = None) -> tuple[NDArray[np.uint8], ImageMeta]:
    """The whole image [H, W, 3] resized without distortion (to the rounding of a pixel) to fit into `size`.

    The result is at most `size` and touches it on one side; padding to `size` is the loader's.
    train_size: that of training, where it is another: the meta says how much larger everything looks.
    """
    height, width = image.shape[:2]
    crop = CropResize.whole((height, width), size)
    scale, trained = (min(h / height, w / width) for h, w in (size, train_size or size))
    return crop.image(image), ImageMeta(size=(height, width), content_size=crop.out, zoom=scale / trained)


class Augment(Spec):
    """Random zoom, crop, flip and colour. The defaults change nothing."""

    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of the scale relative to the one at which the whole image fits, drawn log-uniformly. Above 1 crops,
    below 1 leaves padding. Zooming by s divides depth by s: an object looks s times as large when s times nearer."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of mirroring left and right."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """Factor drawn from 1 - x to 1 + x."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Factor drawn from 1 - x to 1 + x, about the image's mean grey."""
    saturation: float = Field(default=0.0, ge=0, lt=1)
    """Factor drawn from 1 - x to 1 + x."""
    hue_turns: float = Field(default=0.0, ge=0, le=0.5)
    """Hue rotation drawn from -x to x; 0.5 is the opposite colour."""
    pipeline: Path | None = None
    """An albumentations pipeline of one's own, saved with `A.save`: blur, noise, weather, compression. It sees the view
    before the colours change. Transforms that move pixels are refused: zoom and flip do that, and move the labels."""
    min_box_px: float = Field(default=1.0, ge=0)
    """Boxes with a shorter side, in pixels of the network input, are dropped."""
    min_visible: float = Field(default=0.25, ge=0, le=1)
    """Boxes of which the crop keeps a smaller share are dropped. Crowd regions stay while anything is visible."""

    @model_validator(mode="after")
    def _zoom_is_a_range(self) -> Self:
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"zoom is {list(self.zoom)}; it needs 0 < low <= high; write e.g. zoom: [1.0, 1.5]")
        return self

    @property
    def colors(self) -> bool:
        """Whether any colour setting is on."""
        return any((self.brightness, self.contrast, self.saturation, self.hue_turns))

    def check(self) -> None:
        """Raises ValueError when the pipeline cannot be used; a config must load where its files are not."""
        if self.pipeline:
            open_pipeline(self.pipeline)

    def apply(self, sample: Sample, size: Size, rng: np.random.Generator) -> Sample:
        """A view of the sample of at most `size`; labels not given stay None. Draws four numbers, or five."""
        return self.view(sample, size, self.draw(rng), rng)

    def draw(self, rng: np.random.Generator) -> CropParams:
        """What the view will show of an image that need not be known yet. Draws four numbers."""
        u_zoom, u_top, u_left, u_flip = rng.random(4)
        low, high = self.zoom
        zoom = math.exp(math.log(low) + u_zoom * (math.log(high) - math.log(low)))
        return CropParams(zoom, u_top, u_left, mirrored=bool(u_flip < self.flip))

    def view(
        self, sample: Sample, size: Size, params: CropParams, rng: np.random.Generator, enlarged: float = 1.0
    ) -> Sample:
        """The view that `draw` chose, of an image that may be reduced by the divisor that `CropResize.cut` allows.

        enlarged: `size` as a multiple of the size that depth is relative to. Draws a number if there is a pipeline.
        """
        # cv2 rather than albumentations: crop, then resize, touches only the pixels that are kept, and each map
        # gets its own interpolation and dtype in one line
        view = self._view(sample, CropResize.cut(sample.size, size, params), params.zoom * enlarged)
        return replace(view, image=repaint(view.image, self.pipeline, rng)) if self.pipeline else view

    def color(self, image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
        """The image's colour matrix [3, 4] for `ops.colour.apply_matrices`."""
        brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4)
        return color_matrix(
            brightness=1 + self.brightness * brightness,
            contrast=1 + self.contrast * contrast,
            saturation=1 + self.saturation * saturation,
            hue_turns=self.hue_turns * hue,
            mean_rgb=cv2.mean(image)[:3],
        )

    def _view(self, sample: Sample, crop: CropResize, zoom: float) -> Sample:
        normals = None if sample.normals is None else crop.nearest(sample.normals)
        if normals is not None and crop.mirrored:
            normals = normals * np.array([-1, 1, 1], normals.dtype)

        return Sample(
            image=crop.image(sample.image, sample.jpeg_scale),
            image_id=sample.image_id,
            boxes=None if sample.boxes is None else self._boxes(sample.boxes, crop, sample.size),
            segmentation=None if sample.segmentation is None else crop.nearest(sample.segmentation),
            depth_m=None if sample.depth_m is None else crop.nearest(sample.depth_m) / np.float32(zoom),
            normals=normals,
            image_labels=sample.image_labels,
            annotated=sample.annotated,
        )

    def _boxes(self, boxes: Boxes, crop: CropResize, size: Size) -> Boxes:
        whole = _clip(boxes.xyxy, 0, 0, *size)
        seen = _clip(whole, crop.top, crop.left, crop.top + crop.size[0], crop.left + crop.size[1])
        with np.errstate(invalid="ignore", divide="ignore"):  # NaN and empty boxes: dropped two lines down
            visible = _area(seen) / _area(whole)
            xyxy = crop.boxes(seen)
        shorter = np.minimum(xyxy[:, 2] - xyxy[:, 0], xyxy[:, 3] - xyxy[:, 1])

        kept = (visible >= self.min_visible) & (shorter >= self.min_box_px) | boxes.crowd
        kept &= (visible > 0) & (shorter > 0)  # False where NaN
        return Boxes(
            xyxy=xyxy[kept].astype(np.float32),
            labels=boxes.labels[kept],
            crowd=boxes.crowd[kept],
            area=(boxes.area[kept] * visible[kept] * math.prod(crop.scale)).astype(np.float32),
        )


def _clip(xyxy: NDArray, top: int, left: int, bottom: int, right: int) -> NDArray[np.float64]:
    return np.clip(xyxy.astype(np.float64), [left, top, left, top], [right, bottom, right, bottom])


def _area(xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of inverted boxes 0, of NaN boxes NaN."""
    return np.maximum(xyxy[:, 2] - xyxy[:, 0], 0) * np.maximum(xyxy[:, 3] - xyxy[:, 1], 0)
