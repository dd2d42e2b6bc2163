"""Everything that a GPU can be asked about this project, in one go and within a budget of minutes."""

import time
from collections.abc import Iterator

import torch
from pydantic import Field

from visionmtl.benchmark.base import Figure, Note, Row
from visionmtl.benchmark.infer import Infer
from visionmtl.benchmark.measure import Budget
from visionmtl.benchmark.step import Step
from visionmtl.benchmark.workload import Workload
from visionmtl.benchmark.works import WARM_UP
from visionmtl.config.registry import Spec

WAITS_S, INFER_S = 15.0, 40.0
"""About what these take, so that nothing is begun that would not end in time."""


class Gpu(Spec):
    """Host waits, the fastest step beside its peers, predictions, and then all the other steps."""

    workload: Workload = Workload()
    compare_boxes: tuple[int, ...] = (1, 100)
    budget_s: float = Field(480, gt=0, description="what does not fit is skipped, and named")
    infer_batches: tuple[int, ...] = (1, 8, 32)
    rounds: int = Field(7, ge=1)
    seconds: float = Field(0.25, gt=0)

    def measure(self) -> Iterator[Figure]:
        """The figures of `step` and `infer`, with a row for host waits and one for the time it all took."""
        start, budget, on_gpu = time.monotonic(), Budget(self.budget_s), self.workload.on.type == "cuda"
        step = Step(workload=self.workload, peers=True, rounds=self.rounds, seconds=self.seconds)
        further = {"compare_boxes": self.compare_boxes, "without": True}
        if not on_gpu:
            yield Note(f"SKIPPED: host waits, compiled steps, CUDA graphs; {self.workload.on} is not a CUDA device")
            yield from step.model_copy(update=further).measure(budget)
        elif budget.fits(WAITS_S):
            yield from _waits(self.workload)
            yield from step.model_copy(update={"modes": ("cuda_graph", "eager")}).measure(budget)
        else:
            yield Note(f"SKIPPED: host waits; they need about {WAITS_S:.0f} s of the budget of {self.budget_s:g} s")

        if budget.fits(INFER_S):
            infer = Infer(
                workload=self.workload, batches=self.infer_batches, rounds=4 * self.rounds, seconds=self.seconds
            )
            yield from infer.measure()
        else:
            yield Note(f"SKIPPED: predictions; they need about {INFER_S:.0f} s, {budget.left_s:.0f} s are left")
        if on_gpu:
            others = {"modes": ("eager", "compiled"), "peers": False, **further}
            yield from step.model_copy(update=others).measure(budget)
        yield Row("all of this took", time.monotonic() - start, "s", self.budget_s)


def _waits(workload: Workload) -> Iterator[Figure]:
    """One warmed step during which the driver raises an error as soon as the host waits for the device."""
    state, batch = workload.state(), workload.batch_of(workload.samples())
    for _ in range(WARM_UP):
        state.advance([batch])
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.advance([batch])
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        yield Note(f"The host waits in a warmed step: {str(error).splitlines()[0]}")
        waits = 1.0
    else:
        waits = 0.0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield Row("host waits in a warmed step (0: none, 1: at least one)", waits, "", 0)
