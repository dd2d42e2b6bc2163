"""The convolution block that pyramids, decoders and heads are made of."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

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
