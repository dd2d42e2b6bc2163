"""Timing of pieces of work in alternation, so that other load on the machine slows all of them alike; peak memory."""

import gc
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from visionmtl.benchmark.figures import Note

Name = TypeVar("Name", bound=Hashable)
Work = Callable[[], object]
"""On a GPU a call may return before the work is done."""
Clock = Literal["wall", "cpu"]
"""cpu: the process's own computing time, which other processes lengthen less."""
WARM_UP = 3  # calls; CUDA graphs are recorded in the second and replayed from the third on


@dataclass(frozen=True)
class Timing:
    """`rounds` turns of about `seconds` each, one call at least."""

    rounds: int = 7
    seconds: float = 0.25
    clock: Clock = "wall"

    def check(self, device: torch.device) -> None:
        """Raises ValueError where computing time of this process is not the time that a work takes."""
        if self.clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() > 1):
            raise ValueError(
                f"the clock is 'cpu', the device {device} with {torch.get_num_threads()} threads; it adds up all "
                "threads and counts no GPU time; set OMP_NUM_THREADS=1 and --device cpu, or --clock wall"
            )


def milliseconds(work: Work, device: torch.device, calls: int = 1, clock: Clock = "wall") -> float:
    """Mean time of a call over `calls` of them in a row."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / calls

    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    for _ in range(calls):
        work()
    return (now() - start) * 1e3 / calls


def alternate(works: Mapping[Name, Work], device: torch.device, timing: Timing) -> dict[Name, list[float]]:
    """Milliseconds a call, by name, one mean for each round. A round takes every work in turn, after a warm-up."""
    calls = {}
    for name, work in works.items():
        work()
        calls[name] = max(1, math.ceil(timing.seconds * 1e3 / max(milliseconds(work, device), 1e-3)))
    times: dict[Name, list[float]] = {name: [] for name in works}
    for number in range(timing.rounds):
        # every other round backwards, so that no work always follows the same neighbour
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(milliseconds(works[name], device, calls[name], timing.clock))
    return times


def median(values: Sequence[float]) -> float:
    """As a float of Python."""
    return float(np.median(values))


def ratio(ours: Sequence[float], *theirs: Sequence[float]) -> float:
    """The median over rounds of ours / the sum of theirs: each round sees one state of the machine."""
    return median(np.divide(ours, np.sum(theirs, axis=0)))


def count_flops(work: Work) -> float:
    """Floating-point operations of one call in matrix products and convolutions, a multiply-add as two."""
    formulas = {torch.ops.aten.convolution_backward: backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return float(counter.get_total_flops())


def backward_flops(
    grad_out: Sequence[int], x: Sequence[int], weight: Sequence[int], _bias: Any, _stride: Any, _padding: Any,
    _dilation: Any, transposed: bool, _output_padding: Any, _groups: int, mask: Sequence[bool], out_shape: Any,
) -> int:  # fmt: skip
    """The gradients of input and weights cost one forward each; torch's own formula forgets the groups of the second.

    Takes what `aten.convolution_backward` takes, shapes in place of tensors.
    """
    return sum(mask[:2]) * int(conv_flop_count(list(x), list(weight), list(grad_out), transposed))


@dataclass(frozen=True)
class Built:
    """A warmed work."""

    work: Work
    seconds: float  # to build and to warm up, compiling included
    call_s: float  # of one warmed call, about
    flops: float | None  # of one call; None: not counted
    peak_mib: float | None  # of a warmed call, with all that was made for it; None without CUDA


def build(make: Callable[[], Work], device: torch.device, count: bool = True) -> Built:
    """Make a work and warm it up. count: its floating-point operations too, which compiled code hides."""
    on_gpu, start = device.type == "cuda", time.perf_counter()
    gc.collect()  # garbage of earlier works must not be freed while this one is measured
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    work, flops = make(), None
    if count:
        flops = count_flops(work)
    else:
        work()
    if on_gpu:
        # after compiling and before a CUDA graph is recorded: its replays take nothing from the allocator
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP if on_gpu or not count else 1):
        work()
    if on_gpu:
        torch.cuda.synchronize(device)
    peak_mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20 if on_gpu else None
    return Built(work, time.perf_counter() - start, milliseconds(work, device) / 1e3, flops, peak_mib)


class Budget:
    """The seconds that a benchmark may take; None: as many as it needs."""

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def fits(self, seconds: float) -> bool:
        """Whether something that takes about so long would end in time."""
        return seconds <= self._end - time.monotonic()

    def skipped(self, name: str, seconds: float) -> Note:
        """Says that something which takes about so long is left out."""
        left_s = max(self._end - time.monotonic(), 0)
        return Note(f"SKIPPED: {name}; about {seconds:.0f} s are needed, {left_s:.0f} s are left")
