"""Tasks beside a hard-shared trunk: the same encoder with matrices of low rank for each of them."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from visionmtl.modeling.sharing.base import Parts, Sharing, Trunk
from visionmtl.modeling.sharing.lora import add_low_rank, with_same_parameters
from visionmtl.structures import Maps


class LoRABranch(Sharing, frozen=True):
    """Some tasks share as under `hard`; each other one has the encoder's weights + (alpha / rank) B A, and a pyramid.

    The matrices are those of Hu et al. 2021 (arXiv:2106.09685, sec. 4.1). It is what `extend: lora` makes of a trained
    network: the names of the common part are those of `hard`. The encoder runs once for the common part and once for
    each other task.
    """

    type: Literal["lora_branch"] = "lora_branch"
    common: tuple[str, ...] | None = Field(None, min_length=1, description="tasks of the common part; unset: the first")
    rank: int = Field(8, ge=1, description="at most; a layer with fewer inputs or outputs has as many as these")
    alpha: float = Field(8.0, gt=0)

    def build(self, parts: Parts) -> Trunk:
        common = self.common_of(tuple(parts.levels))
        if unknown := [task for task in common if task not in parts.levels]:
            raise ValueError(
                f"model.sharing.common names {unknown[0]!r}; this run has {', '.join(parts.levels)}; correct it"
            )
        return _Branches(self, parts, common)

    def common_of(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """The tasks of the common part, of a network with these."""
        return self.common or tuple(tasks[:1])


class _Branches(Trunk):
    shared_maps = False
    splits_by_modules = False
    of_each_task = ("branch_encoders", "branch_pyramids")

    def __init__(self, spec: LoRABranch, parts: Parts, common: tuple[str, ...]) -> None:
        super().__init__(parts)
        self.common = common
        common_levels = tuple(sorted({level for task in common for level in parts.levels[task]}))
        encoder = parts.encoder(parts.all_levels[-1])
        self.encoder = encoder
        self.pyramid = parts.pyramid(encoder.channels, common_levels)
        self.out_channels = self.pyramid.out_channels
        branches = [task for task in parts.levels if task not in common]
        encoders = {task: with_same_parameters(encoder) for task in branches}
        for branch in encoders.values():
            add_low_rank(branch, spec.rank, spec.alpha)
        self.branch_encoders = nn.ModuleDict(encoders)
        self.branch_pyramids = nn.ModuleDict(
            {task: parts.pyramid(encoder.channels, parts.levels[task]) for task in branches}
        )

    def forward(self, image: Tensor) -> dict[str, Maps]:
        maps: dict[str, Maps] = {}
        common = [task for task in self.levels if task in self.common]
        if common:
            shared: Maps = self.pyramid(self.encoder(image))
            maps = {task: {level: shared[level] for level in self.levels[task]} for task in common}
        for task, pyramid in self.branch_pyramids.items():
            maps[task] = pyramid(self.branch_encoders[task](image))
        return {task: maps[task] for task in self.levels}

    def split(self, shared: dict[str, Maps]) -> dict[str, Maps]:
        return shared

    def keep(self, tasks: Sequence[str]) -> None:
        super().keep(tasks)
        if not set(self.common) & set(tasks):
            del self.pyramid

    def encoders(self) -> list[nn.Module]:
        """The common one and those of the branches."""
        return [self.encoder, *self.branch_encoders.values()]
