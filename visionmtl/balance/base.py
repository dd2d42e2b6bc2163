"""The balancing contract: given one step's losses and the shared maps, fill every gradient."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from visionmtl.spec import Kind


@dataclass(frozen=True, slots=True)
class Step:
    """What a balancer may look at. The graph is cut between `shared` and `leaves`, which hold the same values."""

    losses: Mapping[str, Tensor]  # by task: float32 scalar, already divided over ranks
    shared: Sequence[Tensor]  # the trunk's output, attached to the trunk's graph
    leaves: Sequence[Tensor]  # what the decoders read; empty when the balancer does not need the cut
    scale: Tensor | float = 1.0  # fp16 loss scale times 1/accumulation; multiplies every gradient


class Balancer(nn.Module):
    """The state of a method, if it has any; saved in checkpoints, its parameters are trained."""

    needs_cut: bool = False
    """True when the method wants each task's gradient on the shared maps."""

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        """Add to `.grad` of every parameter of trunk, decoders and the balancer itself.

        Returns the weight given to each task (float scalars, detached), for the log. No host waits.
        """
        raise NotImplementedError


class Balance(Kind, home="visionmtl.balance"):
    """Frozen settings of one balancing method."""

    @abstractmethod
    def build(self, weights: Mapping[str, float]) -> Balancer:
        """weights: each task's configured weight, in the order of the config."""
