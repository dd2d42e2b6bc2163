"""Layers of encoders and decoders that torch (2.15) or timm is slow at, mostly on a CPU, computed otherwise."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def quicken(net: nn.Module) -> None:
    """Change the classes of layers that are slow, in place; no parameter and no name changes. May be called again.

    Compiled and exported networks compute all but the depthwise convolutions as the layers' own classes do.
    """
    from timm.layers.conv2d_same import Conv2dSame  # here: wrong settings need not wait for timm

    for module in net.modules():
        if isinstance(module, _Faster):
            continue
        mixins: list[type[_Faster]] = []
        if isinstance(module, nn.Conv2d):
            if 1 < module.in_channels == module.groups and (max(module.stride) > 1 or max(module.kernel_size) > 3):
                mixins.append(_TrainsInFloat32)
            padded = not isinstance(module.padding, str) and module.padding_mode == "zeros"
            if type(module) is Conv2dSame:
                mixins.append(_PadsOnce)
            elif type(module) is nn.Conv2d and padded and module.groups == max(module.dilation) == 1:
                mixins.append(_MatrixProduct)
        elif type(module) is nn.ReLU6 and module.inplace:
            mixins.append(_KeepsItsResult)
        if mixins:
            module.__class__ = _mix((*mixins, type(module)))


class _Faster(nn.Module):
    """Mixed into a layer's class: its forward, or the one before it where that is as fast."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, type(self).__bases__, self.__dict__


_mixed: dict[tuple[type[nn.Module], ...], type[nn.Module]] = {}
"""By bases their class: one, so that a copy of a module is of its class."""


def _mix(bases: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    return _mixed.setdefault(bases, type(bases[-1].__name__, bases, {}))


def _empty(*bases: type[nn.Module]) -> nn.Module:
    """A module that pickle or deepcopy fills."""
    mixed = _mix(bases)
    return mixed.__new__(mixed)


class _TrainsInFloat32(_Faster):
    """Depthwise convolutions that stride, or are wider than 3, in bfloat16 autocast on a CPU.

    Their gradients have no fast kernel in bfloat16: they take 4 to 20 times as long (AMX), conversions included, half
    of a step of MobileNetV2.
    """

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w]."""
        plain: Callable[[Tensor], Tensor] = super().forward
        slow = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        if not slow or self.weight.dtype != torch.float32:
            return plain(x)
        with torch.autocast("cpu", enabled=False):
            return plain(x if isinstance(self, _PadsOnce) else x.float()).to(x.dtype)


class _MatrixProduct(_Faster):
    """Convolutions in channels_last on a CPU that have many weights beside their pixels, in float32 or bfloat16.

    oneDNN arranges weights and their gradients anew in each call, which a product of matrices need not; with one thread
    torch's own 1x1 convolution copies every map. The limits are measured, those of bfloat16 on a CPU with AMX; up to 5
    times as fast in float32, twice in bfloat16.
    """

    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w]."""
        plain: Callable[[Tensor], Tensor] = super().forward
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return plain(x)
        sides = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, strict=True)
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)
        if min(len(x), height, width) < 1:
            return plain(x)
        weights_a_pixel = self.weight.numel() / (len(x) * height * width)
        if not self._wins(x.dtype, weights_a_pixel) or not x.is_contiguous(memory_format=torch.channels_last):
            return plain(x)
        rows = self._windows(x.permute(0, 2, 3, 1), height, width)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1).to(x.dtype)
        return F.linear(rows, weight, self.bias).permute(0, 3, 1, 2)

    def _wins(self, dtype: torch.dtype, weights_a_pixel: float) -> bool:
        """Whether it is the faster way, for an input of this type."""
        learns, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        pointwise = max(*self.kernel_size, *self.stride) == 1
        if dtype == torch.float32 and not autocast:
            if pointwise:
                return weights_a_pixel >= 32 or torch.get_num_threads() == 1
            return weights_a_pixel >= 5000 and learns
        if dtype == torch.bfloat16 and autocast and self.weight.dtype == torch.float32:
            return weights_a_pixel >= (100 if pointwise else 4000) and learns
        return False

    def _windows(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, h, w, C] -> [B, height, width, window height * window width * C], what each pixel of the result sees."""
        (down, right), (top, left) = self.stride, self.padding
        x = F.pad(x, (0, 0, left, left, top, top)) if top or left else x
        height, width = (height - 1) * down + 1, (width - 1) * right + 1
        places = itertools.product(*map(range, self.kernel_size))
        seen = [x[:, i : i + height : down, j : j + width : right] for i, j in places]
        return seen[0] if len(seen) == 1 else torch.cat(seen, dim=-1)


class _PadsOnce(_Faster):
    """timm's convolutions with TensorFlow's padding, whose maps torch fills with zeros before it copies into them."""

    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w]."""
        plain: Callable[[Tensor], Tensor] = super().forward
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return plain(x)
        sides = zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        vertical, horizontal = (
            max((math.ceil(side / stride) - 1) * stride + (kernel - 1) * dilation + 1 - side, 0)
            for side, kernel, stride, dilation in sides
        )
        dtype = x.dtype if torch.is_autocast_enabled("cpu") else self.weight.dtype
        padded: Tensor = _Pad.apply(x, vertical, horizontal, dtype) if vertical or horizontal else x.to(dtype)
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class _Pad(torch.autograd.Function):
    """Zeros around [B, C, h, w]: `vertical` rows and `horizontal` columns, the odd one at the end; in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vertical: int, horizontal: int, dtype: torch.dtype) -> Tensor:
        batch, channels, height, width = x.shape
        top, left = vertical // 2, horizontal // 2
        ctx.dtype = x.dtype
        ctx.inside = inside = (..., slice(top, top + height), slice(left, left + width))
        memory_format = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else None
        size = (batch, channels, height + vertical, width + horizontal)
        padded = torch.empty(size, dtype=dtype, device=x.device, memory_format=memory_format)
        padded[inside] = x
        rows, columns = (
            (padded[:, :, :top], padded[:, :, top + height :]),
            (padded[..., :left], padded[..., left + width :]),
        )
        for border in (*rows, *columns):
            border.zero_()
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient[ctx.inside].to(ctx.dtype), None, None, None


class _KeepsItsResult(_Faster):
    """ReLU6 in place, which torch copies its input for when it learns; the gradient follows from the result as well."""

    def forward(self, x: Tensor) -> Tensor:
        """x: of any shape; becomes the result."""
        plain: Callable[[Tensor], Tensor] = super().forward
        learns = x.requires_grad and torch.is_grad_enabled()
        return _ReLU6.apply(x) if learns and not torch.compiler.is_compiling() else plain(x)


class _ReLU6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x.clamp_(0, 6))
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # 0 where the result is 0 or 6, as where the input is that or lies beyond
        return torch.ops.aten.hardtanh_backward(gradient, *ctx.saved_tensors, 0, 6)
