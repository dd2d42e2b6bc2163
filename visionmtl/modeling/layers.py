"""The convolution block that pyramids, decoders and heads are made of."""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmtl.ops.resize import exporting

Norm = Literal["batch", "sync", "group", "frozen"]
"""BatchNorm; BatchNorm synchronised over ranks; GroupNorm (32 groups at most); BatchNorm that never updates."""


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """A normalisation of [B, channels, h, w]. Frozen means: statistics and affine stay as they were loaded."""
    if norm == "group":
        # a group of one channel would normalise a 1x1 map to nothing
        fitting = (groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0 and channels >= 2 * groups)
        return GroupNorm(next(fitting, 1), channels)
    if norm == "sync":
        return nn.SyncBatchNorm(channels)
    if norm == "frozen":
        return FrozenBatchNorm(channels)
    return nn.BatchNorm2d(channels)


def replace_batch_norm(module: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> int:
    """Put `make(batch_norm)` in the place of every BatchNorm2d inside; returns how many there were."""
    replaced = 0
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, make(child))
            replaced += 1
        else:
            replaced += replace_batch_norm(child, make)
    return replaced


class _Replaced:
    """Mixed into convolutions that CPUs compute otherwise, see `keep_convolutions_fast`."""

    weight: Tensor
    bias: Tensor | None

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, type(self).__bases__, self.__dict__


class _TrainedInFloat32(_Replaced):
    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w]."""
        plain: Callable[[Tensor], Tensor] = super().forward  # type: ignore[misc]
        slow = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        if not slow or self.weight.dtype != torch.float32:
            return plain(x)
        with torch.autocast("cpu", enabled=False):
            return plain(x.float()).to(x.dtype)


class _MatrixProduct(_Replaced):
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w]."""
        plain: Callable[[Tensor], Tensor] = super().forward  # type: ignore[misc]
        float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or not float32 or torch.compiler.is_compiling():
            return plain(x)
        sides = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, strict=True)
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)
        if min(len(x), height, width) < 1:
            return plain(x)
        weights_a_pixel = self.weight.numel() / (len(x) * height * width)
        if max(*self.kernel_size, *self.stride) == 1:  # limits by measurement
            wins = weights_a_pixel >= 32 or torch.get_num_threads() == 1
        else:
            wins = weights_a_pixel >= 5000 and torch.is_grad_enabled()
        if not wins or not x.is_contiguous(memory_format=torch.channels_last):
            return plain(x)
        rows = self._windows(x.permute(0, 2, 3, 1), height, width)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(rows, weight, self.bias).permute(0, 3, 1, 2)

    def _windows(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, h, w, C] -> [B, height, width, window height * window width * C], what each pixel of the result sees."""
        (down, right), (top, left) = self.stride, self.padding
        x = F.pad(x, (0, 0, left, left, top, top)) if top or left else x
        height, width = (height - 1) * down + 1, (width - 1) * right + 1
        places = itertools.product(*map(range, self.kernel_size))
        seen = [x[:, i : i + height : down, j : j + width : right] for i, j in places]
        return seen[0] if len(seen) == 1 else torch.cat(seen, dim=-1)


_mixed: dict[tuple[type[_Replaced], type[nn.Conv2d]], type[nn.Conv2d]] = {}
"""By mixin and kind of convolution their class: one, so that a copy of a module is of its class."""


def _mix(mixin: type[_Replaced], kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    return _mixed.setdefault((mixin, kind), type(kind.__name__, (mixin, kind), {}))


def _empty(mixin: type[_Replaced], kind: type[nn.Conv2d]) -> nn.Conv2d:
    """A module that pickle or deepcopy fills."""
    mixed = _mix(mixin, kind)
    return mixed.__new__(mixed)


def keep_convolutions_fast(net: nn.Module) -> None:
    """Change the classes of convolutions that torch (2.15) is slow at on a CPU; no parameter and no name changes.

    Depthwise ones that stride, or are wider than 3, train in float32 under bfloat16 autocast: their gradients have no
    fast kernel in bfloat16 and take 4 to 20 times as long (AMX), conversions included, half of a step of MobileNetV2.
    Others in channels_last are products of matrices in float32 where their weights are many beside the pixels, since
    oneDNN arranges weights and their gradients anew in each call, and 1x1 ones with one thread, where torch's other
    convolution copies every map: up to 5 times as fast.
    """
    for module in net.modules():
        if not isinstance(module, nn.Conv2d) or isinstance(module, _Replaced):
            continue
        if 1 < module.in_channels == module.groups:
            if max(module.stride) > 1 or max(module.kernel_size) > 3:
                module.__class__ = _mix(_TrainedInFloat32, type(module))
        elif type(module) is nn.Conv2d and _is_plain(module):
            module.__class__ = _mix(_MatrixProduct, nn.Conv2d)


def _is_plain(module: nn.Conv2d) -> bool:
    padded = not isinstance(module.padding, str) and module.padding_mode == "zeros"
    return padded and module.groups == max(module.dilation) == 1


class GroupNorm(nn.GroupNorm):
    """torch's, except that a compiled one keeps channels_last.

    torch's own returns another memory format, in which the convolutions around it would copy every map twice in the
    backward: a thirtieth of a compiled step with ResNet-50 on one H200.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w]."""
        if not torch.compiler.is_compiling() or exporting():
            return super().forward(x)
        groups = x.float().unflatten(1, (self.num_groups, -1))
        variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
        normed = ((groups - mean) * (variance + self.eps).rsqrt()).flatten(1, 2)
        return normed * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class FrozenBatchNorm(nn.BatchNorm2d):
    """BatchNorm with fixed statistics and affine, for fine-tuning with small batches."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        """Stays in evaluation mode."""
        return super().train(False)


def convolution(c_in: int, c_out: int, kernel: int, *, stride: int = 1, separable: bool = False) -> list[nn.Module]:
    """One convolution without bias, or a depthwise and a pointwise one."""
    if separable and kernel > 1:
        return [
            nn.Conv2d(c_in, c_in, kernel, stride, kernel // 2, groups=c_in, bias=False),
            nn.Conv2d(c_in, c_out, 1, bias=False),
        ]
    return [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)]


class ConvBlock(nn.Sequential):
    """Convolution (or depthwise + pointwise), norm, ReLU: [B, c_in, h, w] -> [B, c_out, h/stride, w/stride], the sides
    rounded up."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        norm: Norm = "batch",
        separable: bool = False,
        activate: bool = True,
    ) -> None:
        convolutions = convolution(c_in, c_out, kernel, stride=stride, separable=separable)
        super().__init__(*convolutions, norm_layer(norm, c_out), *([nn.ReLU(inplace=True)] if activate else []))
