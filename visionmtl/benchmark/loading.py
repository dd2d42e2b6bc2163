"""Images a second of one core: our loader, ours from the cache, and a straightforward one, in turns."""

import io
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from visionmtl.benchmark.figures import Figure, Note, Row
from visionmtl.benchmark.measure import Clock, Timing, Work, alternate, median, ratio
from visionmtl.data.cache.decoded import with_cache
from visionmtl.data.label_spaces import align, resolve_spaces
from visionmtl.data.loader import Data, train_loader
from visionmtl.data.transforms.augment import Augment
from visionmtl.data.transforms.crop_resize import CropResize, Size
from visionmtl.datasets import Dataset, NamedDataset, Subset, open_datasets
from visionmtl.datasets.coco import COCO
from visionmtl.datasets.nyuv2 import NYUv2
from visionmtl.datasets.shards import Shards, ShardsReader
from visionmtl.io.shards import Members
from visionmtl.run import Run, load
from visionmtl.structures import Boxes, ReadRequest

DECODING, CACHED, PLAIN = "decoding", "packed cache", "straightforward"
LEAST = {DECODING: 3.0, CACHED: 6.0}
"""Times the images a second of the straightforward loader."""
GOAL_PER_S = 600
IMAGES = 64
"""The first so many of the data set, or all it has; from the second round on they are in the system's memory."""


def measure_loading(
    config: Path, overrides: Sequence[str], clock: Clock = "cpu", batch: int = 8, rounds: int = 7
) -> Iterator[Figure]:
    """Images a second of each loader with the training data of a config, one thread of one process, and ratios."""
    run, timing = load(config, overrides), Timing(rounds, seconds=0.0, clock=clock)
    if len(run.data.train) != 1:
        raise ValueError(
            f"{config} trains on {len(run.data.train)} data sets; loaders are compared on one; set data.train to a "
            "list of one"
        )
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        timing.check(torch.device("cpu"))
        with tempfile.TemporaryDirectory() as folder:
            yield from _measure(run, Path(folder), batch, timing)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def _measure(run: Run, folder: Path, batch: int, timing: Timing) -> Iterator[Figure]:
    data, spec, whole = run.data, run.data.train[0], open_datasets(run.data.train)[0]
    number = min(IMAGES, len(whole)) // batch * batch
    dataset = replace(whole, reader=Subset(whole.reader, number, number))
    fields = {task.field for task in run.tasks.values()}
    cached = with_cache([dataset], [spec], folder, fields, data.size, data.augment.largest_zoom, workers=0)[0]
    boxes = [dataset.read_part(index, ReadRequest(frozenset({"boxes"}))).boxes for index in range(number)]
    straightforward, epochs = PlainLoader(whole, spec, boxes, data.augment, data.size, batch), count()

    def ours(dataset: NamedDataset) -> Work:
        """One epoch a call, another each time."""
        here = Data.model_validate({**data.model_dump(), "workers": 0, "cache": None})
        spaces = resolve_spaces(run.tasks, [dataset])
        loader: Any = train_loader(here, run.tasks, spaces, align([dataset], run.tasks, spaces), batch, run.seed)

        def work() -> None:
            loader.batch_sampler.set_epoch(next(epochs))
            deque(loader, maxlen=0)

        return work

    works = {DECODING: ours(dataset), CACHED: ours(cached)}
    works[PLAIN] = lambda: deque(straightforward.epoch(next(epochs)), maxlen=0)
    times = alternate(works, torch.device("cpu"), timing)
    yield Note(
        f"{dataset.name}: {number} images to {data.size[0]}x{data.size[1]}, zoom {data.augment.zoom}, labels "
        f"{', '.join(sorted(fields & set(dataset.provides)))}; one thread, {timing.rounds} rounds in turns, medians, "
        f"{timing.clock} time. Colours and normalisation are the device's part in ours. The cache was verified before."
    )
    per_s = {name: 1e3 * number / median(times_ms) for name, times_ms in times.items()}
    for name, value in per_s.items():
        yield Row(f"{name}: images/s per core", value, "images/s")
    for name, least in LEAST.items():
        yield Row(f"{name} against straightforward", ratio(times[PLAIN], times[name]), "x", least=least)
    for name, value in per_s.items():
        yield Row(f"{name}: cores for {GOAL_PER_S} images/s", GOAL_PER_S / value, "cores")


