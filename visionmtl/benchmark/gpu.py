"""Everything that a GPU can be asked about this project, in one go and within a budget of minutes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from visionmtl.benchmark.figures import Figure, Note, Row
from visionmtl.benchmark.infer import Infer
from visionmtl.benchmark.measure import WARM_UP, Budget, Timing
from visionmtl.benchmark.step import Step
from visionmtl.benchmark.workload import Mode, Workload, joint_step

WAITS_S, INFER_S = 15.0, 40.0
"""About what these take, so that nothing is begun that would not end in time."""


@dataclass
class Gpu:
    """Host waits, predictions and all training steps: first what is short, then in the order in which it matters."""

    workload: Workload
    timing: Timing
    budget_s: float  # what does not fit is skipped, and named
    compare_boxes: Sequence[int] = (1, 100)
    infer_batches: Sequence[int] = (1, 8, 32)

    def measure(self) -> Iterator[Figure]:
        """The figures of `infer` and `step`, with a row for host waits and one for the time it all took."""
        start, budget, on_gpu = time.monotonic(), Budget(self.budget_s), self.workload.on.type == "cuda"
        modes: tuple[Mode, ...] = ("eager", "compiled", "cuda_graph") if on_gpu else ("eager",)
        if not on_gpu:
            yield Note(f"SKIPPED: host waits, compiled steps, CUDA graphs; {self.workload.on} is not a CUDA device")
        elif budget.fits(WAITS_S):
            yield from _waits(self.workload)
        else:
            yield Note(f"SKIPPED: host waits; they need about {WAITS_S:.0f} s of the budget of {self.budget_s:g} s")

        if budget.fits(INFER_S):
            often = replace(self.timing, rounds=4 * self.timing.rounds)
            yield from Infer(self.workload, often, self.infer_batches).measure()
        else:
            yield Note(f"SKIPPED: predictions; they need about {INFER_S:.0f} s, {budget.left_s:.0f} s are left")
        step = Step(
            self.workload, self.timing, modes, without=True, peers=True, compare_boxes=self.compare_boxes, budget=budget
        )
        yield from step.measure()
        yield Row("all of this took", time.monotonic() - start, "s", self.budget_s)


def _waits(workload: Workload) -> Iterator[Figure]:
    """One warmed step during which the driver raises an error as soon as the host waits for the device."""
    step = joint_step(workload.trainer(), workload.batch_of(workload.samples()))
    for _ in range(WARM_UP):
        step()
    torch.cuda.set_sync_debug_mode("error")
    waits = 0.0
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        yield Note(f"The host waits in a warmed step: {str(error).splitlines()[0]}")
        waits = 1.0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield Row("host waits in a warmed step (0: none, 1: at least one)", waits, "", 0)
