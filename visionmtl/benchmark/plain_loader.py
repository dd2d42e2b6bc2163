"""The loader that a user would write in an afternoon, to compare with: PIL, float32, torchvision's v2 transforms."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from visionmtl.data.transforms.augment import Augment
from visionmtl.data.transforms.crop_resize import CropResize, Size
from visionmtl.datasets import Dataset, NamedDataset
from visionmtl.datasets.coco import COCO
from visionmtl.datasets.nyuv2 import NYUv2
from visionmtl.structures import Boxes

Files = Callable[[int], tuple[Path, list[tuple[Path, float | None]]]]
"""From an index to the photograph and the maps that lie beside it; a number: what depth is divided by."""

_DEPTH_UNITS = 1000.0  # the value does not matter to the time


def files_of(source: NamedDataset, spec: Dataset) -> Files:
    """Where the files of a data set lie. Raises ValueError for one whose files this loader cannot read."""

    def of(index: int) -> tuple[Path, list[tuple[Path, float | None]]]:
        image = Path(str(source.file(index)))
        if isinstance(spec, COCO):
            return image, []
        assert isinstance(spec, NYUv2)
        root, beside = image.parents[2], f"{image.parent.name}/{image.stem}.png"
        maps: list[tuple[Path, float | None]] = []
        if "segmentation" in source.provides:
            maps.append((root / f"seg{spec.classes}" / beside, None))
        if "depth_m" in source.provides:
            maps.append((root / {"inpainted": "depth", "raw": "depth_raw"}[spec.depth] / beside, _DEPTH_UNITS))
        return image, maps

    if not (isinstance(spec, NYUv2) or (isinstance(spec, COCO) and "segmentation" not in spec.labels)):
        raise ValueError(
            f"data set {source.name} is of type {spec.type}; the straightforward loader reads nyuv2, and coco with "
            "boxes; choose a config with one of these, alone in data.train"
        )
    return of


class PlainLoader:
    """Batches with the augmentation of `Augment`: the same windows, so as many pixels to decode and resize."""

    def __init__(
        self, files: Files, boxes: Sequence[Boxes | None], augment: Augment, size: Size, batch_size: int
    ) -> None:
        """boxes: of each image, looked up before: the time of that is not counted."""
        self._files, self._boxes, self._augment, self._size = files, boxes, augment, size
        self._batch_size = batch_size
        self._jitter = v2.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue_turns)
        self._normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self._sanitise = v2.SanitizeBoundingBoxes()

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, list[Tensor], list[Any]]]:
        """Images float32 [B, 3, H, W], maps [B, H, W] each, and boxes of every image."""
        rng, batch = np.random.default_rng(seed), []
        for index in rng.permutation(len(self._boxes)):
            batch.append(self._load(int(index), rng))
            if len(batch) == self._batch_size:
                images, maps, boxes = zip(*batch, strict=True)
                yield torch.stack(images), [torch.stack(one) for one in zip(*maps, strict=True)], list(boxes)
                batch = []

    def _load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, list[Tensor], Any]:
        file, map_files = self._files(index)
        pixels = Image.open(file).convert("RGB")
        image = functional.to_dtype(functional.to_image(pixels), torch.float32, scale=True)
        window = CropResize.cut((pixels.height, pixels.width), self._size, self._augment.draw(rng))

        image = self._normalise(self._jitter(self._place(image, window)))
        maps = [self._place(_read_map(*one), window) for one in map_files]
        found = self._boxes[index]
        if found is None:
            return image, maps, None
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(found.xyxy), format="XYXY", canvas_size=(pixels.height, pixels.width)
        )
        labels = torch.from_numpy(found.labels)
        return image, maps, self._sanitise({"boxes": self._place(boxes, window), "labels": labels})

    def _place(self, value: Any, window: CropResize) -> Any:
        value = functional.resized_crop(value, window.top, window.left, *window.size, list(window.out))
        if window.mirrored:
            value = functional.horizontal_flip(value)
        return functional.pad(value, [0, 0, self._size[1] - window.out[1], self._size[0] - window.out[0]])


def _read_map(file: Path, divisor: float | None) -> tv_tensors.Mask:
    values = np.array(Image.open(file))
    if divisor is not None:
        values = values.astype(np.float32) / divisor
    return tv_tensors.Mask(torch.from_numpy(values))
