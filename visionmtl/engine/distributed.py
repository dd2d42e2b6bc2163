"""What the processes of a run share: the group that torchrun starts, the device of each rank, averaged gradients."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from visionmtl.ops.ranks import num_ranks, sum_over_ranks

Value = TypeVar("Value")
_number_of_group = itertools.count()


class LostProcess(ConnectionError):
    """Another process of the run ended, or was not heard of for too long."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def choose_device(name: str | torch.device) -> torch.device:
    """'auto' = CUDA where there is one, else the CPU. Raises ValueError for a device that is not there."""
    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device is {name!r}; allowed are auto, cpu, cuda and cuda:N; correct --device")
    chosen = torch.device(name)
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        found = f"{count} CUDA device{'s' * (count > 1)}" if count else "no CUDA device"
        raise ValueError(f"device is {name!r}, but torch finds {found}; use one that is there, or --device cpu")
    return chosen


def start(device: str = "auto", timeout_s: float = 600.0) -> Ranks:
    """Join the group described by torchrun's environment; alone without one. NCCL on CUDA, gloo on the CPU.

    timeout_s: how long this process waits for the others in anything they do together.
    """
    chosen = choose_device(device)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(0, 1, chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    timeout = timedelta(seconds=timeout_s)
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store over its restarts, in which the addresses of dead processes stay (pytorch #135712).
        # Agents of several machines count restarts differently: there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # a program that trains, then evaluates, joins one group after the other
    store = dist.PrefixStore(f"group {next(_number_of_group)}", store)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return Ranks(rank, world, chosen)


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def group(device: str = "auto", timeout_s: float = 600.0) -> Iterator[Ranks]:
    """`start` before and `stop` after what happens inside.

    A process that fails inside leaves the group at once, so that the others fail too instead of waiting for it: with
    LostProcess, which says that the cause is to be looked for in another process.
    """
    ranks = start(device, timeout_s)
    failed = True
    try:
        yield ranks
        failed = False
    except RuntimeError as error:
        if ranks.world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise LostProcess(
                f"process {ranks.rank} of {ranks.world} lost another one, which ended or kept it waiting for "
                f"{timeout_s:g} s ({str(error).partition('. ')[0]}); all must run to the end; look for the first error "
                "among their messages, then start again, a training with --resume; train.distributed.timeout_s is how "
                "long they wait"
            ) from error
        raise
    finally:
        # NCCL would first wait for the partners of what is under way; the end of the process frees it without
        if not (failed and ranks.device.type == "cuda"):
            stop()


def barrier() -> None:
    """Wait for all ranks, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def replicate(module: nn.Module, ranks: Ranks, averaged_later: bool = False) -> nn.Module:
    """The module with gradients averaged over ranks as its backward runs; itself in a single process.

    averaged_later: whether several backwards reach the same parameters, so that the caller averages their gradients
    when all are done; then all ranks only get the first one's weights here.
    """
    if ranks.world == 1:
        return module
    if averaged_later:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)
        return module
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    # every parameter has a gradient in every step: unlabelled tasks give zeros, and unused parameters are frozen
    return DistributedDataParallel(
        module,
        device_ids=ids,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # running statistics are only read in evaluation: see `share_statistics`
    )


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that live outside the replicated module, in one exchange."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= dist.get_world_size()
        for gradient, averaged in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(averaged.view_as(gradient))


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over ranks, detached; the value itself in a single process."""
    return sum_over_ranks(value) / num_ranks()


def share_statistics(module: nn.Module) -> None:
    """Give all ranks the first one's float buffers: each counts BatchNorm's running statistics on its own images."""
    if dist.is_initialized():
        for buffer in module.buffers():
            if buffer.is_floating_point():
                values = buffer.contiguous()
                dist.broadcast(values, src=0)
                buffer.copy_(values)


def max_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over ranks, on all of them; waits for the device where there are several."""
    if not dist.is_initialized():
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    largest: list[float] = shared.tolist()
    return largest


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on all ranks when it is true on any."""
    return bool(max_over_ranks([float(flag)], device)[0])


def gather_objects(value: Value) -> list[Value]:
    """What each rank has, in their order; it must pickle."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_same(value: Any, what: str, remedy: str) -> None:
    """Raise ValueError on every rank where they do not all hold the same value."""
    values = gather_objects(value)
    if any(other != values[0] for other in values):
        of_rank = ", ".join(f"{other} in process {rank}" for rank, other in enumerate(values))
        raise ValueError(f"{what} differs between the processes: {of_rank}; all need the same; {remedy}")
