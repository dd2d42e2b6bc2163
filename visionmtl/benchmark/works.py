"""Pieces of work that verbs build, warm up and time: the encoder alone, the joint step, the device's matrix product."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from visionmtl.benchmark.measure import PeakMemory, Work, count_flops, milliseconds
from visionmtl.benchmark.workload import COMPILE, Mode, Workload
from visionmtl.data.prefetch import Prefetcher
from visionmtl.engine.state import RunState
from visionmtl.structures import Batch

WARM_UP = 3  # calls; CUDA graphs are recorded in the second and replayed from the third on


@dataclass(frozen=True)
class Built:
    """A warmed piece of work, and what was learnt on the way."""

    work: Work
    seconds: float  # to build and to warm up, compiling included
    call_s: float  # of one warmed call, about
    flops: float | None  # of one call; None where it was not counted
    peak_mib: float | None  # of a warmed call, with all that was made for it: weights, what the optimiser keeps


def build(make: Callable[[], Work], device: torch.device, count: bool = True) -> Built:
    """Make it and call it until nothing is new. count: its floating-point operations, which compiled code hides."""
    start = time.perf_counter()
    with PeakMemory(device) as peak:
        work = make()
        flops = count_flops(work) if count else None
        if flops is None:
            work()
        # compiling lies behind, recording a CUDA graph before: its replays take nothing from the allocator
        peak.restart()
        for _ in range(WARM_UP if device.type == "cuda" or not count else 1):
            work()
    return Built(work, time.perf_counter() - start, milliseconds(work, device) / 1e3, flops, peak.mib)


def joint_step(state: RunState, batch: Batch) -> Work:
    """The step of a training run: the next (pinned) batch is copied to the device beside it, as the loop does it."""
    feed = Prefetcher(state.ranks.device)
    groups = feed.groups(itertools.repeat(batch))

    def work() -> None:
        state.advance(next(groups))
        feed.ahead()

    return work


def encoder_step(workload: Workload, mode: Mode = "eager") -> Work:
    """The encoder alone on a float image that is there already; the mean of each map from stride 4 on as loss."""
    run = workload.run()
    torch.manual_seed(0)
    encoder = run.model.encoder.build(workload.size, coarsest=5).to(workload.on)
    encoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4, fused=True)
    image = torch.randn(workload.batch, 3, *workload.size, device=workload.on)
    image = image.contiguous(memory_format=torch.channels_last)

    autocast = workload.autocast()

    def loss() -> torch.Tensor:
        with autocast():
            maps = encoder(image)
        return torch.stack([one.float().mean() for level, one in maps.items() if level >= 2]).sum()

    if COMPILE[mode]:
        how = "reduce-overhead" if mode == "cuda_graph" else "default"
        loss = torch.compile(loss, fullgraph=True, dynamic=False, mode=how)

    def work() -> None:
        if mode == "cuda_graph":
            torch.compiler.cudagraph_mark_step_begin()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def matrix_product(workload: Workload) -> tuple[Work, float]:
    """A large product in the precision of the step, and its floating-point operations: what the device can do."""
    side = 8192 if workload.on.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=workload.on).to(workload.cast_to) for _ in range(2))
    return lambda: a @ b, 2.0 * side**3
