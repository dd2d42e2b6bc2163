"""Label-consistent augmentation: one crop and resize, one flip and one colour draw, every label kept in step."""

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from typing_extensions import Self

from visionmtl.config.registry import Spec
from visionmtl.data.transforms.crop_resize import CropParams, CropResize, Size
from visionmtl.data.transforms.photometric import open_pipeline, repaint
from visionmtl.ops.color import color_matrix
from visionmtl.structures import IGNORE, Boxes, ImageMeta, Intrinsics, Sample

_TRIES = 10
"""Places that are drawn at most until no class fills too much of a crop; the last is taken as it is."""
_SHARE_STEP_PX = 4
"""Every so many rows and columns of the labels are looked at for it."""


def fit(image: NDArray[np.uint8], size: Size, train_size: Size | None = None) -> tuple[NDArray[np.uint8], ImageMeta]:
    """The whole image [H, W, 3] resized without distortion (to the rounding of a pixel) to fit into `size`.

    The result is at most `size` and touches it on one side; padding to `size` is the loader's.
    train_size: that of training, where it is another: the meta says how much larger everything looks.
    """
    height, width = image.shape[:2]
    crop = CropResize.whole((height, width), size)
    meta = ImageMeta(size=(height, width), content_size=crop.out, zoom=zoom((height, width), size, train_size or size))
    return crop.image(image), meta


def zoom(image: Size, size: Size, train_size: Size) -> float:
    """How much larger an image (H, W) looks where it fits into `size` than where it fits into `train_size`."""
    scale, trained = (min(of / own for of, own in zip(target, image, strict=True)) for target in (size, train_size))
    return scale / trained


class Blur(Spec):
    """A Gaussian blur of some images."""

    probability: float = Field(gt=0, le=1)
    sigma_px: tuple[float, float] = (0.1, 2.0)
    """Range of the standard deviation, pixels of the network's input."""

    @model_validator(mode="after")
    def _sigma_is_a_range(self) -> Self:
        if not 0 < self.sigma_px[0] <= self.sigma_px[1]:
            raise ValueError(
                f"sigma_px is {list(self.sigma_px)}; it needs 0 < low <= high; write e.g. sigma_px: [0.1, 2.0]"
            )
        return self


