"""Which rectangle of an image a view shows and how it is resized, for the image and all its labels alike."""

from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

Size = tuple[int, int]
"""(H, W) in pixels."""
Value = TypeVar("Value", bound=np.generic)

DIVISORS = (8, 4, 2)
"""By which JPEG decoders reduce an image at a fraction of the work, the largest first."""


@dataclass(frozen=True, slots=True)
class CropParams:
    """The random part of a view, drawn before anything is known of the image."""

    zoom: float = 1.0  # relative to the scale at which the whole image fits
    u_top: float = 0.0  # in [0, 1): where the rectangle lies if it is smaller than the image
    u_left: float = 0.0
    mirrored: bool = False


class CropResize:
    """A rectangle of the original, resized to `out` and perhaps mirrored.

    jpeg_scale: the divisor by which the image may be reduced before. Then the rectangle starts on a multiple of it,
    so that image and labels show the same place exactly; it moves by less than a pixel of `out` for that.
    """

    def __init__(self, top: int, left: int, size: Size, out: Size, mirrored: bool, jpeg_scale: int = 1) -> None:
        self.top, self.left, self.size, self.out, self.mirrored = top, left, size, out, mirrored
        self.jpeg_scale = jpeg_scale
        self.scale = (out[0] / size[0], out[1] / size[1])

    @staticmethod
    def whole(original: Size, size: Size) -> "CropResize":
        """Every pixel of the original (H, W), as large as fits into `size`."""
        return CropResize._cut(original, size, CropParams())

    @staticmethod
    def cut(original: Size, size: Size, params: CropParams) -> "CropResize":
        """As much of the original (H, W) as fits into `size` at the zoom, on the grid of the divisor that allows."""
        fine = CropResize._cut(original, size, params)
        # by the scale alone, not by `out`, whose rounding would let a smaller zoom allow a smaller divisor
        scale = params.zoom * min(size[0] / original[0], size[1] / original[1])
        jpeg_scale = next((k for k in DIVISORS if k * scale <= 1 + 1e-9 and k <= min(fine.size)), 1)
        top, left, height, width = (value // jpeg_scale * jpeg_scale for value in (fine.top, fine.left, *fine.size))
        return CropResize(top, left, (height, width), fine.out, fine.mirrored, jpeg_scale)

    @staticmethod
    def _cut(original: Size, size: Size, params: CropParams) -> "CropResize":
        h, w = original
        scale = params.zoom * min(size[0] / h, size[1] / w)
        crop = (min(h, max(1, round(size[0] / scale))), min(w, max(1, round(size[1] / scale))))
        out = (min(size[0], max(1, round(crop[0] * scale))), min(size[1], max(1, round(crop[1] * scale))))
        top, left = int(params.u_top * (h - crop[0] + 1)), int(params.u_left * (w - crop[1] + 1))
        return CropResize(top, left, crop, out, params.mirrored)

    def image(self, image: NDArray[np.uint8], jpeg_scale: int = 1) -> NDArray[np.uint8]:
        """Bilinear; when shrinking, over as many pixels as become one (no aliasing).

        jpeg_scale: the divisor by which `image` has been reduced; it divides `jpeg_scale`
        """
        assert self.jpeg_scale % jpeg_scale == 0, f"reduced by {jpeg_scale}, but only {self.jpeg_scale} leaves enough"
        top, left, height, width = (value // jpeg_scale for value in (self.top, self.left, *self.size))
        cropped = image[top : top + height, left : left + width]
        if self.out[0] < height or self.out[1] < width:
            return self._mirror(_shrunk(cropped, self.out))
        return self._resize(cropped, cv2.INTER_LINEAR)

    def nearest(self, labels: NDArray[Value]) -> NDArray[Value]:
        """Labels are never mixed. EXACT: plain INTER_NEAREST samples up to half a pixel too far left and up."""
        return self._resize(self.part(labels), cv2.INTER_NEAREST_EXACT)

    def part(self, labels: NDArray[Value]) -> NDArray[Value]:
        """The rectangle as it is, [H, W, ...] of labels of the original size."""
        return labels[self.top : self.top + self.size[0], self.left : self.left + self.size[1]]

    def boxes(self, xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N, 4] pixels of the original to pixels of `out`."""
        sy, sx = self.scale
        moved = (xyxy - [self.left, self.top] * 2) * [sx, sy, sx, sy]
        if self.mirrored:
            moved[:, [0, 2]] = self.out[1] - moved[:, [2, 0]]
        return moved

    def _resize(self, cropped: NDArray, interpolation: int) -> NDArray:
        if self.out != cropped.shape[:2]:
            resized = cv2.resize(cropped, (self.out[1], self.out[0]), interpolation=interpolation)
            cropped = resized.reshape(*self.out, *cropped.shape[2:])  # OpenCV drops an axis of one channel
        elif not self.mirrored:
            return cropped.copy()  # never a part of what was given, which may be a file mapped into memory
        return self._mirror(cropped)

    def _mirror(self, resized: NDArray) -> NDArray:
        return cv2.flip(resized, 1).reshape(resized.shape) if self.mirrored else resized


def jpeg_scale(original: Size, size: Size, params: CropParams) -> int:
    """By how much an image of `original` (H, W) may be reduced for the view that this params gives of it."""
    return CropResize.cut(original, size, params).jpeg_scale


def _shrunk(image: NDArray[np.uint8], out: Size) -> NDArray[np.uint8]:
    """uint8 [*out, C] of [H, W, C]. torch's whole-number arithmetic takes half the time of OpenCV's INTER_AREA."""
    whole = torch.from_numpy(np.require(image, requirements=("C", "W")))  # torch warns of what may not be written to
    # the axis of one image comes first: only with its stride torch sees channels_last, and works and answers in it
    small = F.interpolate(whole[None].permute(0, 3, 1, 2), out, mode="bilinear", antialias=True)
    return np.ascontiguousarray(small[0].permute(1, 2, 0).numpy())
