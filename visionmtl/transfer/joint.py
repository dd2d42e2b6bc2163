"""Joint retraining: old and new tasks learn together from labels of all of them, the bound that others are held to."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from visionmtl.network import MultiTaskNet
from visionmtl.transfer.base import Extend


class Joint(Extend, frozen=True):
    """It needs the old data; the old weights are where it starts from."""

    type: Literal["joint"] = "joint"
    old_labels: ClassVar[bool] = True

    def kept(self, net: MultiTaskNet, old: Sequence[str]) -> list[nn.Module]:
        """Nothing."""
        return []