class Augment(Spec):
    """Random zoom, crop, rotation, flip and colour. The defaults change nothing."""

    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of the scale relative to the one at which the whole image fits, drawn log-uniformly. Above 1 crops,
    below 1 leaves padding, which is void, without depth, and background to a detector. Zooming by s divides depth by s:
    an object looks s times as large when s times nearer. What then lies beyond a task's max_depth_m is not learnt."""
    whole: float = Field(default=0.0, ge=0, lt=1)
    """Probability of leaving a view unzoomed."""
    place: Literal["corner", "random"] = "corner"
    """Where a view smaller than the network's input lies in it: at the top left, as in evaluation, or anywhere."""
    max_class_share: float | None = Field(default=None, gt=0, lt=1)
    """Crops of which one class fills more of the labelled pixels are cut elsewhere, up to ten times (`cat_max_ratio` of
    MMSegmentation, where it is 0.75). Images without segmentation, and those not cropped, are taken as they are."""
    rotate_deg: float = Field(default=0.0, ge=0, le=45)
    """Angle drawn from -x to x, about the middle of the view. Corners that come in are void, without depth and black. A
    box becomes the one around the turned ellipse that fills it (Kalra et al. 2021, arXiv:2109.13488), as masks are not
    known here; the box around its turned corners would be larger than nearly all objects."""
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
    grey: float = Field(default=0.0, ge=0, le=1)
    """Probability of taking all colour away."""
    blur: Blur | None = None
    pipeline: Path | None = None
    """An albumentations pipeline of one's own, saved with `A.save`: blur, noise, weather, compression. It sees the view
    before the colours change. Transforms that move pixels are refused: zoom and flip do that, and move the labels."""
    min_box_px: float = Field(default=1.0, ge=0)
    """Boxes with a shorter side, in pixels of the network input, are dropped."""
    min_visible: float = Field(default=0.25, ge=0, le=1)
    """Boxes of which the crop keeps a smaller share are dropped. Crowd regions stay while anything is visible."""

    @property
    def largest_zoom(self) -> float:
        """Of a view."""
        return max(self.zoom[1], 1.0) if self.whole else self.zoom[1]

    def without_effect(self, fields: Collection[str]) -> dict[str, str]:
        """Settings that would do nothing where these fields of samples are learnt, with the field they need."""
        of_labels = {"min_box_px": "boxes", "min_visible": "boxes", "max_class_share": "segmentation"}
        defaults = type(self)()
        return {
            name: field
            for name, field in of_labels.items()
            if field not in fields and getattr(self, name) != getattr(defaults, name)
        }

    @model_validator(mode="after")
    def _zoom_is_a_range(self) -> Self:
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"zoom is {list(self.zoom)}; it needs 0 < low <= high; write e.g. zoom: [1.0, 1.5]")
        if self.whole and self.zoom == (1.0, 1.0):
            raise ValueError(
                f"whole is {self.whole}, but zoom is [1, 1], so it would have no effect; set zoom, or remove whole"
            )
        if self.max_class_share is not None and self.zoom[1] <= 1:
            raise ValueError(
                f"max_class_share is {self.max_class_share}, but zoom is at most {self.zoom[1]}, so no view is a crop "
                "and it would have no effect; zoom beyond 1, or remove max_class_share"
            )
        return self

    @property
    def colors(self) -> bool:
        """Whether any colour setting is on."""
        return any((self.brightness, self.contrast, self.saturation, self.hue_turns, self.grey))

    def check(self) -> None:
        """Raises ValueError when the pipeline cannot be used; a config must load where its files are not."""
        if self.pipeline:
            open_pipeline(self.pipeline)

    def apply(self, sample: Sample, size: Size, rng: np.random.Generator) -> Sample:
        """A view of the sample of at most `size`; labels not given stay None."""
        return self.view(sample, size, self.draw(rng), rng)

    def draw(self, rng: np.random.Generator) -> CropParams:
        """What the view will show of an image that need not be known yet. Draws four numbers, and one for `whole`."""
        u_zoom, u_top, u_left, u_flip = rng.random(4)
        low, high = self.zoom
        zoom = math.exp(math.log(low) + u_zoom * (math.log(high) - math.log(low)))
        if self.whole and rng.random() < self.whole:
            zoom = 1.0
        return CropParams(zoom, u_top, u_left, mirrored=bool(u_flip < self.flip))

    def view(
        self, sample: Sample, size: Size, params: CropParams, rng: np.random.Generator, enlarged: float = 1.0
    ) -> Sample:
        """The view that `draw` chose, of an image that may be reduced by the divisor that `CropResize.cut` allows.

        enlarged: `size` as a multiple of the size that depth is relative to. Draws numbers for the settings that are
        on: pipeline, blur, max_class_share, rotate_deg and place.
        """
        # cv2 rather than albumentations: crop, then resize, touches only the pixels that are kept, and each map
        # gets its own interpolation and dtype in one line
        crop = self._varied_crop(sample, size, params, rng)
        view = self._view(sample, crop, params.zoom * enlarged)
        if self.pipeline:
            view = replace(view, image=repaint(view.image, self.pipeline, rng))
        if self.blur and rng.random() < self.blur.probability:
            blurred = cv2.GaussianBlur(view.image, (0, 0), rng.uniform(*self.blur.sigma_px))
            view = replace(view, image=np.asarray(blurred, np.uint8).reshape(view.image.shape))
        if self.rotate_deg:
            view = self._rotated(view, rng.uniform(-self.rotate_deg, self.rotate_deg))
        return _placed(view, size, rng) if self.place == "random" else view

    def _varied_crop(self, sample: Sample, size: Size, params: CropParams, rng: np.random.Generator) -> CropResize:
        """The crop of the params, or one elsewhere of the same scale where a class fills too much of it."""
        crop = CropResize.cut(sample.size, size, params)
        if self.max_class_share is None or sample.segmentation is None or crop.size == sample.size:
            return crop
        for _ in range(_TRIES - 1):
            if _largest_share(crop.part(sample.segmentation)) <= self.max_class_share:
                break
            u_top, u_left = rng.random(2)
            crop = CropResize.cut(sample.size, size, replace(params, u_top=u_top, u_left=u_left))
        return crop

    def color(self, image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
        """The image's colour matrix [3, 4] for `ops.colour.apply_matrices`."""
        brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4)
        grey = self.grey and rng.random() < self.grey
        return color_matrix(
            brightness=1 + self.brightness * brightness,
            contrast=1 + self.contrast * contrast,
            saturation=0 if grey else 1 + self.saturation * saturation,
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
            intrinsics=None if sample.intrinsics is None else _camera_of(sample.intrinsics, crop, zoom),
            annotated=sample.annotated,
        )

    def _boxes(self, boxes: Boxes, crop: CropResize, size: Size) -> Boxes:
        whole = _clip(boxes.xyxy, 0, 0, *size)
        seen = _clip(whole, crop.top, crop.left, crop.top + crop.size[0], crop.left + crop.size[1])
        return self._kept(boxes, whole, seen, crop.boxes(seen), math.prod(crop.scale))

    def _kept(self, boxes: Boxes, whole: NDArray, seen: NDArray, xyxy: NDArray, enlarged: float) -> Boxes:
        """The boxes of which enough is visible. All are xyxy [N, 4].

        whole, seen: boxes before and after what is invisible is cut off; xyxy: the latter in the view; enlarged: by
        which factor areas grow
        """
        with np.errstate(invalid="ignore", divide="ignore"):  # NaN and empty boxes: dropped below
            visible = _area(seen) / _area(whole)
        shorter = np.minimum(xyxy[:, 2] - xyxy[:, 0], xyxy[:, 3] - xyxy[:, 1])

        kept = (visible >= self.min_visible) & (shorter >= self.min_box_px) | boxes.crowd
        kept &= (visible > 0) & (shorter > 0)  # False where NaN
        return Boxes(
            xyxy=xyxy[kept].astype(np.float32),
            labels=boxes.labels[kept],
            crowd=boxes.crowd[kept],
            area=(boxes.area[kept] * visible[kept] * enlarged).astype(np.float32),
        )

    def _rotated(self, view: Sample, degrees: float) -> Sample:
        """The view turned clockwise about its middle."""
        height, width = view.image.shape[:2]
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turn = np.array([[cos, -sin], [sin, cos]])  # of (x, y), y pointing down

        def turned(values: NDArray, interpolation: int, outside: float) -> NDArray:
            middle = np.array([width - 1, height - 1]) / 2  # in OpenCV's coordinates, 0 at the centre of a pixel
            matrix = np.column_stack([turn, middle - turn @ middle])
            moved = cv2.warpAffine(
                values, matrix, (width, height), flags=interpolation, borderValue=(outside,) * 4
            )  # fmt: skip
            return np.asarray(moved.reshape(values.shape))

        boxes = view.boxes
        if boxes is not None:
            middle, half = np.array([width, height]) / 2, (boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]) / 2
            centres = (boxes.xyxy[:, :2] + half - middle) @ turn.T + middle
            half = np.sqrt((half**2) @ (turn**2).T)  # of the box around the ellipse
            around = np.concatenate([centres - half, centres + half], axis=1)
            seen = _clip(around, 0, 0, height, width)
            boxes = self._kept(boxes, around, seen, seen, 1.0)
        normals = None if view.normals is None else turned(view.normals, cv2.INTER_NEAREST, 0)
        if normals is not None:
            normals[..., :2] = normals[..., :2] @ turn.T.astype(normals.dtype)
        intrinsics = view.intrinsics
        if intrinsics is not None:
            middle = np.array([width, height]) / 2
            cx, cy = (turn @ (np.array(intrinsics[2:]) - middle) + middle).tolist()
            intrinsics = *intrinsics[:2], cx, cy
        return replace(
            view,
            intrinsics=intrinsics,
            image=turned(view.image, cv2.INTER_LINEAR, 0),
            boxes=boxes,
            segmentation=None if view.segmentation is None else turned(view.segmentation, cv2.INTER_NEAREST, IGNORE),
            depth_m=None if view.depth_m is None else turned(view.depth_m, cv2.INTER_NEAREST, 0),
            normals=normals,
        )


