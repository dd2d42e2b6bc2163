"""GradDrop: at each place of the maps one sign of the gradients is kept."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from visionmtl.balance.base import Balance, Balancer, Step
from visionmtl.balance.draws import Draws
from visionmtl.ops.ranks import sum_over_ranks


class GradDrop(Balance, frozen=True):
    """GradDrop: at each place, P = (1 + sum_i G_i / sum_i |G_i|) / 2, and positive gradients stay with probability P,
    negative ones otherwise (Chen et al. 2020, arXiv:2010.06808, alg. 1): G_i is sign(A) g_i summed over the batch, for
    activations A and gradients g_i on the shared maps. One mask serves all images of the batch.

    Needs shared maps. No task weights come out; the log shows the configured ones.
    """

    type: Literal["graddrop"] = "graddrop"
    leak: float = Field(0.0, ge=0, lt=1, description="the part of a dropped gradient that stays")

    def build(self, weights: Mapping[str, float]) -> Balancer:
        return _GradDrop(weights, self.leak)

    def without_shared_maps(self) -> Self:
        raise ValueError(
            "balance is 'graddrop', which works on maps that all tasks read; in this way of sharing there are none; "
            "choose another balancing method, or model.sharing=hard"
        )


class _GradDrop(Balancer):
    needs_cut = True

    def __init__(self, weights: Mapping[str, float], leak: float) -> None:
        super().__init__()
        self.weights, self.leak = dict(weights), leak
        self.draws = Draws()

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        leaves, gradients = list(step.leaves), []
        for number, (task, weight) in enumerate(self.weights.items()):
            loss = weight * step.losses[task] * step.scale
            loss.backward(retain_graph=step.joins_tasks and number < len(self.weights) - 1)
            gradients.append([leaf.grad for leaf in leaves])
            for leaf in leaves:
                leaf.grad = None
        total = sum(leaf[0].numel() for leaf in leaves)
        chances = self.draws.uniform(total).split([leaf[0].numel() for leaf in leaves])
        combined = [
            self._drop(leaf, [g for g in of_leaf if g is not None], chance.view(leaf.shape[1:]))
            for leaf, of_leaf, chance in zip(leaves, zip(*gradients, strict=True), chances, strict=True)
        ]
        if step.last:
            self.draws.next()
        torch.autograd.backward(list(step.shared), combined)
        return {task: torch.tensor(weight) for task, weight in self.weights.items()}

    def _drop(self, leaf: Tensor, gradients: list[Tensor], chance: Tensor) -> Tensor:
        if not gradients:
            return torch.zeros_like(leaf)
        sign = leaf.detach().sign()
        sums = sum_over_ranks(torch.stack([(sign * g).float().sum(dim=0) for g in gradients]))  # [T, C, H, W]
        size = sums.abs().sum(dim=0)
        positive = (1 + sums.sum(dim=0) / torch.where(size > 0, size, 1.0)) / 2 > chance
        stays = torch.where(positive, sums > 0, sums < 0).to(leaf.dtype)
        # a value that is not finite stays, so that the gradient's norm shows it
        factors = self.leak + (1 - self.leak) * stays + (0 * sums).to(leaf.dtype)
        total = gradients[0] * factors[0]
        for gradient, factor in zip(gradients[1:], factors[1:], strict=True):
            total = total.addcmul_(gradient, factor)
        return total
