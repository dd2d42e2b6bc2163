"""What predictions cost: latency and images a second, joint and task by task, with suppression and without."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from pydantic import Field

from visionmtl.benchmark.base import Figure, Note, Row, Table
from visionmtl.benchmark.measure import Clock, Work, alternate, check_clock, quartiles, ratio
from visionmtl.benchmark.workload import TASKS, Workload
from visionmtl.config.registry import Spec
from visionmtl.network import MultiTaskNet
from visionmtl.structures import ImageMeta
from visionmtl.tasks.detection import Detection

RAW, UNSUPPRESSED, PREDICTIONS = "raw outputs", "without suppression", "predictions"


class Infer(Spec):
    """One network for all tasks, and beside it one for each, from images in memory to predictions in user units."""

    workload: Workload = Workload(batch=1)
    """Its batch does nothing here; `batches` are tried."""
    batches: tuple[int, ...] = Field((1, 8, 32), min_length=1, description="tried for images a second")
    rounds: int = Field(40, ge=1, description="calls of which latency is the median and the 95th percentile")
    seconds: float = Field(0.25, gt=0, description="a turn of each in the rounds for images a second")
    clock: Clock = "wall"

    def measure(self) -> Iterator[Figure]:
        """Latency at batch 1, images a second at each of `batches`, and what is behind the networks."""
        check_clock(self.clock, self.workload.on)
        nets = {"joint": self.workload.net().eval()}
        nets |= {task: self.workload.net([task]).eval() for task in TASKS}
        yield Note(
            f"Predictions on {self.workload.on}, {self.workload.encoder} with random weights, "
            f"{self.workload.size[0]}x{self.workload.size[1]}, {str(self.workload.cast_to).removeprefix('torch.')}; "
            f"from uint8 images in memory to arrays at their size. Clock: {self.clock}."
        )

        works = {(name, until): work for name, net in nets.items() for until, work in self._works(net, 1).items()}
        times = self._times(works, self.rounds, 1e-3)
        rows: list[tuple[str | float | None, ...]] = [
            (*key, quartiles(of_one)[1], float(np.percentile(of_one, 95)), 1e3 / quartiles(of_one)[1])
            for key, of_one in times.items()
        ]
        yield Table("Latency, batch 1", ("network", "until", "median ms", "95th percentile ms", "1/s"), tuple(rows))
        singles = [times[task, PREDICTIONS] for task in TASKS]
        yield Row("joint / sum of one network a task, latency", ratio(times["joint", PREDICTIONS], *singles), "")

        found: dict[tuple[int, str], float] = {}
        for batch in self.batches:
            of_batch = {(str(batch), until): work for until, work in self._works(nets["joint"], batch).items()}
            for (_, until), of_one in self._times(of_batch, min(self.rounds, 5), self.seconds).items():
                found[batch, until] = batch * 1e3 / quartiles(of_one)[1]
        untils = tuple(dict.fromkeys(until for _, until in found))
        table: tuple[tuple[str | float | None, ...], ...] = tuple(
            (str(batch), *(found[batch, until] for until in untils)) for batch in self.batches
        )
        yield Table("Images a second, joint", ("batch", *untils), table)
        for until in untils:
            best = max(self.batches, key=lambda batch: found[batch, until])
            yield Row(f"best throughput, {until}, batch {best}", found[best, until], "images/s")

    def _times(
        self, works: dict[tuple[str, str], Work], rounds: int, seconds: float
    ) -> dict[tuple[str, str], list[float]]:
        named = {"|".join(key): work for key, work in works.items()}
        times = alternate(named, self.workload.on, rounds, seconds, self.clock)
        return {key: times["|".join(key)] for key in works}

    def _works(self, net: MultiTaskNet, batch: int) -> dict[str, Work]:
        workload = self.workload
        images = np.stack([one.image for one in workload.model_copy(update={"batch": batch}).samples()])
        image = workload.pinned(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        metas = [ImageMeta(workload.size, workload.size)] * batch
        device, autocast = workload.on, workload.autocast()

        @torch.inference_mode()
        def raw() -> dict[str, object]:
            there = image.to(device, non_blocking=True)
            with autocast():
                return net(there)

        works: dict[str, Work] = {RAW: raw}
        if any(isinstance(task, Detection) for task in net.tasks.values()):
            works[UNSUPPRESSED] = lambda: _predictions(net, raw, metas, workload.size, suppress=False)
        works[PREDICTIONS] = lambda: _predictions(net, raw, metas, workload.size, suppress=True)
        return works


@torch.inference_mode()
def _predictions(
    net: MultiTaskNet,
    raw: Callable[[], dict[str, object]],
    metas: Sequence[ImageMeta],
    size: tuple[int, int],
    suppress: bool,
) -> list[object]:
    outputs = raw()
    return [
        task.head.decode(outputs[name])  # type: ignore[arg-type]
        if isinstance(task, Detection) and not suppress
        else task.predict(outputs[name], metas, size)
        for name, task in net.tasks.items()
    ]
