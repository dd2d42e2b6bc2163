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
class Framing:
    """The random part of a view, drawn before anything is known of the image."""

    zoom: float = 1.0  # relative to the scale at which the whole image fits
    u_top: float = 0.0  # in [0, 1): where the rectangle lies if it is smaller than the image
    u_left: float = 0.0
    mirrored: bool = False


class Window:
    """A rectangle of the original, resized to `out` and perhaps mirrored.

    shrink: the divisor by which the image may be reduced before. Then the rectangle lies on a grid of so many pixels,
    so that image and labels show the same place exactly; it moves by less than a pixel of `out` for that.
    """

    def __init__(self, top: int, left: int, size: Size, out: Size, mirrored: bool, shrink: int = 1) -> None:
        self.top, self.left, self.size, self.out, self.mirrored = top, left, size, out, mirrored
        self.shrink = shrink
        self.scale = (out[0] / size[0], out[1] / size[1])

    @staticmethod
    def whole(original: Size, size: Size) -> "Window":
        """Every pixel of the original (H, W), as large as fits into `size`."""
        return Window._cut(original, size, Framing())

    @staticmethod
    def cut(original: Size, size: Size, framing: Framing) -> "Window":
        """As much of the original (H, W) as fits into `size` at the zoom, on the grid of the divisor that allows."""
        fine = Window._cut(original, size, framing)
        # by the scale alone, not by `out`, whose rounding would let a smaller zoom allow a smaller divisor
        scale = framing.zoom * min(size[0] / original[0], size[1] / original[1])
        shrink = next((k for k in DIVISORS if k * scale <= 1 + 1e-9 and k <= min(fine.size)), 1)
        top, left, height, width = (value // shrink * shrink for value in (fine.top, fine.left, *fine.size))
        return Window(top, left, (height, width), fine.out, fine.mirrored, shrink)

    @staticmethod
    def _cut(original: Size, size: Size, framing: Framing) -> "Window":
        h, w = original
        scale = framing.zoom * min(size[0] / h, size[1] / w)
        crop = (min(h, max(1, round(size[0] / scale))), min(w, max(1, round(size[1] / scale))))
        out = (min(size[0], max(1, round(crop[0] * scale))), min(size[1], max(1, round(crop[1] * scale))))
        top, left = int(framing.u_top * (h - crop[0] + 1)), int(framing.u_left * (w - crop[1] + 1))
        return Window(top, left, crop, out, framing.mirrored)

    def image(self, image: NDArray[np.uint8], shrunk: int = 1) -> NDArray[np.uint8]:
        """Bilinear; when shrinking, over as many pixels as become one (no aliasing).

        shrunk: the divisor by which `image` has been reduced; it divides `shrink`
        """
        assert self.shrink % shrunk == 0, f"reduced by {shrunk}, but only {self.shrink} leaves enough"
        top, left, height, width = (value // shrunk for value in (self.top, self.left, *self.size))
        cropped = image[top : top + height, left : left + width]
        if self.out[0] < height or self.out[1] < width:
            return self._mirror(_shrunk(cropped, self.out))
        return self._resize(cropped, cv2.INTER_LINEAR)

    def nearest(self, labels: NDArray[Value]) -> NDArray[Value]:
        """Labels are never mixed. EXACT: plain INTER_NEAREST samples up to half a pixel too far left and up."""
        cropped = labels[self.top : self.top + self.size[0], self.left : self.left + self.size[1]]
        return self._resize(cropped, cv2.INTER_NEAREST_EXACT)

    def boxes(self, xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N, 4] pixels of the original to pixels of `out`."""
        sy, sx = self.scale
        moved = (xyxy - [self.left, self.top] * 2) * [sx, sy, sx, sy]
        if self.mirrored:
            moved[:, [0, 2]] = self.out[1] - moved[:, [2, 0]]
        return moved

    def _resize(self, cropped: NDArray, interpolation: int) -> NDArray:
        if self.out != cropped.shape[:2]:
            cropped = cv2.resize(cropped, (self.out[1], self.out[0]), interpolation=interpolation)
        elif not self.mirrored:
            return cropped.copy()  # never a part of what was given, which may be a file mapped into memory
        return self._mirror(cropped)

    def _mirror(self, resized: NDArray) -> NDArray:
        return cv2.flip(resized, 1) if self.mirrored else resized


def divisor(original: Size, size: Size, framing: Framing) -> int:
    """By how much an image of `original` (H, W) may be reduced for the view that this framing gives of it."""
    return Window.cut(original, size, framing).shrink


def _shrunk(image: NDArray[np.uint8], out: Size) -> NDArray[np.uint8]:
    """uint8 [*out, 3] of [H, W, 3]. torch's whole-number arithmetic takes half the time of OpenCV's INTER_AREA."""
    whole = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]  # a copy: what was given may not be written to
    small = F.interpolate(whole, out, mode="bilinear", antialias=True)
    return small[0].permute(1, 2, 0).numpy()
