"""The contract of adding tasks to a trained network: what of it stays, and what reminds it of its old tasks."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from visionmtl.config.registry import Configurable
from visionmtl.modeling.sharing.lora_branch import LoRABranch
from visionmtl.network import Model, MultiTaskNet
from visionmtl.transfer.distillation import Distill


class Extend(Configurable, package="visionmtl.transfer"):
    """Frozen settings of one way. The old tasks are those of the checkpoint, the new ones the others of the run."""

    old_labels: ClassVar[bool] = False
    """Whether the old tasks learn from labels too; otherwise the training data's labels of theirs are left alone."""

    own_pyramids: ClassVar[bool] = False
    """Whether new tasks have pyramids of their own, so that they may read other levels."""

    checkpoint: str | None = Field(None, description="the trained network: a run folder or a .pt file; or --extend")

    def model(self, model: Model, old: Sequence[str], new: Sequence[str]) -> Model:
        """The extended network's settings, from those of the old one: new tasks read what its tasks have in common."""
        if not isinstance(model.sharing, LoRABranch):
            return model
        common = {"common": (*model.sharing.common_of(old), *new)}
        return model.model_copy(update={"sharing": model.sharing.model_copy(update=common)})

    def weights(self, old: Mapping[str, Tensor], net: MultiTaskNet) -> dict[str, Tensor]:
        """The old network's tensors under their names in the extended one."""
        return dict(old)

    def kept(self, net: MultiTaskNet, old: Sequence[str]) -> list[nn.Module]:
        """Parts whose old weights and statistics stay as they are.

        Here: the decoders of the old tasks, which nothing teaches.
        """
        return [net.decoders[task] for task in old]

    def distill(self, old: Sequence[str]) -> Distill | None:
        """What the old network teaches the old tasks on the new data; None: nothing."""
        return None

    @property
    def feature_weight(self) -> float | None:
        """Factor on the loss that keeps distances between features; None: there is none."""
        return None
