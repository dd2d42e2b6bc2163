"""What evaluation costs by stage: the network, each task's predictions, each task's meter, and the final numbers."""

import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from pydantic import Field

from visionmtl.benchmark.base import Figure, Note, Row, Table
from visionmtl.benchmark.workload import SPACES, TASKS, Workload
from visionmtl.config.registry import Spec
from visionmtl.structures import ImageMeta


class Evaluation(Spec):
    """Random images through the stages of `visionmtl.engine.evaluator`; reading files is not part of it."""

    workload: Workload = Workload()
    batches: int = Field(4, ge=1, description="of different images, after one that warms up")

    def measure(self) -> Iterator[Figure]:
        """Milliseconds an image by stage, and images a second of all of them."""
        workload = self.workload
        net = workload.net().eval()
        meters = {name: task.meter(SPACES[name]) for name, task in net.tasks.items()}
        spent: dict[str, float] = defaultdict(float)
        yield Note(
            f"Evaluation on {workload.on}: {workload.encoder} with random weights, {self.batches} batches of "
            f"{workload.batch} at {workload.size[0]}x{workload.size[1]}, about {workload.boxes} boxes an image."
        )

        for number in range(self.batches + 1):
            samples = workload.samples(seed=number)
            image = workload.batch_of(samples).image
            metas = [ImageMeta(workload.size, workload.size)] * workload.batch
            clock = _Stages(workload.on)
            with torch.inference_mode():
                with workload.autocast()():
                    raw = net(image.to(workload.on, non_blocking=True))
                clock.ends("network")
                for name, task in net.tasks.items():
                    predictions = task.predict_for_meter(raw[name], metas, workload.size)
                    clock.ends(f"predict {name}")
                    for prediction, sample in zip(predictions, samples, strict=True):
                        meters[name].update(prediction, sample)
                    clock.ends(f"measure {name}")
            if number:  # the first batch warms up
                for stage, seconds in clock.seconds.items():
                    spent[stage] += seconds

        clock = _Stages(workload.on)
        for name in TASKS:
            meters[name].compute()
            clock.ends(f"final numbers, {name}")
        images = self.batches * workload.batch
        whole = sum(spent.values())
        rows = [(stage, 1e3 * seconds / images, 100 * seconds / whole) for stage, seconds in spent.items()]
        yield Table("Evaluation by stage", ("stage", "ms an image", "% of the time"), tuple(rows))
        yield Row("evaluation", images / whole, "images/s")
        for stage, seconds in clock.seconds.items():
            yield Row(f"{stage}, {images + workload.batch} images", seconds * 1e3, "ms")


class _Stages:
    """Wall seconds between one `ends` and the next, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def ends(self, stage: str) -> None:
        """A stage ends here."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
