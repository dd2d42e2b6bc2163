"""What the processes of a run share: the group that torchrun starts, the device of each rank, averaged gradients."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from visionmtl.ops.ranks import sum_over_ranks


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def choose_device(name: str) -> torch.device:
    """'auto' = CUDA where there is one, else the CPU. Raises ValueError for a CUDA device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no CUDA device; use --device cpu, or install a driver")
    return torch.device(name)


def start(device: str = "auto") -> Ranks:
    """Join the group described by torchrun's environment; alone without one. NCCL on CUDA, gloo on the CPU."""
    chosen = choose_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(0, 1, chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), chosen)


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def replicate(module: nn.Module, ranks: Ranks) -> nn.Module:
    """The module with gradients averaged over ranks as its backward runs; itself in a single process."""
    if ranks.world == 1:
        return module
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    # every parameter takes part in every step (unlabelled tasks give zeros, not nothing), so none need be searched for
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of a few parameters that live outside the replicated module."""
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over ranks, detached; the value itself in a single process."""
    return sum_over_ranks(value) / (dist.get_world_size() if dist.is_initialized() else 1)


def share_statistics(module: nn.Module) -> None:
    """Give all ranks the first one's float buffers: each counts BatchNorm's running statistics on its own images."""
    if dist.is_initialized():
        for buffer in module.buffers():
            if buffer.is_floating_point():
                values = buffer.contiguous()
                dist.broadcast(values, src=0)
                buffer.copy_(values)


def agree(flag: bool, device: torch.device) -> bool:
    """True on all ranks when it is true on any; for stopping together."""
    if not dist.is_initialized():
        return flag
    shared = torch.tensor(float(flag), device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())
