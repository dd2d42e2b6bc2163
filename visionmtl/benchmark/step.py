"""What a training step costs: the encoder alone, the joint step and its parts, and the networks it replaces."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch

from visionmtl.benchmark.figures import Cell, Figure, Note, Row, Table
from visionmtl.benchmark.measure import Budget, Built, Timing, Work, alternate, build, median, ratio
from visionmtl.benchmark.peers import PEERS, peers
from visionmtl.benchmark.workload import TASKS, Mode, Workload, encoder_step, joint_step
from visionmtl.structures import Batch

BUILD_S, COMPILE_S, COMPILE_JOINT_S = 3.0, 60.0, 150.0
"""What building took on the slowest hosts seen; that of compiling is corrected by what it takes here."""
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
    flops: dict[str, float] = field(default_factory=dict, init=False)  # by name without mode: compiling changes none
    slowness: float = field(default=1.0, init=False)  # of compiling here

    def measure(self) -> Iterator[Figure]:
        """Notes while it builds, a table of all steps, and the ratios between them, with limits where known."""
        self._check()
        workload, device = self.workload, self.workload.on
        labels = "pinned, and copied to the device beside the step" if device.type == "cuda" else "in memory"
        yield Note(
            f"Whole training steps on {workload.text}, batch {workload.batch}, {workload.boxes} boxes an image on "
            f"average; labelled images are {labels}. Medians over rounds in alternation; ratios are medians of the "
            f"rounds' ratios. Clock: {self.timing.clock}."
        )
        side = 8192 if device.type == "cuda" else 1024
        a, b = (torch.randn(side, side, device=device).to(workload.dtype) for _ in range(2))
        for name, mode, make in self._steps():
            yield self._build(name, mode, make)
        works: dict[str, Work] = {"matrix product": lambda: a @ b}
        times = alternate(works | {name: built.work for name, built in self.built.items()}, device, self.timing)
        gflops_peak = 2.0 * side**3 / (min(times.pop("matrix product")) * 1e6)  # a peak is the best of all rounds
        if self.built:
            columns = ("step", "ms", "quartiles", "images/s", "peak MiB", "GFLOP", "% of matrix peak")
            rows = [self._table_row(name, values, gflops_peak) for name, values in times.items()]
            yield Table("Training steps", columns, rows)
        yield Row("matrix peak", gflops_peak, "GFLOP/s")
        yield from self._ratios(times)
        for mode in ("compiled", "cuda_graph"):
            if "joint, eager" in times and (name := f"joint, {mode}") in times:
                eager_ms, seconds = median(times["joint, eager"]), self.built[name].seconds
                saved_ms = eager_ms - median(times[name])
                worth = f"worth it from {seconds * 1e3 / saved_ms:,.0f} steps on" if saved_ms > 0 else "do without"
                yield Note(
                    f"{mode}: {seconds:.0f} s to build, less where torch's cache on disk has it, saves {saved_ms:.3g} "
                    f"of {eager_ms:.4g} ms a step: {worth}."
                )

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
        if self.peers and set(self.workload.tasks) != set(TASKS):
            raise ValueError(
                f"--peers, and the config's tasks are {', '.join(self.workload.tasks)}; the peers are one network each "
                f"for {', '.join(TASKS)}; leave --peers out"
            )
        self.timing.check(self.workload.on)

    def _steps(self) -> Iterator[tuple[str, Mode, Callable[[], Work]]]:
        """Name, mode and maker of each, the most important first: what does not fit into the budget is skipped."""
        workload, first = self.workload, self.modes[0]
        batch = workload.batch_of(workload.samples())
        # made when its first step is built, so that its memory counts as that step's
        trainer = cache(lambda mode: workload.trainer(mode=mode))

        def joint(mode: Mode, batch: Batch) -> Callable[[], Work]:
            return lambda: joint_step(trainer(mode), batch)

        for mode in self.modes:
            yield f"encoder alone, {mode}", mode, partial(encoder_step, workload, mode)
            yield f"joint, {mode}", mode, joint(mode, batch)
            if mode == first and self.peers:
                for name, make in peers(workload, batch).items():
                    yield name, "eager", make
        for mode in self.modes:
            for count in self.compare_boxes if mode != "cuda_graph" and f"joint, {mode}" in self.built else ():
                yield _with_boxes(mode, count), mode, joint(mode, workload.batch_of(workload.samples(count)))
        for task in workload.tasks if self.without else ():
            yield f"joint without {task}", first, partial(_without, workload, first, task, batch)
        if self.peers and "compiled" in self.modes:
            for name, make in peers(workload, batch, compiled=True).items():
                yield f"{name}, compiled", "compiled", make

    def _build(self, name: str, mode: Mode, make: Callable[[], Work]) -> Note:
        """Build a step if the budget holds that and the timing of all steps."""
        calls_s = [built.call_s for built in self.built.values()]
        calls_s.append(max(calls_s, default=0))  # this one is guessed to be as slow as the slowest
        seconds = RESERVE_S + (self.timing.rounds + 3) * sum(max(self.timing.seconds, call_s) for call_s in calls_s)
        compile_s = COMPILE_JOINT_S if name.startswith("joint") else COMPILE_S
        seconds += BUILD_S if mode == "eager" else compile_s * self.slowness
        if not self.budget.fits(seconds):
            return self.budget.skipped(name, seconds)
        built = self.built[name] = build(make, self.workload.on, count=mode == "eager")
        if mode != "eager":
            self.slowness = max(0.5, built.seconds / compile_s)
        elif built.flops:
            self.flops[_without_mode(name)] = built.flops
        return Note(f"ready: {name}, after {built.seconds:.1f} s")

    def _table_row(self, name: str, times_ms: Sequence[float], gflops_peak: float) -> Sequence[Cell]:
        low, middle, high = np.percentile(times_ms, [25, 50, 75]).tolist()
        gflop, share = None, None
        if flops := self.flops.get(_without_mode(name)):
            gflop, share = flops / 1e9, 100 * flops / (middle * 1e6 * gflops_peak)
        # of steps that share a trainer, the first was counted with it
        peak_mib = None if "boxes" in name else self.built[name].peak_mib
        return name, middle, f"{low:.4g} to {high:.4g}", self.workload.batch * 1e3 / middle, peak_mib, gflop, share

    def _ratios(self, times: dict[str, list[float]]) -> Iterator[Row]:
        workload, first = self.workload, self.modes[0]
        device, encoder, *shape = workload.on.type, workload.encoder, workload.batch, workload.size
        on_gpu = (device, encoder, *shape) == GPU
        on_cpu = (device, *shape) == CPU and encoder in CPU_ENCODERS
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
        for task in workload.tasks:
            if (less := f"joint without {task}") in times and f"joint, {first}" in times:
                share = 1 - ratio(times[less], times[f"joint, {first}"])
                yield Row(f"share of {task} in the step ({first})", 100 * share, "%")


def _without_mode(name: str) -> str:
    return re.sub(", (eager|compiled|cuda_graph)", "", name)


def _with_boxes(mode: Mode, count: int) -> str:
    return f"joint, {mode}, boxes: {count}"


def _without(workload: Workload, mode: Mode, task: str, batch: Batch) -> Work:
    """The joint step of the other tasks."""
    others = [name for name in workload.tasks if name != task]
    less = replace(
        batch,
        targets={name: batch.targets[name] for name in others},
        labelled={name: batch.labelled[name] for name in others},
        counts={name: batch.counts[name] for name in others},
    )
    return joint_step(workload.trainer(others, mode=mode), less)
