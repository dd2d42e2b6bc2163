"""Multi-gate mixture of experts: convolutions on the shared maps, mixed for each task by a gate of its own."""

from typing import Literal

from pydantic import Field
from torch import nn

from visionmtl.modeling.layers import ConvBlock
from visionmtl.modeling.sharing.base import Parts, PyramidTrunk, Sharing, Trunk
from visionmtl.structures import Maps


class MMoE(Sharing, frozen=True):
    """Ma et al. 2018, KDD, eq. 6 and 7, on the levels of the pyramid.

    f_k(x) = sum over experts of softmax(W_k mean(x)) * expert(x): experts are 3x3 convolutions with GroupNorm and ReLU
    over all levels, a gate reads the mean of each map over its pixels, so that no size is built in. Deviation: the
    paper's input is a vector, which its gates and experts read whole.
    """

    type: Literal["mmoe"] = "mmoe"
    num_experts: int = Field(4, ge=1)
    separable: bool = True
    """Depthwise + pointwise instead of full 3x3 convolutions."""

    def build(self, parts: Parts) -> Trunk:
        return _MMoE(parts, self)


class _MMoE(PyramidTrunk):
    of_each_task = ("gates",)

    def __init__(self, parts: Parts, spec: MMoE) -> None:
        super().__init__(parts)
        self.joins_tasks = len(parts.levels) > 1
        width = self.out_channels
        self.experts = nn.ModuleList(
            # GroupNorm, for running statistics of BatchNorm would mix the levels
            ConvBlock(width, width, norm="group", separable=spec.separable)
            for _ in range(spec.num_experts)
        )
        self.gates = nn.ModuleDict({task: nn.Linear(width, spec.num_experts) for task in parts.levels})

    def split(self, shared: Maps) -> dict[str, Maps]:
        read = {level for levels in self.levels.values() for level in levels}
        outputs = {level: [expert(shared[level]) for expert in self.experts] for level in sorted(read)}
        means = {level: shared[level].mean(dim=(2, 3)) for level in read}
        maps: dict[str, Maps] = {}
        for task, levels in self.levels.items():
            maps[task] = {}
            for level in levels:
                shares = (
                    self.gates[task](means[level]).softmax(dim=1)[:, :, None, None, None].unbind(1)
                )  # E x [B,1,1,1]
                first, *others = (x * share for x, share in zip(outputs[level], shares, strict=True))
                maps[task][level] = sum(others, first)
        return maps
