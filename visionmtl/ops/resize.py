"""Bilinear resizing of maps, with a backward that needs no atomic additions on the device."""

import torch
from torch import Tensor
from torch.nn import functional as F


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size], bilinear with half-pixel centres; for predictions, where nothing learns."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def upsample(x: Tensor, factor: int) -> Tensor:
    """[B, C, h, w] -> [B, C, h * factor, w * factor], bilinear with half-pixel centres, in x's dtype.

    Equal to `F.interpolate` to rounding. That one scatters its gradient with atomics on a GPU, which is slow and not
    reproducible, so `by_phases` replaces it wherever a gradient is wanted there. Its own kernel stays where that does
    not matter: without gradients, in exported graphs, and on a CPU, where it is faster: 46 ms against 75 ms forward
    and backward for [8, 64, 32, 40] by 4 on one EPYC core, and 6 ms against 116 ms in channels_last.
    """
    if factor < 1:
        raise ValueError(f"factor is {factor}; allowed are whole numbers from 1; use resize to shrink")
    if factor == 1:
        return x
    if x.device.type == "cpu" or not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)
    return by_phases(x, factor)


def by_phases(x: Tensor, factor: int) -> Tensor:
    """`upsample` by arithmetic alone: slices and products forward, sums over slices backward. Keeps channels_last."""
    out = _along(_along(x, factor, 2), factor, 3)
    if x.is_contiguous(memory_format=torch.channels_last):
        return out.contiguous(memory_format=torch.channels_last)
    return out


def _along(x: Tensor, factor: int, dim: int) -> Tensor:
    """Output k of the `factor` between two cell borders lies at (k + 0.5) / factor - 0.5 cells from the centre."""
    length = x.shape[dim]
    before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, length - 1)], dim)
    after = torch.cat([x.narrow(dim, 1, length - 1), x.narrow(dim, length - 1, 1)], dim)
    phases = []
    for k in range(factor):
        offset = (k + 0.5) / factor - 0.5
        neighbour = before if offset < 0 else after
        phases.append(x * (1 - abs(offset)) + neighbour * abs(offset) if offset else x)
    return torch.stack(phases, dim + 1).flatten(dim, dim + 1)


def upsample_backward(gradient: Tensor, factor: int, above: bool = False, below: bool = False) -> Tensor:
    """The gradient of `upsample` on its input, from that on (some rows of) its output: [B, C, n * factor, W] -> ...

    above, below: whether the input goes on there. Then the row of cells that was interpolated with is part of the
    result, which has n + above + below rows; elsewhere the outermost row stood in for its missing neighbour.
    """
    if factor == 1:
        return F.pad(gradient, (0, 0, int(above), int(below)))
    if gradient.device.type == "cpu":  # where the products take longer than the sums
        rows = _gather_along(gradient, factor, 2, above, below)
        return _gather_along(rows, factor, 3, False, False)
    return backward_by_products(gradient, factor, above, below)


def backward_by_products(gradient: Tensor, factor: int, above: bool = False, below: bool = False) -> Tensor:
    """`upsample_backward` as two matrix products: a tenth of the kernels, which is what a GPU's time depends on."""
    rows = _weights(gradient.shape[2] // factor, factor, gradient, int(above), int(below))
    columns = _weights(gradient.shape[3] // factor, factor, gradient)
    return _separable(gradient, rows, columns)


def _weights(length: int, factor: int, like: Tensor, before: int = 0, after: int = 0) -> Tensor:
    """[before + length + after, length * factor]: how much each cell adds to each pixel of those in the middle."""
    cells = _eye(before + length + after, like)
    pixels = F.interpolate(cells, scale_factor=float(factor), mode="linear", align_corners=False)[0]
    return pixels[:, before * factor : (before + length) * factor]


def _gather_along(gradient: Tensor, factor: int, dim: int, above: bool, below: bool) -> Tensor:
    """The transpose of `_along`, with what falls on the neighbours above and below."""
    phases = gradient.unflatten(dim, (-1, factor)).unbind(dim + 1)
    shape = list(phases[0].shape)
    length = shape[dim]
    shape[dim] += 2
    found = gradient.new_zeros(shape)
    before, own, after = (found.narrow(dim, start, length) for start in range(3))
    for k, phase in enumerate(phases):
        offset = (k + 0.5) / factor - 0.5
        own.add_(phase, alpha=1 - abs(offset))
        if offset:
            (before if offset < 0 else after).add_(phase, alpha=abs(offset))
    if not above:
        own.narrow(dim, 0, 1).add_(found.narrow(dim, 0, 1))
    if not below:
        own.narrow(dim, length - 1, 1).add_(found.narrow(dim, length + 1, 1))
    return found.narrow(dim, int(not above), length + above + below)


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
