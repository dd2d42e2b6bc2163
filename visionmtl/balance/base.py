"""The balancing contract: given one step's losses and the shared maps, fill every gradient."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from visionmtl.config.registry import Configurable
from visionmtl.ops.ranks import sum_over_ranks


@dataclass(frozen=True, slots=True)
class Step:
    """What a balancer may look at. The graph is cut between `shared` and `leaves`, which hold the same values."""

    losses: Mapping[str, Tensor]  # by task: float32 scalar, divided by the labelled items of the whole optimiser step
    shared: Sequence[Tensor]  # the trunk's output, attached to its graph; empty when the balancer needs no cut
    leaves: Sequence[Tensor]  # what the decoders read; empty likewise
    scale: Tensor | float = 1.0  # fp16 loss scale; multiplies every gradient
    labelled: Mapping[str, Tensor] | None = None  # by task: bool scalar, whether the step has a label; None: all have
    share: float = 1.0  # of the optimiser step that this micro-batch is; the losses are divided already


class Balancer(nn.Module):
    """The state of a method, if it has any; saved in checkpoints, its parameters are trained."""

    needs_cut: bool = False
    """True when the method wants each task's gradient on the shared maps."""

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        """Add to `.grad` of every parameter of trunk, decoders and the balancer itself.

        Returns the weight given to each task (float scalars, detached), for the log. No host waits.
        """
        raise NotImplementedError


class Balance(Configurable, package="visionmtl.balance"):
    """Frozen settings of one balancing method."""

    @abstractmethod
    def build(self, weights: Mapping[str, float]) -> Balancer:
        """weights: each task's configured weight, in the order of the config."""


Weighting = Callable[[Tensor], Tensor]
"""Gramian float32 [T, T] of the tasks' gradients, positive semidefinite -> weights [T]."""


class GramianBalance(Balance):
    """Settings common to the methods that see only inner products of the tasks' gradients on the shared maps."""

    heads: Literal["raw", "weighted"] = "raw"
    """Whether a decoder learns from its own loss as it is, or times the weight the method gave its task."""

    @abstractmethod
    def weighting(self, num_tasks: int) -> Weighting:
        """The method."""

    def build(self, weights: Mapping[str, float]) -> Balancer:
        return _Gramian(weights, self.weighting(len(weights)), self.heads == "weighted")


class _Gramian(Balancer):
    """T backwards through the decoders, one through the trunk.

    The gradients on the shared maps stand for those on the trunk's parameters (the feature-level bound of Sener and
    Koltun 2018, arXiv:1810.04650, sec. 3.3). Over ranks the maps of all images concatenate, so the Gramian of the
    whole batch is the sum of the ranks' Gramians (up to a common factor).
    """

    needs_cut = True

    def __init__(self, weights: Mapping[str, float], weighting: Weighting, weigh_heads: bool) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.weighting = weighting
        self.weigh_heads = weigh_heads

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        leaves, shared = list(step.leaves), list(step.shared)
        losses = [self.weights[task] * loss * step.scale for task, loss in step.losses.items()]
        gradients = [self._on_leaves(loss, leaves) for loss in losses]

        flat = [torch.cat([g.flatten().float() for g in of_task]) for of_task in gradients]
        gramian = torch.stack([torch.stack([a @ b for b in flat]) for a in flat])
        weights = self.weighting(sum_over_ranks(gramian)).to(gramian.dtype)

        if self.weigh_heads:
            (torch.stack(losses) * weights).sum().backward()
        combined = [
            torch.stack([w.to(g.dtype) * g for w, g in zip(weights, of_leaf, strict=True)]).sum(0)
            for of_leaf in zip(*gradients, strict=True)
        ]
        torch.autograd.backward(shared, combined)
        return {task: self.weights[task] * weights[i] for i, task in enumerate(step.losses)}

    def _on_leaves(self, loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        """The loss's gradient on each shared map; with raw heads its decoder's parameters get theirs on the way."""
        found: Sequence[Tensor | None]
        if self.weigh_heads:
            found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        else:
            loss.backward()
            found = tuple(leaf.grad for leaf in leaves)
            for leaf in leaves:
                leaf.grad = None
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
