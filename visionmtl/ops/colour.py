"""Colour jitter as one 3x4 matrix per image: drawn on the CPU, applied on the device without a host wait."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma, as in torchvision and OpenCV

# rows: luma, in-phase, quadrature (YIQ, FCC 1953); hue is a rotation of the last two
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


def colour_matrix(
    brightness: float = 1.0,
    contrast: float = 1.0,
    saturation: float = 1.0,
    hue_turns: float = 0.0,
    mean_rgb: tuple[float, float, float] = (127.5, 127.5, 127.5),
) -> NDArray[np.float32]:
    """Float32 [3, 4]: new RGB = matrix[:, :3] @ RGB + matrix[:, 3], on the scale 0..255, in this order:

    RGB times `brightness`; distance from the mean grey times `contrast`; distance from each pixel's own grey times
    `saturation`; hue rotated by `hue_turns` (1 = once around) at equal luma. The defaults give the identity.
    mean_rgb: the image's mean colour, about whose grey contrast turns.
    """
    grey = np.tile(_GREY, (3, 1))
    angle = 2 * math.pi * hue_turns
    turn = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])

    saturate = saturation * np.eye(3) + (1 - saturation) * grey
    rotate = np.linalg.inv(_YIQ) @ turn @ _YIQ
    linear = rotate @ saturate * (contrast * brightness)

    # saturation and hue leave grey as it is, so the offset passes through them unchanged
    offset = (1 - contrast) * brightness * float(_GREY @ np.asarray(mean_rgb))
    return np.concatenate([linear, np.full((3, 1), offset)], axis=1).astype(np.float32)


def apply_matrices(image: Tensor, matrices: Tensor) -> Tensor:
    """uint8 or float [B, 3, H, W] on 0..255 and float32 [B, 3, 4] on the same device -> float32 [B, 3, H, W].

    Clamped to 0..255. Padding is coloured like black. Stays float32 under autocast: bfloat16 would round to 8 bits.
    """
    b, c, h, w = image.shape
    with torch.autocast(image.device.type, enabled=False):
        flat = image.float().reshape(b, c, h * w)
        return torch.baddbmm(matrices[:, :, 3:], matrices[:, :, :3], flat).clamp_(0, 255).view(b, c, h, w)
