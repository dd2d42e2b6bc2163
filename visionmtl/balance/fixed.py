"""Fixed weights: the weighted sum of the losses."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from visionmtl.balance.base import Balance, Balancer, Step


class Fixed(Balance, frozen=True):
    """Each task's loss times its configured weight; the default."""

    type: Literal["fixed"] = "fixed"

    def build(self, weights: Mapping[str, float]) -> Balancer:
        return _Fixed(weights)


class _Fixed(Balancer):
    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        total = torch.stack([self.weights[task] * loss for task, loss in step.losses.items()]).sum()
        (total * step.scale).backward()
        return {task: torch.tensor(self.weights[task]) for task in step.losses}
