"""RLW: random weights."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from visionmtl.balance.base import LossRule, LossWeighting
from visionmtl.balance.random_numbers import RandomNumbers


class RLW(LossWeighting, frozen=True):
    """RLW: T softmax(z) with z from the standard normal distribution, new at each step (Lin et al. 2022,
    arXiv:2111.10603, sec. 3). A baseline: a method that does no better has not shown that its weights matter.

    Deviation: times T, so that each weight is 1 on average.
    """

    type: Literal["rlw"] = "rlw"

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        return _RLW()


class _RLW(LossRule):
    def __init__(self) -> None:
        super().__init__()
        self.draws = RandomNumbers()

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        z = self.draws.normal(len(losses)).masked_fill(~present, -float("inf"))
        return present.sum() * z.softmax(dim=0).nan_to_num()

    def update(self, losses: Tensor, present: Tensor) -> None:
        self.draws.next()
