"""What a training step costs: the encoder alone, the joint step and its parts, and the networks it replaces."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import Self

from visionmtl.benchmark.base import Figure, Note, Row, Table
from visionmtl.benchmark.measure import Budget, Clock, Work, alternate, check_clock, quartiles, ratio
from visionmtl.benchmark.peers import THREE, peers
from visionmtl.benchmark.workload import TASKS, Mode, Workload
from visionmtl.benchmark.works import Built, build, encoder_step, joint_step, matrix_product
from visionmtl.config.registry import Spec
from visionmtl.engine.state import RunState
from visionmtl.structures import Batch

COMPILE_S = {"encoder": 60.0, "joint": 150.0, "peer": 60.0}
"""What compiling took on the slowest hosts seen; corrected by what it takes here."""
BUILD_S = 3.0
RESERVE_S = 5.0
"""For what no estimate sees: the matrix product, and steps that come out slower than their first call."""

# on (device, encoder, batch, size): the most that a joint step may be
GPU, CPU = ("cuda", "resnet50", 16, (512, 512)), ("cpu", 2, (256, 256))
CPU_ENCODERS = ("resnet50", "mobilenetv3_large_100")


class Step(Spec):
    """Which steps are timed. Everything named is built and warmed first, then timed in turns."""

    workload: Workload = Workload()
    modes: tuple[Mode, ...] = Field(("eager",), min_length=1)
    without: bool = Field(False, description="the joint step without each task in turn, too")
    compare_boxes: tuple[int, ...] = Field((), description="the joint step with exactly so many boxes in every image")
    peers: bool = Field(False, description="single-task networks that a joint one replaces")
    rounds: int = Field(7, ge=1)
    seconds: float = Field(0.25, gt=0, description="a work's turn in each round; one step at least")
    clock: Clock = "wall"

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if len(self.compare_boxes) == 1:
            raise ValueError(
                f"compare_boxes is {self.compare_boxes[0]} alone; two numbers or more are compared; add another, "
                "or use boxes for the number of the whole benchmark"
            )
        if "cuda_graph" in self.modes and self.workload.on.type != "cuda":
            raise ValueError(
                f"modes name cuda_graph, and the device is {self.workload.on}; only CUDA devices record such graphs; "
                "leave it out"
            )
        check_clock(self.clock, self.workload.on)
        return self

    def measure(self, budget: Budget | None = None) -> Iterator[Figure]:
        """Notes while it builds, a table of all steps, and the ratios between them, with limits where known."""
        return _Measurement(self, budget or Budget(None)).figures()


@dataclass
class _Measurement:
    spec: Step
    budget: Budget
    built: dict[str, Built] = field(default_factory=dict)
    slowness: float | None = None  # of compiling on this host; None: nothing was compiled yet

    def figures(self) -> Iterator[Figure]:
        workload, spec = self.spec.workload, self.spec
        yield Note(_description(workload, spec.clock))
        product, flops_of_product = matrix_product(workload)
        samples = workload.samples()
        batch = workload.batch_of(samples)

        states = {mode: _Later(workload, mode) for mode in spec.modes}
        for mode, state in states.items():
            yield from self._add(f"encoder alone, {mode}", partial(encoder_step, workload, mode), mode, "encoder")
            yield from self._add(f"joint, {mode}", _joint_on(state, batch), mode, "joint")
            if mode == spec.modes[0] and spec.peers:
                for name, make in peers(workload, samples).items():
                    yield from self._add(name, make, "eager", "peer")
        for mode, state in states.items():
            for count in spec.compare_boxes if mode != "cuda_graph" and f"joint, {mode}" in self.built else ():
                exact = workload.batch_of(workload.samples(count))
                yield from self._add(_with_boxes(mode, count), _joint_on(state, exact), mode, "joint")
        if spec.without:
            for task in TASKS:
                yield from self._add(f"joint without {task}", self._without(task, batch), spec.modes[0], "joint")
        if spec.peers and "compiled" in spec.modes:
            for name, make in peers(workload, samples, compiled=True).items():
                yield from self._add(f"{name}, compiled", make, "compiled", "peer")

        works: dict[str, Work] = {"matrix product": product} | {name: one.work for name, one in self.built.items()}
        times = alternate(works, workload.on, spec.rounds, spec.seconds, spec.clock)
        gflops_peak = flops_of_product / (min(times.pop("matrix product")) * 1e6)  # a peak is the best of all rounds
        if self.built:
            yield self._table(times, gflops_peak)
        yield Row("matrix peak", gflops_peak, "GFLOP/s")
        yield from self._ratios(times)
        if "joint, eager" in times:
            for mode in ("compiled", "cuda_graph"):
                if (name := f"joint, {mode}") in times:
                    medians = quartiles(times["joint, eager"])[1], quartiles(times[name])[1]
                    yield Note(what_compiling_gives(mode, self.built[name].seconds, *medians))

    def _add(self, name: str, make: Callable[[], Work], mode: Mode, kind: str) -> Iterator[Note]:
        """Build one more, if it fits into the time that the measurement itself leaves."""
        needed = BUILD_S if mode == "eager" else COMPILE_S[kind] * (self.slowness or 1)
        calls = [one.call_s for one in self.built.values()]
        turns = RESERVE_S + (self.spec.rounds + 3) * sum(
            max(self.spec.seconds, one) for one in (*calls, max(calls, default=0))
        )
        if not self.budget.fits(needed + turns):
            yield Note(
                f"SKIPPED: {name}; it needs about {needed:.0f} s, the timing {turns:.0f} s, and "
                f"{max(self.budget.left_s, 0):.0f} s are left"
            )
            return
        one = build(make, self.spec.workload.on, count=mode == "eager")
        self.built[name] = one
        if mode != "eager":
            self.slowness = max(self.slowness or 0.5, one.seconds / COMPILE_S[kind])
        yield Note(f"ready: {name}, after {one.seconds:.1f} s")

    def _without(self, task: str, batch: Batch) -> Callable[[], Work]:
        others = [name for name in TASKS if name != task]
        workload, mode = self.spec.workload, self.spec.modes[0]

        def make() -> Work:
            of_others = {name: batch.targets[name] for name in others}
            labelled = {name: batch.labelled[name] for name in others}
            less = Batch(image=batch.image, targets=of_others, labelled=labelled, colour=batch.colour)
            return joint_step(workload.state(others, mode=mode), less)

        return make

    def _table(self, times: dict[str, list[float]], gflops_peak: float) -> Table:
        rows = []
        for name, of_one in times.items():
            low, middle, high = quartiles(of_one)
            flops = self._flops(name)
            images = self.spec.workload.batch * 1e3 / middle
            gflop = None if flops is None else flops / 1e9
            share = None if gflop is None else 100 * gflop / (middle / 1e3 * gflops_peak)
            shared = "boxes" in name  # the weights were counted with the step that it shares them with
            peak_mib = None if shared else self.built[name].peak_mib
            rows.append((name, middle, f"{low:.4g} to {high:.4g}", images, peak_mib, gflop, share))
        columns = ("step", "ms", "quartiles", "images/s", "peak MiB", "GFLOP", "% of matrix peak")
        return Table("Training steps", columns, tuple(rows))

    def _flops(self, name: str) -> float | None:
        """Compiling does not change what is computed, so the eager step tells."""
        for mode in ("compiled", "cuda_graph"):
            eager = self.built.get(name.replace(mode, "eager")) or self.built.get(name.replace(f", {mode}", ""))
            if mode in name and eager:
                return eager.flops
        return self.built[name].flops

    def _ratios(self, times: dict[str, list[float]]) -> Iterator[Row]:
        workload, first = self.spec.workload, self.spec.modes[0]
        key = (workload.on.type, workload.encoder, workload.batch, workload.size)
        on_gpu = key == GPU
        on_cpu = (key[0], *key[2:]) == CPU and workload.encoder in CPU_ENCODERS
        joint = [name for name in (f"joint, {mode}" for mode in self.spec.modes) if name in times]
        if not joint:
            return
        best = min(joint, key=lambda name: float(np.median(times[name])))
        yield Row(f"step ({best})", quartiles(times[best])[1], "ms", 26 if on_gpu else None)
        if (peak_mib := self.built[best].peak_mib) is not None:
            yield Row(f"peak memory ({best})", peak_mib / 1024, "GiB", 5 if on_gpu else None)
        for mode in reversed(self.spec.modes):
            if (alone := f"encoder alone, {mode}") in times:
                limit = 1.8 if on_gpu and mode == "compiled" and best != "joint, compiled" else None
                yield Row(f"{best} / {alone}", ratio(times[best], times[alone]), "", limit)

        if all(name in times for name in THREE):
            together = ratio(times[best], *(times[name] for name in THREE))
            yield Row(f"{best} / sum of the three peers", together, "", 0.45 if on_cpu else None)
            yield Row(f"sum of the three peers / {best}", 1 / together, "", least=4.9 if on_gpu else None)
        for mode in self.spec.modes:
            counts = [count for count in self.spec.compare_boxes if _with_boxes(mode, count) in times]
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


class _Later:
    """A state that is made when its first step is built, so that its memory counts as that step's."""

    def __init__(self, workload: Workload, mode: Mode) -> None:
        self._make = lambda: workload.state(mode=mode)
        self._state: RunState | None = None

    def state(self) -> RunState:
        """The same at each call."""
        self._state = self._state or self._make()
        return self._state


def _with_boxes(mode: Mode, count: int) -> str:
    return f"joint, {mode}, boxes: {count}"


def _joint_on(state: _Later, batch: Batch) -> Callable[[], Work]:
    return lambda: joint_step(state.state(), batch)


def _description(workload: Workload, clock: Clock) -> str:
    height, width = workload.size
    precision = str(workload.cast_to).removeprefix("torch.")
    where = "pinned, and copied to the device in every step" if workload.on.type == "cuda" else "in memory"
    return (
        f"Whole training steps on {workload.on}: {workload.encoder}, batch {workload.batch} of {height}x{width}, "
        f"{workload.boxes} boxes an image on average, {precision}. Labelled images are {where}. "
        f"Medians over rounds in alternation; ratios are medians of the rounds' ratios. Clock: {clock}."
    )
