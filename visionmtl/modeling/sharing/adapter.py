"""Adapters: one encoder for all tasks, beside whose layers each task has small ones of its own."""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from visionmtl.modeling.sharing.base import Parts, Sharing, Trunk
from visionmtl.modeling.sharing.lora import adaptable_layers, copies_of_one
from visionmtl.modeling.sharing.single import SeparateTrunk


class Adapter(Sharing, frozen=True):
    """Parallel adapters with a bottleneck: layer(x) + up(relu(down(x))), where `up` is zero at first.

    Rebuffi et al. 2018, arXiv:1803.10082, sec. 3.2, put 1x1 convolutions beside the 3x3 ones of a ResNet; Chen et al.
    2022 (AdaptFormer), arXiv:2205.13535, sec. 3.2, bottlenecks beside a ViT's MLP. Here they stand beside every linear
    layer and every full convolution that keeps the size of its map. Normalisation and pyramid as in `lora`.
    """

    type: Literal["adapter"] = "adapter"
    channels: int = Field(8, ge=1)
    """Width of the bottleneck."""
    freeze_base: bool = False
    """Keep the common weights as they are loaded; only for encoders with pretrained weights."""

    def build(self, parts: Parts) -> Trunk:
        encoders = copies_of_one(parts, self.freeze_base)
        for encoder in encoders.values():
            for layer in adaptable_layers(encoder):
                if _keeps_size(layer):
                    layer.adapter = _bottleneck(layer, self.channels)
                    layer.register_forward_hook(_add_adapter)
        return SeparateTrunk(parts, encoders)


def _keeps_size(layer: Any) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    same = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return bool(set(layer.stride) == {1} and layer.padding in (same, "same"))


def _bottleneck(layer: Any, channels: int) -> nn.Sequential:
    down: nn.Module
    up: Any
    if isinstance(layer, nn.Linear):
        down, up = nn.Linear(layer.in_features, channels), nn.Linear(channels, layer.out_features)
    else:
        down, up = nn.Conv2d(layer.in_channels, channels, 1), nn.Conv2d(channels, layer.out_channels, 1)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)
    return nn.Sequential(down, nn.ReLU(inplace=True), up)


def _add_adapter(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapted: Tensor = layer.adapter(inputs[0])
    return output + adapted
