"""Random numbers that depend on a seed and a count alone: the same on every rank and device, and after a resume."""

import torch
from torch import Tensor, nn

_GOLDEN32, _FIRST32, _SECOND32 = -1640531527, -2048144789, -1028477387  # of murmur3, as int32
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

    def signed(self, count: int) -> Tensor:
        """float32 [count] in [-1, 1), multiples of 2^-23, for as many as a map has; the same until `next`.

        As `uniform`, with the 32 bits of murmur3's finaliser (Appleby 2011): a sixth of its time.
        """
        seed = _mix(self.count)
        bits = torch.arange(count, dtype=torch.int32, device=seed.device)
        bits.mul_(_GOLDEN32).add_(seed.to(torch.int32)).bitwise_xor_((seed >> 32).to(torch.int32))
        for by, factor in ((16, _FIRST32), (13, _SECOND32)):
            bits.bitwise_xor_((bits >> by).bitwise_and_(2 ** (32 - by) - 1)).mul_(factor)
        bits.bitwise_xor_((bits >> 16).bitwise_and_(2**16 - 1))
        return bits.bitwise_and_(-256).float().mul_(2.0**-31)

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
