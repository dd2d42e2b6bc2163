"""Elastic weight consolidation: weights that mattered to the old tasks are held near their old values."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from visionmtl.datasets import Dataset
from visionmtl.transfer.base import Extend


class EWC(Extend, frozen=True):
    """Kirkpatrick et al. 2016, arXiv:1612.00796, eq. 3: strength / 2 * sum of F_i (w_i - w_i*)^2 over the trunk.

    F is the diagonal of the empirical Fisher information: the mean over images of the squared gradient of the old
    tasks' loss. Deviation: it is divided by its mean over all weights, so that `strength` compares with a weight decay
    towards the old values whatever the size of the network.
    """

    type: Literal["ewc"] = "ewc"
    strength: float = Field(1.0, gt=0)
    images: int | None = Field(
        None, ge=1, description="images that the Fisher information is a mean of; unset = 200, or an epoch of fewer"
    )
    data: list[Dataset] | None = Field(
        None, min_length=1, description="to measure it on; unset = the old training data"
    )
    fisher: str | None = Field(None, description="a fisher.pt of another run, in place of measuring")

    @model_validator(mode="after")
    def _measured_or_read(self) -> Self:
        idle = [name for name in ("images", "data") if self.fisher and getattr(self, name) is not None]
        if idle:
            raise ValueError(
                f"{idle[0]} is set, but fisher names a file, so nothing is measured and it would have no effect; "
                "remove one of them"
            )
        return self


class ElasticPenalty:
    """The gradient of the penalty on some weights of a network."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], strength: float) -> None:
        """parameters: by name, with their old values, which are kept."""
        self.parameters = dict(parameters)
        self.old = [parameter.detach().clone() for parameter in self.parameters.values()]
        self.strength = strength
        self.fisher: list[Tensor] | None = None

    def set_fisher(self, fisher: Mapping[str, Tensor]) -> None:
        """By name of the weight: float32 of its shape, >= 0. Raises ValueError where one is missing."""
        wrong = [name for name, p in self.parameters.items() if name not in fisher or fisher[name].shape != p.shape]
        if wrong:
            raise ValueError(
                f"the Fisher information lacks {wrong[0]} or has it in another shape ({len(wrong)} of "
                f"{len(self.parameters)} weights); one value for each weight of the trunk is needed; measure it for "
                "this network"
            )
        self.fisher = [fisher[name].to(p.device, torch.float32) for name, p in self.parameters.items()]

    def state_dict(self) -> dict[str, Tensor]:
        """The Fisher information by name; empty where none was set."""
        return dict(zip(self.parameters, self.fisher or (), strict=bool(self.fisher)))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add strength * F (w - w*) to the weights' gradients; nothing waits for the device."""
        assert self.fisher is not None, "set_fisher comes first"
        pull = [p - old for p, old in zip(self.parameters.values(), self.old, strict=True)]
        torch._foreach_mul_(pull, self.fisher)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        torch._foreach_add_(gradients, pull, alpha=self.strength)


def normalised(fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same divided by its mean over all values. Raises ValueError where there is nothing but zeros."""
    mean = sum(float(value.sum()) for value in fisher.values()) / sum(value.numel() for value in fisher.values())
    if mean == 0:
        raise ValueError(
            "the Fisher information is 0 everywhere: no image that it was measured on has a label of an old task; some "
            "are needed; set extend.data to data with such labels"
        )
    return {name: value / mean for name, value in fisher.items()}
