"""What a training step costs: the encoder alone, the joint step and its parts, and the networks it replaces."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from visionmtl.benchmark.figures import Figure, Note, Row, Table
from visionmtl.benchmark.measure import Budget, Built, Timing, Work, alternate, build, quartiles, ratio
from visionmtl.benchmark.peers import THREE, peers
from visionmtl.benchmark.workload import TASKS, Mode, Workload, encoder_step, joint_step, matrix_product
from visionmtl.engine.trainer import Trainer
from visionmtl.structures import Batch

COMPILE_S = {"encoder": 50.0, "joint": 75.0, "peer": 45.0}
"""What compiling took on the slowest hosts seen; corrected by what the first one takes here."""
BUILD_S = 3.0

# on (device, encoder, batch, size): the most that a joint step may be
GPU, CPU = ("cuda", "resnet50", 16, (512, 512)), ("cpu", 2, (256, 256))
CPU_ENCODERS = ("resnet50", "mobilenetv3_large_100")


@dataclass
class Step:
    """Which steps are timed. Everything named is built and warmed first, then timed in turns."""

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
        yield Note(
            f"Whole training steps on {workload.text}, batch {workload.batch}, {workload.boxes} boxes an image on "
            "average; labelled images are "
            f"{'pinned, and copied to the device in every step' if workload.on.type == 'cuda' else 'in memory'}. "
            "Medians over rounds in alternation; ratios are medians of the rounds' ratios. "
            f"Clock: {self.timing.clock}."
        )
        product, flops_of_product = matrix_product(workload)
        yield from self._build_all()
        works: dict[str, Work] = {"matrix product": product} | {name: one.work for name, one in self.built.items()}
        times = alternate(works, workload.on, self.timing)
        gflops_peak = flops_of_product / (min(times.pop("matrix product")) * 1e6)  # a peak is the best of all rounds
        if self.built:
            yield self._table(times, gflops_peak)
        yield Row("matrix peak", gflops_peak, "GFLOP/s")
        yield from self._ratios(times)
        for mode in ("compiled", "cuda_graph"):
            if "joint, eager" in times and (name := f"joint, {mode}") in times:
                medians = quartiles(times["joint, eager"])[1], quartiles(times[name])[1]
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
        """In the order in which it matters: what does not fit into the budget is skipped."""
        workload, samples = self.workload, self.workload.samples()
        batch, first = workload.batch_of(samples), self.modes[0]
        trainers = {mode: _Later(workload, mode) for mode in self.modes}
        for mode, trainer in trainers.items():
            yield from self._add(f"encoder alone, {mode}", partial(encoder_step, workload, mode), mode, "encoder")
            yield from self._add(f"joint, {mode}", trainer.step_on(batch), mode, "joint")
            if mode == first and self.peers:
                for name, make in peers(workload, samples).items():
                    yield from self._add(name, make, "eager", "peer")
        for mode, trainer in trainers.items():
            for count in self.compare_boxes if mode != "cuda_graph" and f"joint, {mode}" in self.built else ():
                exact = workload.batch_of(workload.samples(count))
                yield from self._add(_with_boxes(mode, count), trainer.step_on(exact), mode, "joint")
        for task in TASKS if self.without else ():
            yield from self._add(
                f"joint without {task}", partial(_without, workload, first, task, batch), first, "joint"
            )
        if self.peers and "compiled" in self.modes:
            for name, make in peers(workload, samples, compiled=True).items():
                yield from self._add(f"{name}, compiled", make, "compiled", "peer")

    def _add(self, name: str, make: Callable[[], Work], mode: Mode, kind: str) -> Iterator[Note]:
        """Build one more, if it fits into the time that the measurement itself leaves."""
        needed = BUILD_S if mode == "eager" else COMPILE_S[kind] * (self.slowness or 1)
        calls = [one.call_s for one in self.built.values()]
        turns = (self.timing.rounds + 2) * sum(
            max(self.timing.seconds, call_s) for call_s in (*calls, max(calls, default=0))
        )
        if not self.budget.fits(needed + turns):
            yield Note(
                f"SKIPPED: {name}; it needs about {needed:.0f} s, the timing {turns:.0f} s, and "
                f"{max(self.budget.left_s, 0):.0f} s are left"
            )
            return
        built = build(make, self.workload.on, count=mode == "eager")
        self.built[name] = built
        if mode != "eager" and self.slowness is None:
            self.slowness = max(0.5, built.seconds / COMPILE_S[kind])
        yield Note(f"ready: {name}, after {built.seconds:.1f} s")

    def _table(self, times: dict[str, list[float]], gflops_peak: float) -> Table:
        rows: list[tuple[str | float | None, ...]] = []
        for name, of_one in times.items():
            low, middle, high = quartiles(of_one)
            flops = self._flops(name)
            gflop = None if flops is None else flops / 1e9
            share = None if gflop is None else 100 * gflop / (middle / 1e3 * gflops_peak)
            shared = "boxes" in name  # the weights were counted with the step that it shares them with
            peak_mib = None if shared else self.built[name].peak_mib
            images = self.workload.batch * 1e3 / middle
            rows.append((name, middle, f"{low:.4g} to {high:.4g}", images, peak_mib, gflop, share))
        columns = ("step", "ms", "quartiles", "images/s", "peak MiB", "GFLOP", "% of matrix peak")
        return Table("Training steps", columns, rows)

    def _flops(self, name: str) -> float | None:
        """Compiling does not change what is computed, so the eager step tells."""
        for mode in ("compiled", "cuda_graph"):
            eager = self.built.get(name.replace(mode, "eager")) or self.built.get(name.replace(f", {mode}", ""))
            if mode in name and eager:
                return eager.flops
        return self.built[name].flops

    def _ratios(self, times: dict[str, list[float]]) -> Iterator[Row]:
        workload, first = self.workload, self.modes[0]
        key = (workload.on.type, workload.encoder, workload.batch, workload.size)
        on_gpu = key == GPU
        on_cpu = (key[0], *key[2:]) == CPU and workload.encoder in CPU_ENCODERS
        joint = [name for name in (f"joint, {mode}" for mode in self.modes) if name in times]
        if not joint:
            return
        best = min(joint, key=lambda name: float(np.median(times[name])))
        yield Row(f"step ({best})", quartiles(times[best])[1], "ms", 26 if on_gpu else None)
        if (peak_mib := self.built[best].peak_mib) is not None:
            yield Row(f"peak memory ({best})", peak_mib / 1024, "GiB", 5 if on_gpu else None)
        for mode in reversed(self.modes):
            if (alone := f"encoder alone, {mode}") in times:
                limit = 1.8 if on_gpu and mode == "compiled" else None
                yield Row(f"{best} / {alone}", ratio(times[best], times[alone]), "", limit)

        if all(name in times for name in THREE):
            together = ratio(times[best], *(times[name] for name in THREE))
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


class _Later:
    """A trainer that is made when its first step is built, so that its memory counts as that step's."""

    def __init__(self, workload: Workload, mode: Mode) -> None:
        self._make = partial(workload.trainer, mode=mode)
        self._trainer: Trainer | None = None

    def step_on(self, batch: Batch) -> Callable[[], Work]:
        """What makes the step; every step of this object trains the same network."""

        def make() -> Work:
            self._trainer = self._trainer or self._make()
            return joint_step(self._trainer, batch)

        return make


def _with_boxes(mode: Mode, count: int) -> str:
    return f"joint, {mode}, boxes: {count}"


def _without(workload: Workload, mode: Mode, task: str, batch: Batch) -> Work:
    """The joint step of the other tasks."""
    others = [name for name in TASKS if name != task]
    less = replace(
        batch,
        targets={name: batch.targets[name] for name in others},
        labelled={name: batch.labelled[name] for name in others},
        counts={name: batch.counts[name] for name in others},
    )
    return joint_step(workload.trainer(others, mode=mode), less)
