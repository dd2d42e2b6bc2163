"""What each way of sharing costs: parameters, arithmetic, latency and memory, beside a network for each task."""

import ctypes
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from visionmtl.benchmark.figures import Cell, Figure, Note, Table
from visionmtl.benchmark.measure import Timing, Work, alternate, build, count_flops, median, ratio
from visionmtl.benchmark.workload import Workload, joint_step
from visionmtl.config.loader import ConfigError
from visionmtl.config.registry import did_you_mean
from visionmtl.modeling.sharing.base import Sharing
from visionmtl.network import MultiTaskNet

REFERENCE = "single"
COLUMNS = (
    "sharing", "shared M", "own M", "GFLOP, batch 1", "ms, batch 1", f"x {REFERENCE}", "peak MiB of a step",
)  # fmt: skip


def measure_sharing(workload: Workload, names: Sequence[str], timing: Timing) -> Iterator[Figure]:
    """A row for each way of sharing; the separate networks of `single` are what all are compared with.

    names: types, each with its default settings, or branching:AT; none: all that can be built here. ValueError for
    one that is unknown or cannot be built. Parameters are those that a run trains: shared where the losses of two tasks
    reach them. Latency is that of raw outputs.
    """
    timing.check(workload.on)
    known = [*sorted(Sharing.members()), "branching:pyramid"]
    for name in names:
        if name.partition(":")[0] not in known:
            raise ValueError(
                f"unknown way of sharing {name!r}{did_you_mean(name, known)}; known are {', '.join(known)}; correct "
                "--ways"
            )
    reference = _predictions(workload, _net(_with(workload, REFERENCE)))
    for name in names:  # a way that cannot be built should not wait for those before it
        try:
            _net(_with(workload, name))
        except ValueError as error:
            raise ValueError(f"--ways names {name}, which cannot be built here: {error}") from error
    yield Note(
        f"Ways of sharing on {workload.text}; latency of raw outputs at batch 1, in turns with one network a task; "
        f"memory of a training step with {workload.batch} images under fixed weights. Clock: {timing.clock}."
    )
    rows: list[Sequence[Cell]] = []
    for name in names or known:  # one at a time: many networks would not fit into memory together
        of_way = _with(workload, name)
        try:
            net = _net(of_way)
        except ConfigError:
            raise
        except ValueError as error:
            yield Note(f"SKIPPED: {name}; {error}")
            continue
        shared = sum(p.numel() for p in net.trunk.shared_parameters()) / 1e6
        total = sum(p.numel() for p in net.parameters()) / 1e6
        work = _predictions(of_way, net)
        gflops = count_flops(_predictions(of_way, net, torch.no_grad)) / 1e9  # torch cannot count in inference mode
        times = alternate({REFERENCE: reference, name: work}, workload.on, timing)
        peak = _peak_mib(of_way)
        rows.append(
            (name, shared, total - shared, gflops, median(times[name]), ratio(times[name], times[REFERENCE]), peak)
        )
    yield Table("Ways of sharing", COLUMNS, rows)


def _with(workload: Workload, name: str) -> Workload:
    kind, _, at = name.partition(":")
    chosen = [f"model.sharing.type={kind}", *([f"model.sharing.at={at}"] if at else [])]
    return replace(workload, overrides=(*workload.overrides, *chosen))


def _net(workload: Workload) -> MultiTaskNet:
    return workload.net().eval()


def _predictions(workload: Workload, net: MultiTaskNet, mode: type[Any] = torch.inference_mode) -> Work:
    image = torch.zeros(1, 3, *workload.size, dtype=torch.uint8, device=workload.on)
    autocast = workload.autocast()

    @mode()
    def predictions() -> object:
        with autocast():
            return net(image)

    return predictions


def _peak_mib(workload: Workload) -> float | None:
    """What a training step takes at most, with weights, gradients and moments; None where the system does not tell."""

    def make() -> Work:
        return joint_step(workload.trainer(), workload.batch_of(workload.samples()))

    if workload.on.type == "cuda":
        return build(make, workload.on, count=False).peak_mib
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed would be used again and not be counted
    before = _status_mib("VmRSS")
    work = make()
    work()  # makes the moments
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here on
    work()
    return _status_mib("VmHWM") - before


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
