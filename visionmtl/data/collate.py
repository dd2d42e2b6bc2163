"""From examples to padded batches."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionmtl.data.dataset import Example
from visionmtl.data.workers import now_resting
from visionmtl.structures import Batch
from visionmtl.tasks.base import Task


def pad(images: Sequence[NDArray[np.uint8]], size: tuple[int, int]) -> Tensor:
    """[h, w, C] arrays at the top left of uint8 [B, C, H, W], 0 elsewhere; channels last in memory."""
    canvas = np.empty((len(images), *size, images[0].shape[2]), np.uint8)
    for padded, image in zip(canvas, images, strict=True):
        height, width = image.shape[:2]
        padded[:height, :width], padded[:height, width:], padded[height:] = image, 0, 0
    return torch.from_numpy(canvas).permute(0, 3, 1, 2)


class Collate:
    """What DataLoader calls in its workers. training: with targets and their counts, else with the original samples."""

    def __init__(self, tasks: Mapping[str, Task], size: tuple[int, int], training: bool) -> None:
        self._tasks, self._size, self._training = dict(tasks), size, training

    def __call__(self, examples: Sequence[Example]) -> Batch:
        batch = self._collate(examples)
        now_resting()
        return batch

    def _collate(self, examples: Sequence[Example]) -> Batch:
        batch = Batch(
            image=pad([example.image for example in examples], self._size),
            targets={},
            labelled={task: torch.tensor([task in example.tasks for example in examples]) for task in self._tasks},
            bad_files=[example.bad_file for example in examples if example.bad_file],
        )
        if not self._training:
            batch.metas = [example.meta for example in examples if example.meta is not None]
            batch.samples = [example.sample for example in examples]
            batch.datasets = [example.dataset for example in examples]
            return batch
        for name, task in self._tasks.items():
            samples = [example.sample if name in example.tasks else None for example in examples]
            batch.targets[name] = task.collate(samples, self._size)
            batch.counts[name] = task.count(batch.targets[name], self._size)
        colors = [example.color for example in examples if example.color is not None]
        batch.color = torch.from_numpy(np.stack(colors)) if colors else None
        return batch
