"""What a training step costs: the encoder alone, the joint step and its parts, and the networks it replaces."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from visionmtl.benchmark.figures import Cell, Figure, Note, Row, Table
from visionmtl.benchmark.measure import Budget, Built, Timing, Work, alternate, build, median, ratio
from visionmtl.benchmark.peers import PEERS, peers
from visionmtl.benchmark.workload import TASKS, Mode, Workload, encoder_step, joint_step
from visionmtl.structures import Batch

COMPILE_S = {"encoder": 60.0, "joint": 150.0, "peer": 60.0}
"""What compiling took on the slowest hosts seen; corrected by what it takes here."""
BUILD_S = 3.0
RESERVE_S = 5.0
"""For the matrix product, and for steps that come out slower than their first call."""

# with (device, encoder, batch, size) of these kinds limits are known
GPU, CPU = ("cuda", "resnet50", 16, (512, 512)), ("cpu", 2, (256, 256))
CPU_ENCODERS = ("resnet50", "mobilenetv3_large_100")


@dataclass
class Step:
    """Which steps are timed. All are built and warmed first, then timed in turns."""

    workload: Workload
    timing: Timing
    modes: Sequence[Mode] = ("eager",)
    without: bool = False  # the joint step without each task in turn, too
    peers: bool = False  # single-task networks that a joint one replaces, too
    compare_boxes: Sequence[int] = ()  # the joint step with exactly so many boxes in every image
    budget: Budget = field(default_factory=lambda: Budget(None))
    built: dict[str, Built] = field(default_factory=dict, init=False)
    slowness: float | None = field(default=None, init=False)  # of compiling here; None: nothing was compiled yet

    def measure(self) -> Iterator[Figure]:
        """Notes while it builds, a table of all steps, and the ratios between them, with limits where known."""
        self._check()
        workload = self.workload
        labels = "pinned, and copied to the device beside the step" if workload.on.type == "cuda" else "in memory"
        yield Note(
            f"Whole training steps on {workload.text}, batch {workload.batch}, {workload.boxes} boxes an image on "
            f"average; labelled images are {labels}. Medians over rounds in alternation; ratios are medians of the "
            f"rounds' ratios. Clock: {self.timing.clock}."
        )
        side = 8192 if workload.on.type == "cuda" else 1024
        a, b = (torch.randn(side, side, device=workload.on).to(workload.cast_to) for _ in range(2))
        yield from self._build_all()
        works: dict[str, Work] = {"matrix product": lambda: a @ b}
        times = alternate(works | {name: built.work for name, built in self.built.items()}, workload.on, self.timing)
        gflops_peak = 2.0 * side**3 / (min(times.pop("matrix product")) * 1e6)  # a peak is the best of all rounds
        if self.built:
            columns = ("step", "ms", "quartiles", "images/s", "peak MiB", "GFLOP", "% of matrix peak")
            rows = [self._table_row(name, values, gflops_peak) for name, values in times.items()]
            yield Table("Training steps", columns, rows)
        yield Row("matrix peak", gflops_peak, "GFLOP/s")
        yield from self._ratios(times)
        for mode in ("compiled", "cuda_graph"):
            if "joint, eager" in times and (name := f"joint, {mode}") in times:
                medians = median(times["joint, eager"]), median(times[name])
                yield Note(what_compiling_gives(mode, self.built[name].seconds, *medians))

    def _check(self) -> None:
        if len(self.compare_boxes) == 1:
            raise ValueError(
                f"--compare-boxes is {self.compare_boxes[0]} alone; two numbers or more are compared; add another, "
                "or use --boxes for the number of the whole benchmark"
            )
        if "cuda_graph" in self.modes and self.workload.on.type != "cuda":
            raise ValueError(
                f"--modes names cuda_graph, and the device is {self.workload.on}; only CUDA devices record such "
                "graphs; leave it out"
            )
        self.timing.check(self.workload.on)

    def _build_all(self) -> Iterator[Note]:
        """In the order of importance: what does not fit into the budget is skipped."""
        workload, samples = self.workload, self.workload.samples()
        batch, first = workload.batch_of(samples), self.modes[0]
        # made when its first step is built, so that its memory counts as that step's
        trainer = cache(lambda mode: workload.trainer(mode=mode))

        def joint(mode: Mode, batch: Batch) -> Callable[[], Work]:
            return lambda: joint_step(trainer(mode), batch)

        for mode in self.modes:
            yield from self._add(f"encoder alone, {mode}", partial(encoder_step, workload, mode), mode, "encoder")
            yield from self._add(f"joint, {mode}", joint(mode, batch), mode, "joint")
            if mode == first and self.peers:
                for name, make in peers(workload, samples).items():
                    yield from self._add(name, make, "eager", "peer")
        for mode in self.modes:
            for count in self.compare_boxes if mode != "cuda_graph" and f"joint, {mode}" in self.built else ():
                exact = workload.batch_of(workload.samples(count))
                yield from self._add(_with_boxes(mode, count), joint(mode, exact), mode, "joint")
        for task in TASKS if self.without else ():
            yield from self._add(
                f"joint without {task}", partial(_without, workload, first, task, batch), first, "joint"
            )
        if self.peers and "compiled" in self.modes:
            for name, make in peers(workload, samples, compiled=True).items():
                yield from self._add(f"{name}, compiled", make, "compiled", "peer")

    def _add(self, name: str, make: Callable[[], Work], mode: Mode, kind: str) -> Iterator[Note]:
        """Build a step if the budget holds that and the timing of all steps."""
        build_s = BUILD_S if mode == "eager" else COMPILE_S[kind] * (self.slowness or 1)
        calls_s = [built.call_s for built in self.built.values()]
        calls_s.append(max(calls_s, default=0))  # this one is guessed to be as slow as the slowest
        timing_s = RESERVE_S + (self.timing.rounds + 3) * sum(max(self.timing.seconds, call_s) for call_s in calls_s)
        if not self.budget.fits(build_s + timing_s):
            left_s = max(self.budget.left_s, 0)
            yield Note(
                f"SKIPPED: {name}; it needs about {build_s:.0f} s, the timing {timing_s:.0f} s, and {left_s:.0f} s "
                "are left"
            )
            return
        built = self.built[name] = build(make, self.workload.on, count=mode == "eager")
        if mode != "eager":
            self.slowness = max(self.slowness or 0.5, built.seconds / COMPILE_S[kind])
        yield Note(f"ready: {name}, after {built.seconds:.1f} s")

    def _table_row(self, name: str, times_ms: Sequence[float], gflops_peak: float) -> Sequence[Cell]:
        low, middle, high = np.percentile(times_ms, [25, 50, 75]).tolist()
        built = self.built[name]
        # compiling does not change what is computed, so the eager step tells
        eager = [name.replace(mode, other) for mode in ("compiled", "cuda_graph") for other in ("eager", "")]
        flops = next((b.flops for n in (name, *eager) if (b := self.built.get(n.removesuffix(", "))) and b.flops), None)
        share = None if flops is None else 100 * flops / (middle * 1e6 * gflops_peak)
        # of steps that share a trainer, the first was counted with it
        peak_mib = None if "boxes" in name else built.peak_mib
        gflop = None if flops is None else flops / 1e9
        images_per_s = self.workload.batch * 1e3 / middle
        return name, middle, f"{low:.4g} to {high:.4g}", images_per_s, peak_mib, gflop, share

    def _ratios(self, times: dict[str, list[float]]) -> Iterator[Row]:
        workload, first = self.workload, self.modes[0]
        key = (workload.on.type, workload.encoder, workload.batch, workload.size)
        on_gpu = key == GPU
        on_cpu = (key[0], *key[2:]) == CPU and workload.encoder in CPU_ENCODERS
        joint = [name for name in (f"joint, {mode}" for mode in self.modes) if name in times]
        if not joint:
            return
        best = min(joint, key=lambda name: median(times[name]))
        yield Row(f"step ({best})", median(times[best]), "ms", 26 if on_gpu else None)
        if (peak_mib := self.built[best].peak_mib) is not None:
            yield Row(f"peak memory ({best})", peak_mib / 1024, "GiB", 5 if on_gpu else None)
        for mode in reversed(self.modes):
            if (alone := f"encoder alone, {mode}") in times:
                limit = 1.8 if on_gpu and mode == "compiled" and best != "joint, compiled" else None
                yield Row(f"{best} / {alone}", ratio(times[best], times[alone]), "", limit)
        if all(name in times for name in PEERS):
            together = ratio(times[best], *(times[name] for name in PEERS))
            yield Row(f"{best} / sum of the three peers", together, "", 0.45 if on_cpu else None)
            yield Row(f"sum of the three peers / {best}", 1 / together, "", least=4.9 if on_gpu else None)
        for mode in self.modes:
            counts = [count for count in self.compare_boxes if _with_boxes(mode, count) in times]
            for count in counts[1:]:
                few, many = (times[_with_boxes(mode, n)] for n in (counts[0], count))
                yield Row(f"joint, {mode}, {count} boxes / {counts[0]}", ratio(many, few), "", 1.05)
        for task in TASKS:
            if (less := f"joint without {task}") in times and f"joint, {first}" in times:
                share = 1 - ratio(times[less], times[f"joint, {first}"])
                yield Row(f"share of {task} in the step ({first})", 100 * share, "%")


def what_compiling_gives(mode: str, seconds: float, eager_ms: float, compiled_ms: float) -> str:
    """A sentence about what it cost to build and warm up the step, and what it saves in each."""
    saved_ms = eager_ms - compiled_ms
    if saved_ms <= 0:
        return f"{mode}: {seconds:.0f} s to build, and a step takes {-saved_ms:.3g} ms more than eager: do without."
    return (
        f"{mode}: {seconds:.0f} s to build, less where torch's cache on disk has it, saves {saved_ms:.3g} of "
        f"{eager_ms:.4g} ms a step: worth it from {seconds * 1e3 / saved_ms:,.0f} steps on."
    )


def _with_boxes(mode: Mode, count: int) -> str:
    return f"joint, {mode}, boxes: {count}"


def _without(workload: Workload, mode: Mode, task: str, batch: Batch) -> Work:
    """The joint step of the other tasks."""
    others = [name for name in TASKS if name != task]
<<<<<<< HEAD
    less = replace(
        batch,
        targets={name: batch.targets[name] for name in others},
        labelled={name: batch.labelled[name] for name in others},
        counts={name: batch.counts[name] for name in others},
    )
    return joint_step(workload.trainer(others, mode=mode), less)
=======
    parts: dict[str, Any] = {
        part: {name: getattr(batch, part)[name] for name in others} for part in ("targets", "labelled", "counts")
    }
    return joint_step(workload.trainer(others, mode=mode), replace(batch, **parts))
>>>>>>> 028878fe5f200e7107ef2fb9a1f0fb73e52d5a01
