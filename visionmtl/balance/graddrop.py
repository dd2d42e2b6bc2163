"""GradDrop: at each place of the maps one sign of the gradients is kept."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from visionmtl.balance.base import Balance, Balancer, Step, backward_from_maps, memory_order
from visionmtl.balance.random_numbers import RandomNumbers
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
        self.draws = RandomNumbers()

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        leaves, gradients = list(step.leaves), []
        for number, (task, weight) in enumerate(self.weights.items()):
            loss = weight * step.losses[task] * step.scale
            loss.backward(retain_graph=step.joins_tasks and number < len(self.weights) - 1)
            gradients.append([leaf.grad for leaf in leaves])
            for leaf in leaves:
                leaf.grad = None
        sizes = [leaf[0].numel() for leaf in leaves]
        chances = self.draws.signed(sum(sizes)).split(sizes)
        combined = [
            self._drop(leaf, [g for g in of_leaf if g is not None], chance)
            for leaf, of_leaf, chance in zip(leaves, zip(*gradients, strict=True), chances, strict=True)
        ]
        if step.last:
            self.draws.next()
        backward_from_maps(step.shared, combined)
        return {task: torch.tensor(weight) for task, weight in self.weights.items()}

    def _drop(self, leaf: Tensor, gradients: list[Tensor], chance: Tensor) -> Tensor:
        if not gradients:
            return torch.zeros_like(leaf)
        order = memory_order(leaf)  # strides that differ would take most of the time on a CPU
        gradients = [gradient.permute(order) for gradient in gradients]
        sign = leaf.detach().permute(order).sign()
        sums = sum_over_ranks(torch.stack([_sum_of_products(sign, gradient) for gradient in gradients]))
        # 2 P - 1, which is exactly 1 where all signs agree, against what is never 1
        balance = sums.sum(dim=0).div_(sums.abs().sum(dim=0).clamp_(min=torch.finfo(sums.dtype).tiny))
        # -1 where negative gradients stay, equality included
        direction = torch.copysign(torch.ones((), device=leaf.device), chance.view_as(balance) - balance).neg_()
        # 1 where a gradient stays, else 0; one that is not finite stays so times 0
        factors = sums.mul_(direction).sign_().clamp_(min=0).to(leaf.dtype)
        if self.leak:
            factors.mul_(1 - self.leak).add_(self.leak)
        total: Tensor | None = None
        for gradient, factor in zip(gradients, factors, strict=True):
            total = gradient * factor if total is None else total.addcmul_(gradient, factor)
        assert total is not None
        return total.permute([order.index(axis) for axis in range(leaf.dim())])


def _sum_of_products(one: Tensor, other: Tensor) -> Tensor:
    """[B, ...] twice -> float32 [...]. Few images are added one by one, which needs no product of all of them."""
    if len(one) > 8 or one.dtype != torch.float32:
        return (one * other).float().sum(dim=0)
    total = one[0] * other[0]
    for number in range(1, len(one)):
        total.addcmul_(one[number], other[number])
    return total
