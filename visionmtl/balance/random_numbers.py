"""Random numbers that depend on a seed and a count alone: the same on every rank and device, and after a resume."""

import torch
from torch import Tensor, nn

_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # of splitmix64, as int64


class RandomNumbers(nn.Module):
    """A counter in the checkpoint. The first seed is torch's own at the start, which a run sets alike on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Buffer(_mix(torch.tensor(torch.initial_seed() % 2**62)))

    def next(self) -> None:
        """Let the next numbers be others."""
        self.count.add_(1)

    def uniform(self, *shape: int) -> Tensor:
        """float64 in (0, 1); the same until `next`. A counter-based generator (Salmon et al. 2011, "Parallel random
        numbers: as easy as 1, 2, 3") with the mixing function of Steele et al. 2014 (splitmix64)."""
        index = torch.arange(int(torch.Size(shape).numel()), device=self.count.device)
        bits = _mix(_mix(self.count) + (index + 1) * _GOLDEN)
        return (((bits >> 11) & (2**53 - 1)) + 0.5).double().mul(2.0**-53).view(shape)

    def normal(self, count: int) -> Tensor:
        """float64 [count], by the method of Box and Muller."""
        u, v = self.uniform(2, count)
        return (-2 * u.log()).sqrt() * (2 * torch.pi * v).cos()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> by) & (2 ** (64 - by) - 1)
