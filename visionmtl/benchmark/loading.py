"""How fast one core loads training images: ours, ours from the packed cache, and a straightforward loader, in turns."""

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import torch
from pydantic import Field

from visionmtl import run as config
from visionmtl.benchmark.base import Figure, Note, Row, Table
from visionmtl.benchmark.measure import Clock, alternate, check_clock, quartiles, ratio
from visionmtl.benchmark.plain_loader import PlainLoader, files_of
from visionmtl.config.registry import Spec
from visionmtl.data.cache.decoded import with_cache
from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.data.loader import Data, TrainLoader
from visionmtl.data.transforms.crop_resize import CropParams
from visionmtl.datasets import NamedDataset, Subset, open_datasets
from visionmtl.ops.color import normalise
from visionmtl.run import Run
from visionmtl.structures import Batch, ReadRequest, Sample

LEAST_DECODING, LEAST_CACHED = 2.5, 5.0
"""Times the images a second of the straightforward loader."""
GOAL_PER_S = 600

_OURS, _CACHED, _PLAIN = "decoding", "packed cache", "straightforward"
_LEFT = "decoding left to the device"


class Loading(Spec):
    """The training data of a config, one thread of one process, files in the system's memory after the first round."""

    config: Path
    overrides: tuple[str, ...] = ()
    images: int = Field(64, ge=8, description="the first so many of the data set, or all it has")
    batch: int = Field(8, ge=1)
    rounds: int = Field(7, ge=1)
    clock: Clock = "cpu"

    def measure(self) -> Iterator[Figure]:
        """Images a second of each loader, their ratios, and where the time goes."""
        run = config.load(self.config, self.overrides)
        if len(run.data.train) != 1:
            raise ValueError(
                f"{self.config} trains on {len(run.data.train)} data sets; loaders are compared on one; set data.train "
                "to a list of one"
            )
        threads = torch.get_num_threads(), cv2.getNumThreads()
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        try:
            check_clock(self.clock, torch.device("cpu"))
            with tempfile.TemporaryDirectory() as folder:
                yield from self._measure(run, Path(folder))
        finally:
            torch.set_num_threads(threads[0])
            cv2.setNumThreads(threads[1])

    def _measure(self, run: Run, folder: Path) -> Iterator[Figure]:
        spec, whole = run.data.train[0], open_datasets(run.data.train)[0]
        number = min(self.images, len(whole)) // self.batch * self.batch
        source = replace(whole, reader=Subset(whole.reader, number, number))
        zoom, fields = run.data.augment.zoom[1], {task.field for task in run.tasks.values()}
        cached = with_cache([source], [spec], folder, fields, run.data.size, zoom, workers=0)[0]

        boxes = [source.read_part(index, ReadRequest(frozenset({"boxes"}))).boxes for index in range(number)]
        plain = PlainLoader(files_of(whole, spec), boxes, run.data.augment, run.data.size, self.batch)
        works = {
            _OURS: _drained(_loader(run, source, self.batch).epoch),
            _CACHED: _drained(_loader(run, cached, self.batch).epoch),
            _PLAIN: _drained(plain.epoch),
            **_stages(run, source, cached, self.batch),
        }
        left_out = ""
        try:
            works[_LEFT] = _drained(_loader(run, source, self.batch, decode="device").epoch)
        except ValueError as error:
            left_out = f" Not measured is {_LEFT}: {error}."
        times = alternate(works, torch.device("cpu"), self.rounds, seconds=0.0, clock=self.clock)
        per_image = {name: [value / number for value in values] for name, values in times.items()}

        yield Note(
            f"{source.name}: {number} images to {run.data.size[0]}x{run.data.size[1]}, zoom {run.data.augment.zoom}, "
            f"labels {', '.join(sorted(fields & set(source.provides)))}; one thread, {self.rounds} rounds in turns, "
            f"medians, {self.clock} time. The cache was verified before.{left_out}"
        )
        loaders = [name for name in (_OURS, _CACHED, _LEFT, _PLAIN) if name in works]
        for name in loaders:
            yield Row(f"{name}: images/s per core", 1e3 / quartiles(per_image[name])[1], "images/s")
        plain_ms, ours, packed = per_image[_PLAIN], per_image[_OURS], per_image[_CACHED]
        yield Row("decoding against straightforward", ratio(plain_ms, ours), "x", least=LEAST_DECODING)
        yield Row("packed cache against straightforward", ratio(plain_ms, packed), "x", least=LEAST_CACHED)
        if _LEFT in works:
            yield Row(f"{_LEFT} against straightforward", ratio(plain_ms, per_image[_LEFT]), "x")
        device = per_image["colours and normalisation (the device's part)"]
        for name in (_OURS, _CACHED):
            yield Row(f"{name} and the device's part on this core", ratio(plain_ms, per_image[name], device), "x")
        for name in loaders:
            workers = GOAL_PER_S * quartiles(per_image[name])[1] / 1e3
            yield Row(f"{name}: cores for {GOAL_PER_S} images/s", workers, "cores")
        stages = [name for name in works if name not in loaders]
        rows = [(name, *quartiles(per_image[name])) for name in stages]
        yield Table("where it goes, ms an image", ("stage", "lower quartile", "median", "upper quartile"), tuple(rows))


def _loader(run: Run, source: NamedDataset, batch: int, decode: str = "workers") -> TrainLoader:
    data = Data.model_validate({**run.data.model_dump(), "workers": 0, "cache": None, "decode": decode})
    return TrainLoader(data, run.tasks, resolve_spaces(run.tasks, [source]), [source], batch, run.seed)


def _drained(epoch: Callable[[int], Iterable[object]]) -> Callable[[], object]:
    """One epoch a call, another each time."""
    numbers = count()
    return lambda: deque(epoch(next(numbers)), maxlen=0)


def _stages(run: Run, source: NamedDataset, cached: NamedDataset, batch: int) -> dict[str, Callable[[], object]]:
    """Parts of the work that the loaders do, each on all images."""
    augment, size, numbers = run.data.augment, run.data.size, range(len(source))
    wanted = ReadRequest(frozenset(task.field for task in run.tasks.values()))
    only_image = ReadRequest(frozenset())
    samples = [source.read_part(index, wanted) for index in numbers]
    rng = np.random.default_rng(0)
    views = [augment.apply(sample, size, rng) for sample in samples]
    batches: list[Batch] = list(_loader(run, source, batch).epoch(0))

    def framed(sample: Sample) -> Sample:
        params: CropParams = augment.draw(rng)
        return augment.view(sample, size, params, rng)

    return {
        "read and decode the image": lambda: [source.read_part(index, only_image) for index in numbers],
        "the same with labels": lambda: [source.read_part(index, wanted) for index in numbers],
        "read from the cache": lambda: [cached.read_part(index, wanted) for index in numbers],
        "crop, resize and flip image and labels": lambda: [framed(sample) for sample in samples],
        "draw colours": lambda: [augment.colour(view.image, rng) for view in views],
        "colours and normalisation (the device's part)": lambda: [_on_device(one) for one in batches],
    }


def _on_device(batch: Batch) -> torch.Tensor:
    mean, std = torch.full((1, 3, 1, 1), 120.0), torch.full((1, 3, 1, 1), 58.0)
    return normalise(batch.image, mean, std, batch.colour)
