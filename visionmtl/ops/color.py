"""Colour jitter as one 3x4 matrix per image: drawn on the CPU, applied on the device without a host wait."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma, as in torchvision and OpenCV

# rows: luma, in-phase, quadrature (YIQ, FCC 1953); hue is a rotation of the last two
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


def color_matrix(
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
    grey = np.tile(GREY, (3, 1))
    angle = 2 * math.pi * hue_turns
    turn = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])

    saturate = saturation * np.eye(3) + (1 - saturation) * grey
    rotate = np.linalg.inv(_YIQ) @ turn @ _YIQ
    linear = rotate @ saturate * (contrast * brightness)

    # saturation and hue leave grey as it is, so the offset passes through them unchanged
    offset = (1 - contrast) * brightness * float(GREY @ np.asarray(mean_rgb))
    return np.concatenate([linear, np.full((3, 1), offset)], axis=1).astype(np.float32)


def apply_matrices(image: Tensor, matrices: Tensor) -> Tensor:
    """uint8 or float [B, 3, H, W] on 0..255 and float32 [B, 3, 4] on the same device -> float32 [B, 3, H, W].

    Clamped to 0..255. Padding is coloured like black. Stays float32 under autocast: bfloat16 would round to 8 bits.
    """
    zero = torch.zeros(1, 3, 1, 1, device=image.device)
    return normalise(image, zero, zero + 1, matrices)


def normalise(image: Tensor, mean: Tensor, std: Tensor, matrices: Tensor | None = None) -> Tensor:
    """(`apply_matrices` of the image - mean) / std, in one pass over the pixels where it is compiled.

    image: uint8 or float [B, 3, H, W] on 0..255; mean, std: float32 [1, 3, 1, 1] on that scale; matrices: float32
    [B, 3, 4], None leaves the colours alone. Returns float32 [B, 3, H, W] in the image's memory format.
    """
    with torch.autocast(image.device.type, enabled=False):
        if matrices is None:
            return (image - mean).div_(std)
        linear = (matrices[:, :, :3] / std[:, :, 0])[..., None, None]  # [B, 3, 3, 1, 1]
        out = (matrices[:, :, 3:, None] - mean) / std  # [B, 3, 1, 1]
        # not a matrix product, which no compiler merges with the conversions before and after
        for source in range(3):
            out = torch.addcmul(out, linear[:, :, source], image[:, source : source + 1].float())
        out.clamp_(-mean / std, (255 - mean) / std)
    lies = torch.channels_last if image.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return out.contiguous(memory_format=lies)
