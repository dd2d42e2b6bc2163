"""Light and lens for ray-cast pictures: lamp, openness, gloss, exposure, as pure numpy functions.

Vectors are planar [3, H, W] in camera axes (x right, y down, z forward), metres.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def footprint(depth_m: Floats, normals: Floats, x: Floats, y: Floats, focal_px: float) -> Floats:
    """Metres of surface under a pixel: the geometric mean of the two directions of a tilted patch.

    x [W], y [H]: the pixels' rays at depth 1.
    """
    facing = -(normals[0] * x + normals[1] * y[:, None] + normals[2]) / _ray_length(x, y)
    # grazing surfaces: 0.05 keeps them from dissolving into the coarsest mip level
    return depth_m / np.float32(focal_px) / np.sqrt(np.maximum(facing, np.float32(0.05)))


def lamp_light(depth_m: Floats, normals: Floats, x: Floats, y: Floats, lamp: Floats) -> tuple[Floats, Floats]:
    """What a point lamp at `lamp` [3] gives: Lambert's (cosine and falloff), and Blinn's highlight (power 32) of it."""
    to_lamp = [lamp[0] - depth_m * x, lamp[1] - depth_m * y[:, None], lamp[2] - depth_m]
    squared = _dot(to_lamp, to_lamp)
    near = np.float32(1) / np.sqrt(squared)
    to_lamp = [axis * near for axis in to_lamp]
    # a real lamp has a size, so the light does not grow without bounds next to it
    diffuse = np.maximum(_dot(normals, to_lamp), 0) / (np.float32(0.55) + np.float32(0.09) * squared)

    view = 1 / _ray_length(x, y)
    halfway = [to_lamp[0] - x * view, to_lamp[1] - y[:, None] * view, to_lamp[2] - view]
    shine = np.maximum(_dot(normals, halfway), 0) / np.sqrt(_dot(halfway, halfway) + np.float32(1e-6))
    for _ in range(5):
        shine = shine * shine
    return diffuse, shine * diffuse


def _ray_length(x: Floats, y: Floats) -> Floats:
    length: Floats = np.sqrt(x * x + (y * y + 1)[:, None])
    return length


def _dot(a: Floats | Sequence[Floats], b: Floats | Sequence[Floats]) -> Floats:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def openness(points: Floats, extent: tuple[float, float, float]) -> Floats:
    """How much ambient light reaches points [3, H, W] of the room [0, extent]: less towards its edges and corners."""
    free = np.ones_like(points[0])
    for axis, size in zip(points, extent, strict=True):
        gap = np.minimum(axis, np.float32(size) - axis)
        own = gap < 1e-3  # a face does not darken itself
        free *= np.where(own, 1, 1 - np.float32(0.3) / (1 + (gap * np.float32(4)) ** 2))
    return free


def contact(gap_m: Floats) -> Floats:
    """What a solid at this distance leaves of the ambient light."""
    gap = gap_m * np.float32(9)
    left: Floats = 1 - np.divide(np.float32(0.55), 1 + gap * gap)
    return left


def develop(linear: Floats, parts: NDArray[np.int64], noise: Floats) -> NDArray[np.uint8]:
    """The camera's share: vignette, gamma, a slight blur (a stronger one on outlines, which smooths them), noise.

    linear: float [3, H, W], 1 = full exposure
    parts: [H, W], changes its value at outlines
    noise: [H, W, 3] grey levels

    Returns RGB [H, W, 3].
    """
    _, h, w = linear.shape
    x, y = np.linspace(-1, 1, w, dtype=np.float32), np.linspace(-1, 1, h, dtype=np.float32)
    lens = 1 - np.float32(0.14) * (x * x + (y * y)[:, None])
    image = cv2.merge(list(np.sqrt(linear * lens) * np.float32(255)))

    outline = np.zeros((h, w), np.bool_)
    across, along = parts[:, 1:] != parts[:, :-1], parts[1:] != parts[:-1]
    outline[:, 1:] |= across
    outline[:, :-1] |= across
    outline[1:] |= along
    outline[:-1] |= along
    smooth = cv2.GaussianBlur(image, (3, 3), 0.9)[outline]
    image = cv2.GaussianBlur(image, (3, 3), 0.45)
    image[outline] = smooth
    return np.clip(image + noise, 0, 255).astype(np.uint8)
