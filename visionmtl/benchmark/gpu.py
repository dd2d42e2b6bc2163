"""All measurements on a GPU in one go, within a budget of minutes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from visionmtl.benchmark.figures import Figure, Note, Row
from visionmtl.benchmark.infer import measure_predictions
from visionmtl.benchmark.measure import WARM_UP, Budget, Timing
from visionmtl.benchmark.step import Step
from visionmtl.benchmark.workload import Workload, joint_step

WAITS_S, INFER_S = 15.0, 40.0
"""About what these take; nothing is begun that would not end in time."""


def measure_gpu(
    workload: Workload,
    timing: Timing,
    budget_s: float,
    compare_boxes: Sequence[int] = (1, 100),
    infer_batches: Sequence[int] = (1, 8, 32),
) -> Iterator[Figure]:
    """Host waits, the fastest step beside its peers, predictions, then all other steps. What does not fit is named."""
    start, budget, on_gpu = time.monotonic(), Budget(budget_s), workload.on.type == "cuda"
    if not on_gpu:
        yield Note(f"SKIPPED: host waits, compiled steps, CUDA graphs; {workload.on} is not a CUDA device")
    elif budget.fits(WAITS_S):
        yield from _host_waits(workload)
    else:
        yield budget.skipped("host waits", WAITS_S)

    if on_gpu:
        yield from Step(workload, timing, ("cuda_graph", "eager"), peers=True, budget=budget).measure()
    else:
        yield from Step(workload, timing, ("eager",), True, True, compare_boxes, budget).measure()
    if budget.fits(INFER_S):
        yield from measure_predictions(workload, replace(timing, rounds=4 * timing.rounds), infer_batches)
    else:
        yield budget.skipped("predictions", INFER_S)
    if on_gpu:
        yield from Step(workload, timing, ("eager", "compiled"), True, False, compare_boxes, budget).measure()
    yield Row("all of this took", time.monotonic() - start, "s", budget_s)


def _host_waits(workload: Workload) -> Iterator[Figure]:
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
