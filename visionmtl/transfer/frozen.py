"""Frozen: the old network stays as it is, and new decoders read its features."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import nn

from visionmtl.network import MultiTaskNet
from visionmtl.transfer.base import Extend


class Frozen(Extend, frozen=True):
    """Nothing is forgotten where the whole trunk stays: the old outputs are the same bit for bit."""

    type: Literal["frozen"] = "frozen"
    part: Literal["trunk", "encoder"] = Field(
        "trunk", description="encoder: the pyramid learns on, and old tasks drift with it"
    )

    def kept(self, net: MultiTaskNet, old: Sequence[str]) -> list[nn.Module]:
        """The decoders, and the trunk or its encoder."""
        return [*super().kept(net, old), *([net.trunk] if self.part == "trunk" else net.encoders())]