def _camera_of(intrinsics: Intrinsics, crop: CropResize, zoom: float) -> Intrinsics:
    """The camera that sees a view whose depth was divided by `zoom`: what it spans across stays as wide in metres."""
    fx, fy, cx, cy = intrinsics
    ((x, y, _, _),) = crop.boxes(np.array([[cx, cy, cx, cy]], np.float64)).tolist()
    sy, sx = crop.scale
    return fx * sx / zoom, fy * sy / zoom, x, y


def _placed(view: Sample, size: Size, rng: np.random.Generator) -> Sample:
    """The view anywhere in the network's input, behind rows and columns of padding. Draws two numbers."""
    top, left = (int(u * (of - own + 1)) for u, of, own in zip(rng.random(2), size, view.image.shape, strict=False))
    if not (top or left):
        return view

    def behind(values: NDArray | None, padding: int) -> Any:
        if values is None:
            return None
        return np.pad(values, [(top, 0), (left, 0), (0, 0)][: values.ndim], constant_values=padding)

    boxes = view.boxes
    if boxes is not None:
        boxes = replace(boxes, xyxy=boxes.xyxy + np.array([left, top, left, top], np.float32))
    intrinsics = view.intrinsics
    if intrinsics is not None:
        fx, fy, cx, cy = intrinsics
        intrinsics = fx, fy, cx + left, cy + top
    return replace(
        view,
        intrinsics=intrinsics,
        image=behind(view.image, 0),
        boxes=boxes,
        segmentation=behind(view.segmentation, IGNORE),
        depth_m=behind(view.depth_m, 0),
        normals=behind(view.normals, 0),
    )


def _largest_share(classes: NDArray[np.uint8]) -> float:
    """The share of the most frequent class among the labelled pixels; 0 without any."""
    counts = np.bincount(classes[::_SHARE_STEP_PX, ::_SHARE_STEP_PX].ravel(), minlength=IGNORE + 1)[:IGNORE]
    return float(counts.max() / max(counts.sum(), 1))


def _clip(xyxy: NDArray, top: int, left: int, bottom: int, right: int) -> NDArray[np.float64]:
    return np.clip(xyxy.astype(np.float64), [left, top, left, top], [right, bottom, right, bottom])


def _area(xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of inverted boxes 0, of NaN boxes NaN."""
    return np.maximum(xyxy[:, 2] - xyxy[:, 0], 0) * np.maximum(xyxy[:, 3] - xyxy[:, 1], 0)
