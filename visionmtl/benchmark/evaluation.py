"""What evaluation costs by stage: the network, each task's predictions, each task's meter, and the final numbers."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch

from visionmtl.benchmark.figures import Figure, Note, Row, Table
from visionmtl.benchmark.workload import SPACES, TASKS, Workload
from visionmtl.structures import ImageMeta


def measure_evaluation(workload: Workload, batches: int) -> Iterator[Figure]:
    """Random images through the stages of `visionmtl.engine.evaluator`; reading files is not part of it."""
    net = workload.net().eval()
    meters = {name: task.meter(SPACES[name]) for name, task in net.tasks.items()}
    metas = [ImageMeta(workload.size, workload.size)] * workload.batch
    seconds: dict[str, float] = defaultdict(float)
    yield Note(
        f"Evaluation with random weights on {workload.text}; {batches} batches of {workload.batch}, about "
        f"{workload.boxes} boxes an image."
    )

    for number in range(batches + 1):
        samples = workload.samples(seed=number)
        image = workload.batch_of(samples).image
        ends = _stopwatch(workload.on, seconds)
        with torch.inference_mode():
            with workload.autocast()():
                raw = net(image.to(workload.on, non_blocking=True))
            ends("network")
            for name, task in net.tasks.items():
                predictions = task.predict_for_meter(raw[name], metas, workload.size)
                ends(f"predict {name}")
                for prediction, sample in zip(predictions, samples, strict=True):
                    meters[name].update(prediction, sample)
                ends(f"measure {name}")
        if not number:  # the first batch warms up
            seconds.clear()

    images, whole = batches * workload.batch, sum(seconds.values())
    rows = [(stage, 1e3 * of_one / images, 100 * of_one / whole) for stage, of_one in seconds.items()]
    yield Table("Evaluation by stage", ("stage", "ms an image", "% of the time"), rows)
    yield Row("evaluation", images / whole, "images/s")
    seconds.clear()
    ends = _stopwatch(workload.on, seconds)
    for name in TASKS:
        meters[name].compute()
        ends(f"final numbers, {name}")
    for stage, of_one in seconds.items():
        yield Row(f"{stage}, {images + workload.batch} images", of_one * 1e3, "ms")


def _stopwatch(device: torch.device, seconds: dict[str, float]) -> Callable[[str], None]:
    """What adds the wall time since its last call to a stage, the device's work included."""
    last = time.perf_counter()

    def ends(stage: str) -> None:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        seconds[stage] += now - last
        last = now

    return ends
