"""BatchNorm over the images of all processes: torch's on CUDA devices, and one that works anywhere else."""

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from visionmtl.ops.ranks import num_ranks, summed_over_ranks


class SyncBatchNorm(nn.BatchNorm2d):
    """What torch's SyncBatchNorm computes, in operators that the CPU has and that compile into one graph.

    Followed by dropout and activation where it takes the place of a normalisation of timm that holds these.
    """

    drop: nn.Module
    act: nn.Module

    @classmethod
    def of(cls, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> "SyncBatchNorm":
        """One that takes the place of `norm`, with its very parameters and statistics."""
        made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name, parameter in norm.named_parameters(recurse=False):
            made.register_parameter(name, parameter)
        for name, buffer in norm.named_buffers(recurse=False):
            made.register_buffer(name, buffer)
        made.drop = getattr(norm, "drop", nn.Identity())
        made.act = getattr(norm, "act", nn.Identity())
        made.training = norm.training
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x: float [B, C, h, w]; B, h and w may differ between ranks."""
        shared = self.training and num_ranks() > 1
        normed: Tensor = self.act(self.drop(self._over_ranks(x) if shared else super().forward(x)))
        return normed

    def _over_ranks(self, x: Tensor) -> Tensor:
        values = x.float()
        per_channel = (1, -1, 1, 1)
        num_here = values.new_full((1,), values.numel() // values.shape[1])
        sums = summed_over_ranks(torch.cat([values.sum((0, 2, 3)), num_here]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean.view(per_channel)  # in two passes: E[x^2] - E[x]^2 would cancel
        variance = summed_over_ranks(centred.square().sum((0, 2, 3))) / count

        if self.track_running_stats:
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            step = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            unbiased = variance.detach() * (count / (count - 1).clamp(min=1))
            self.running_mean.copy_(self.running_mean.lerp(mean.detach(), step))
            self.running_var.copy_(self.running_var.lerp(unbiased, step))

        scale = (variance + self.eps).rsqrt()
        scale = scale * self.weight if self.affine else scale
        normed = centred * scale.view(per_channel)
        normed = normed + self.bias.view(per_channel) if self.affine else normed
        return normed.to(x.dtype)


def synchronise(net: nn.Module, everywhere: bool, with_torch: bool) -> None:
    """Let the BatchNorms of a net in training mode take their statistics over all processes.

    everywhere: all that learn statistics; else those that were asked for one by one (`norm: sync`).
    with_torch: by torch's own, which needs CUDA and is no part of a compiled graph.
    Raises ValueError where everything is asked for and there is nothing.
    """
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm) if everywhere else (nn.SyncBatchNorm,)
    found = 0
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, kinds) and child.training:  # else it is frozen
                found += 1
                if not with_torch:
                    setattr(module, name, SyncBatchNorm.of(child))
                elif not isinstance(child, nn.SyncBatchNorm):
                    setattr(module, name, convert_sync_batchnorm(child))
    if everywhere and not found:
        raise ValueError(
            "train.sync_batchnorm is set, but this network has no BatchNorm that learns, so it would have no effect; "
            "one is needed in the encoder, the pyramid or a decoder (norm: batch); remove train.sync_batchnorm"
        )
