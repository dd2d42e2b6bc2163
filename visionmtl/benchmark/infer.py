"""What predictions cost: latency and images a second, joint and task by task, with suppression and without."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from visionmtl.benchmark.figures import Figure, Note, Row, Table
from visionmtl.benchmark.measure import Timing, Work, alternate, quartiles, ratio
from visionmtl.benchmark.workload import TASKS, Workload
from visionmtl.network import MultiTaskNet
from visionmtl.structures import ImageMeta
from visionmtl.tasks.detection import Detection

RAW, UNSUPPRESSED, PREDICTIONS = "raw outputs", "without suppression", "predictions"


@dataclass
class Infer:
    """One network for all tasks, and beside it one for each, from images in memory to predictions in user units."""

    workload: Workload  # its batch does nothing here
    timing: Timing  # of images a second at most 5 of its rounds; of latency one call a round
    batches: Sequence[int]  # tried for images a second

    def measure(self) -> Iterator[Figure]:
        """Latency at batch 1, images a second at each of `batches`, and what is behind the networks."""
        device = self.workload.on
        self.timing.check(device)
        nets = {"joint": self.workload.net().eval()} | {task: self.workload.net([task]).eval() for task in TASKS}
        yield Note(
            f"Predictions with random weights on {self.workload.text}; from uint8 images in memory to arrays at their "
            f"size. Clock: {self.timing.clock}."
        )

        works = {f"{name}|{until}": work for name, net in nets.items() for until, work in self._works(net, 1).items()}
        times = alternate(works, device, replace(self.timing, seconds=1e-3))
        rows: list[tuple[str | float | None, ...]] = [
            (*name.split("|"), quartiles(of_one)[1], float(np.percentile(of_one, 95)), 1e3 / quartiles(of_one)[1])
            for name, of_one in times.items()
        ]
        yield Table("Latency, batch 1", ("network", "until", "median ms", "95th percentile ms", "1/s"), rows)
        joint, *singles = (times[f"{name}|{PREDICTIONS}"] for name in nets)
        yield Row("joint / sum of one network a task, latency", ratio(joint, *singles), "")

        few = replace(self.timing, rounds=min(self.timing.rounds, 5))
        speeds = {}
        for batch in self.batches:
            of_batch = alternate(self._works(nets["joint"], batch), device, few)
            speeds[batch] = {until: batch * 1e3 / quartiles(of_one)[1] for until, of_one in of_batch.items()}
        untils = (RAW, UNSUPPRESSED, PREDICTIONS)
        rows = [(str(batch), *(of_batch[until] for until in untils)) for batch, of_batch in speeds.items()]
        yield Table("Images a second, joint", ("batch", *untils), rows)
        for until in untils:
            best = max(speeds, key=lambda batch: speeds[batch][until])
            yield Row(f"best throughput, {until}, batch {best}", speeds[best][until], "images/s")

    def _works(self, net: MultiTaskNet, batch: int) -> dict[str, Work]:
        workload = replace(self.workload, batch=batch)
        images = np.stack([sample.image for sample in workload.samples()])
        image = workload.pinned(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        metas = [ImageMeta(workload.size, workload.size)] * batch
        device, autocast = workload.on, workload.autocast()

        @torch.inference_mode()
        def raw() -> dict[str, object]:
            there = image.to(device, non_blocking=True)
            with autocast():
                return net(there)

        @torch.inference_mode()
        def predictions(suppress: bool = True) -> list[object]:
            outputs = raw()
            return [
                task.head.decode(outputs[name])  # type: ignore[arg-type]
                if isinstance(task, Detection) and not suppress
                else task.predict(outputs[name], metas, workload.size)
                for name, task in net.tasks.items()
            ]

        boxes = any(isinstance(task, Detection) for task in net.tasks.values())
        unsuppressed: dict[str, Work] = {UNSUPPRESSED: lambda: predictions(suppress=False)} if boxes else {}
        return {RAW: raw, **unsuppressed, PREDICTIONS: predictions}
