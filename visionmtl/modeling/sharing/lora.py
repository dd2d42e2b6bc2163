"""LoRA: one encoder for all tasks, to whose weights each task adds matrices of low rank."""

import copy
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from visionmtl.modeling.sharing.base import Parts, Sharing, Trunk
from visionmtl.modeling.sharing.single import SeparateTrunk


class LoRA(Sharing, frozen=True):
    """Hu et al. 2021, arXiv:2106.09685, sec. 4.1: W + (alpha / rank) B A in every full convolution and linear layer.

    The encoder runs once for each task; each has normalisation statistics and a pyramid of its own. A convolution's
    kernel counts as a matrix of output channels times all else. Deviation: `freeze_base: false` lets the tasks train W
    together, for there is less to adapt in an encoder that starts at random.
    """

    type: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1)
    """At most; a layer with fewer inputs or outputs has as many as these."""
    alpha: float = Field(8.0, gt=0)
    freeze_base: bool = False
    """Keep the common weights as they are loaded; only for encoders with pretrained weights."""

    def build(self, parts: Parts) -> Trunk:
        encoders = copies_of_one(parts, self.freeze_base)
        for encoder in encoders.values():
            add_low_rank(encoder, self.rank, self.alpha)
        return SeparateTrunk(parts, encoders)


def copies_of_one(parts: Parts, freeze: bool) -> dict[str, Any]:
    """An encoder for each task, all with the same parameters, but buffers of their own."""
    first: Any = parts.encoder(parts.all_levels[-1])
    if freeze:
        first.requires_grad_(False)
    copies = [first, *(with_same_parameters(first) for _ in range(len(parts.levels) - 1))]
    return dict(zip(parts.levels, copies, strict=True))


def with_same_parameters(encoder: nn.Module) -> nn.Module:
    """A copy whose parameters are those of the encoder, and whose buffers are its own."""
    return copy.deepcopy(encoder, {id(parameter): parameter for parameter in encoder.parameters()})


def adaptable_layers(encoder: nn.Module) -> Iterator[Any]:
    """Convolutions of one group and linear layers."""
    for layer in list(encoder.modules()):
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            yield layer


def add_low_rank(encoder: nn.Module, rank: int, alpha: float) -> None:
    """Give every adaptable layer matrices of its own beside its weight."""
    for layer in adaptable_layers(encoder):
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))


class LowRank(nn.Module):
    """weight [c_out, ...] -> weight + scale * B A, where B is zero at first."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        c_out, c_in = weight.flatten(1).shape
        rank = min(rank, c_out, c_in)
        self.scale = alpha / rank
        self.a = nn.Parameter(torch.empty(rank, c_in))
        self.b = nn.Parameter(torch.zeros(c_out, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a).view_as(weight)
