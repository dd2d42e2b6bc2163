"""Resizing of maps, with a backward that needs no atomic additions on the device."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size], bilinear with half-pixel centres; for predictions, where nothing learns."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def exporting() -> bool:
    """Whether the graph at hand is exported rather than compiled."""
    # torch 2.11 answers is_exporting() with True while torch.compile traces, too
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def double_nearest(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, C, 2 * h, 2 * w], every cell four times.

    A compiled `F.interpolate` would scatter the gradient with atomics; as a repetition its gradient is a sum.
    """
    if not torch.compiler.is_compiling() or exporting():  # repetitions are slow in other runtimes
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4, 5).flatten(2, 3)


def upsample(x: Tensor, factor: int) -> Tensor:
    """[B, C, h, w] -> [B, C, h * factor, w * factor], bilinear with half-pixel centres, in x's dtype.

    `F.interpolate`, whose own backward scatters with atomics on a GPU, which is slow and not reproducible: of a
    compiled step with ResNet-50 on one H200 it was a tenth. `_Upsample` replaces it wherever a gradient is wanted
    there or the compiler would write that scatter. An eager CPU has no such trouble, and an exported graph no gradient.
    """
    if factor < 1:
        raise ValueError(f"factor is {factor}; allowed are whole numbers from 1; use resize to shrink")
    if factor == 1:
        return x
    scatters = torch.compiler.is_compiling() or x.device.type != "cpu"
    if not scatters or not torch.is_grad_enabled() or exporting():
        return _interpolate(x, factor)
    up: Tensor = _Upsample.apply(x, factor)
    return up


def _interpolate(x: Tensor, factor: int) -> Tensor:
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return _interpolate(x, factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return backward_by_products(grads[0], ctx.factor), None


def backward_by_products(gradient: Tensor, factor: int) -> Tensor:
    """The gradient of `upsample` on its input as two matrix products, in the memory format of `gradient`."""
    batch, channels, height, width = gradient.shape
    rows, columns = (upsampling_weights(side // factor, factor, gradient) for side in (height, width))
    if gradient.is_contiguous() or not gradient.is_contiguous(memory_format=torch.channels_last):
        return _separable(gradient, rows[None], columns[None])
    last = gradient.permute(0, 2, 3, 1)
    last = torch.bmm(rows.expand(batch, -1, -1), last.flatten(2)).view(-1, width, channels)
    last = torch.bmm(columns.expand(len(last), -1, -1), last)
    return last.view(batch, height // factor, width // factor, channels).permute(0, 3, 1, 2)


def upsampling_weights(length: int, factor: int, like: Tensor) -> Tensor:
    """[length, length * factor]: how much each cell adds to each pixel of `upsample`, along one axis."""
    cells = torch.arange(length, device=like.device)
    pixels = (torch.arange(length * factor, device=like.device) + 0.5) / factor - 0.5
    near = 1 - (pixels.clamp(0, length - 1) - cells[:, None]).abs()
    return near.clamp(min=0).to(like.dtype)


def average_bins(x: Tensor, num_bins: int) -> Tensor:
    """[B, C, h, w] -> [B, C, num_bins, num_bins]: `F.adaptive_avg_pool2d` as two products, for the same reason."""
    return _separable(x, *(F.adaptive_avg_pool1d(_eye(length, x), num_bins).mT for length in x.shape[-2:]))


def resize_small(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size]: bilinear `resize` with a gradient, for a handful of cells."""
    rows, columns = (
        F.interpolate(_eye(length, x), wanted, mode="linear", align_corners=False).mT
        for length, wanted in zip(x.shape[-2:], size, strict=True)
    )
    return _separable(x, rows, columns)


def _eye(length: int, like: Tensor) -> Tensor:
    return torch.eye(length, device=like.device, dtype=like.dtype)[None]  # [1, length, length]


def _separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows [1, H, h] and columns [1, W, w] applied to [B, C, h, w]."""
    return rows @ x @ columns.mT
