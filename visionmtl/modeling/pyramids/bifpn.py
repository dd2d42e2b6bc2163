"""Bidirectional feature pyramid: repeated top-down and bottom-up passes with learnt weights at every sum."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from visionmtl.modeling.layers import ConvBlock
from visionmtl.modeling.pyramids.base import Pyramid, PyramidMaps, used_levels
from visionmtl.ops.resize import double_nearest
from visionmtl.structures import Maps


class BiFPN(Pyramid):
    """Tan et al. 2020, arXiv:1911.09070, sec. 3; coarse levels are added by max-pooling, as in its code."""

    type: Literal["bifpn"] = "bifpn"
    channels: int = Field(96, ge=1)
    separable: bool = True
    num_layers: int = Field(3, ge=1)

    def build(self, channels: Mapping[int, int], levels: tuple[int, ...]) -> PyramidMaps:
        """See the base."""
        if len(levels) < 2:
            raise ValueError(f"bifpn was asked for levels {levels}; allowed are two or more; set pyramid: fpn")
        return _Layers(self, channels, levels)


class _Layers(PyramidMaps):
    def __init__(self, spec: BiFPN, channels: Mapping[int, int], levels: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = width = spec.channels
        self.levels = levels
        self.used = used_levels(channels, levels, "bifpn")
        self.lateral = nn.ModuleList(
            ConvBlock(channels[level], width, 1, norm=spec.norm, activate=False) for level in self.used
        )
        self.layers = nn.ModuleList(_Layer(spec, len(levels)) for _ in range(spec.num_layers))

    def forward(self, maps: Maps) -> Maps:
        """See the base."""
        inputs = [lateral(maps[level]) for lateral, level in zip(self.lateral, self.used, strict=True)]
        while len(inputs) < len(self.levels):
            inputs.append(_halve(inputs[-1]))
        for layer in self.layers:
            inputs = layer(inputs)
        return dict(zip(self.levels, inputs, strict=True))


class _Layer(nn.Module):
    def __init__(self, spec: BiFPN, num_levels: int) -> None:
        super().__init__()
        # finest first; the coarsest level has no top-down node, the finest one no bottom-up node
        self.top_down = nn.ModuleList(_Fuse(spec, 2) for _ in range(num_levels - 1))
        self.bottom_up = nn.ModuleList(_Fuse(spec, 3) for _ in range(num_levels - 2))
        self.coarsest = _Fuse(spec, 2)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Finest first."""
        middle = list(inputs)
        for i in range(len(inputs) - 2, -1, -1):
            middle[i] = self.top_down[i]([inputs[i], _double(middle[i + 1], inputs[i])])

        outputs = middle[:1]
        for i, fuse in enumerate(self.bottom_up, start=1):
            outputs.append(fuse([inputs[i], middle[i], _halve(outputs[-1])]))
        return [*outputs, self.coarsest([inputs[-1], _halve(outputs[-1])])]


class _Fuse(nn.Module):
    """Fast normalised fusion (eq. 2), SiLU, convolution, normalisation."""

    def __init__(self, spec: BiFPN, num_inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_inputs))
        width = spec.channels
        self.out = ConvBlock(width, width, norm=spec.norm, separable=spec.separable, activate=False)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        weight = F.relu(self.weight)
        weight = (weight / (weight.sum() + 1e-4)).to(inputs[0].dtype)
        fused = sum((x * w for x, w in zip(inputs[1:], weight[1:], strict=True)), inputs[0] * weight[0])
        return self.out(F.silu(fused))


def _double(x: Tensor, like: Tensor) -> Tensor:
    """As large as `like`: where halving rounded up, the last row or column is left out again."""
    return double_nearest(x)[..., : like.shape[-2], : like.shape[-1]]


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2, 1)
