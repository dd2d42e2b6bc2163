"""Learning without Forgetting: the old network teaches the old tasks on the new images."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import nn

from visionmtl.network import MultiTaskNet
from visionmtl.tasks.base import SoftLoss
from visionmtl.transfer.base import Extend
from visionmtl.transfer.distillation import Distill, Teacher


class LwF(Extend, frozen=True):
    """Li and Hoiem 2016, arXiv:1606.09282, eq. 1: new labels, and the old network's outputs as soft targets.

    Deviation: everything is trained together from the start, without the paper's warm-up of the new decoders alone.
    """

    type: Literal["lwf"] = "lwf"
    weight: float = Field(1.0, gt=0, description="factor on the losses against the old network")

    def kept(self, net: MultiTaskNet, old: Sequence[str]) -> list[nn.Module]:
        """Nothing: the old decoders learn from their own former outputs."""
        return []

    def distill(self, old: Sequence[str]) -> Distill:
        """The old network as a teacher of all it knows."""
        assert self.checkpoint is not None
        teacher = Teacher(checkpoint=self.checkpoint, tasks={task: task for task in old})
        return Distill(teachers=(teacher,), tasks={task: SoftLoss(weight=self.weight) for task in old})
