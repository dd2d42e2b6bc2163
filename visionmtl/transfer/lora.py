"""LoRA: each new task adds matrices of low rank to the frozen encoder, and has a pyramid of its own."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from visionmtl.modeling.sharing.hard import Hard
from visionmtl.modeling.sharing.lora_branch import LoRABranch
from visionmtl.network import Model, MultiTaskNet
from visionmtl.transfer.base import Extend


class LoRA(Extend, frozen=True):
    """Hu et al. 2021, arXiv:2106.09685: the old outputs are the same bit for bit; a new task costs an encoder's run.

    Normalisation keeps the old statistics in the new tasks' encoder too. See `modeling.sharing.lora_branch`.
    """

    type: Literal["lora"] = "lora"
    own_pyramids: ClassVar[bool] = True
    rank: int = Field(8, ge=1)
    alpha: float = Field(8.0, gt=0)

    def model(self, model: Model, old: Sequence[str], new: Sequence[str]) -> Model:
        """With branches beside the old trunk."""
        if not isinstance(model.sharing, Hard):
            raise ValueError(
                f"extend.type is lora, and the old network shares by {model.sharing.type!r}; branches are added to one "
                "that shares by 'hard'; choose another extend.type"
            )
        sharing = LoRABranch(common=tuple(old), rank=self.rank, alpha=self.alpha)
        return model.model_copy(update={"sharing": sharing})

    def weights(self, old: Mapping[str, Tensor], net: MultiTaskNet) -> dict[str, Tensor]:
        """Branches begin with the old encoder's statistics; its parameters are theirs already.

        A branch that reads the very levels of the old pyramid begins with the old pyramid too.
        """
        trunk: Any = net.trunk
        levels: Mapping[str, tuple[int, ...]] = trunk.levels
        common = {level for task in trunk.common for level in levels[task]}
        weights = dict(old)
        for name in net.state_dict():
            _, kind, *rest = name.split(".", 3)
            own = ""
            if kind == "branch_encoders":
                own = "trunk.encoder." + rest[1].replace("parametrizations.weight.original", "weight")
            elif kind == "branch_pyramids" and set(levels[rest[0]]) == common:
                own = f"trunk.pyramid.{rest[1]}"
            if own in old:
                weights[name] = old[own]
        return weights

    def kept(self, net: MultiTaskNet, old: Sequence[str]) -> list[nn.Module]:
        """Everything old; the branches' matrices are not."""
        return [*super().kept(net, old), net.trunk.pyramid, *net.encoders()]  # type: ignore[list-item]