class PlainLoader:
    """What a user would write in an afternoon: PIL, float32, torchvision's v2 transforms.

    The windows are those of `Augment`, so there are as many pixels to decode and to resize.
    """

    def __init__(
        self, dataset: NamedDataset, spec: Dataset, boxes: Sequence[Boxes | None], augment: Augment, size: Size,
        batch_size: int,
    ) -> None:  # fmt: skip
        """boxes: of each image, looked up before: the time of that is not counted."""
        boxes_alone = isinstance(spec, COCO) and "segmentation" not in spec.labels
        if not (isinstance(spec, NYUv2 | Shards) or boxes_alone):
            raise ValueError(
                f"data set {dataset.name} is of type {spec.type}; the straightforward loader reads nyuv2, shards, and "
                "coco with boxes; choose a config with one of these, alone in data.train"
            )
        self._dataset, self._spec = dataset, spec
        self._boxes, self._augment, self._size, self._batch_size = boxes, augment, size, batch_size
        self._jitter = v2.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue_turns)
        self._normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self._sanitise = v2.SanitizeBoundingBoxes()

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, list[Tensor], list[Any]]]:
        """Images float32 [B, 3, H, W], maps [B, H, W] each, and boxes of every image."""
        rng = np.random.default_rng(seed)
        for indices in rng.permutation(len(self._boxes)).reshape(-1, self._batch_size).tolist():
            images, maps, boxes = zip(*(self._load(index, rng) for index in indices), strict=True)
            yield torch.stack(images), [torch.stack(of_batch) for of_batch in zip(*maps, strict=True)], list(boxes)

    def _load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, list[Tensor], Any]:
        pixels, label_maps = self._open(index)
        size = pixels.height, pixels.width
        crop = CropResize.cut(size, self._size, self._augment.draw(rng))
        image = functional.to_dtype(functional.to_image(pixels), torch.float32, scale=True)
        image = self._normalise(self._jitter(self._place(image, crop)))
        maps = [self._place(values, crop) for values in label_maps]
        boxes = self._boxes[index]
        if boxes is None:
            return image, maps, None
        corners = tv_tensors.BoundingBoxes(torch.from_numpy(boxes.xyxy), format="XYXY", canvas_size=size)
        labels = torch.from_numpy(boxes.labels)
        return image, maps, self._sanitise({"boxes": self._place(corners, crop), "labels": labels})

    def _open(self, index: int) -> tuple[Image.Image, Iterator[tv_tensors.Mask]]:
        """The photograph, and the maps that its data set provides."""
        if isinstance(self._spec, Shards):
            assert isinstance(self._dataset.reader, ShardsReader)
            members = self._dataset.reader.members(index)
            return Image.open(io.BytesIO(next(iter(members.values())))).convert("RGB"), self._maps_of(members)
        file = Path(str(self._dataset.file(index)))
        return Image.open(file).convert("RGB"), self._maps(file)

    def _maps_of(self, members: Members) -> Iterator[tv_tensors.Mask]:
        """The label maps of a sample in a shard."""
        if "segmentation.png" in members:
            yield tv_tensors.Mask(np.array(Image.open(io.BytesIO(members["segmentation.png"]))))
        if "depth.npy" in members:
            values = np.load(io.BytesIO(members["depth.npy"]))
            if "depth.png" in members:
                values = values[np.array(Image.open(io.BytesIO(members["depth.png"])))]
            yield tv_tensors.Mask(values)

    def _maps(self, image: Path) -> Iterator[tv_tensors.Mask]:
        """The label maps beside a photograph of NYUv2."""
        root, name = image.parents[2], f"{image.parent.name}/{image.stem}.png"
        if isinstance(self._spec, NYUv2) and "segmentation" in self._dataset.provides:
            yield tv_tensors.Mask(np.array(Image.open(root / f"seg{self._spec.classes}" / name)))
        if isinstance(self._spec, NYUv2) and "depth_m" in self._dataset.provides:
            folder = {"inpainted": "depth", "raw": "depth_raw"}[self._spec.depth]
            # any divisor takes as long
            yield tv_tensors.Mask(np.array(Image.open(root / folder / name)).astype(np.float32) / 1000)

    def _place(self, value: Any, crop: CropResize) -> Any:
        value = functional.resized_crop(value, crop.top, crop.left, *crop.size, list(crop.out))
        if crop.mirrored:
            value = functional.horizontal_flip(value)
        return functional.pad(value, [0, 0, self._size[1] - crop.out[1], self._size[0] - crop.out[0]])
