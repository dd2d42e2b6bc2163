"""From images to predictions in user units, and to one picture that shows them task by task."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from visionmtl import drawing
from visionmtl.data.loader import pad
from visionmtl.data.transforms.augment import fit
from visionmtl.network import MultiTaskNet
from visionmtl.structures import LabelSpace
from visionmtl.tasks.base import Task

MAX_PICTURE_PX = 3200


def predict(
    net: MultiTaskNet, images: Sequence[NDArray[np.uint8]], size: tuple[int, int], batch_size: int = 8
) -> list[dict[str, Any]]:
    """Each image's predictions by task, at the image's own resolution.

    images: uint8 [H, W, 3] RGB of any sizes; size: (H, W) of the network's input (`run.data.input_size`).
    The images are resized and padded as validation does it. Runs where the network's weights are, in evaluation mode,
    and leaves the network in the mode it was in.
    """
    for number, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"image {number} is {image.dtype} {list(image.shape)}; uint8 [H, W, 3] RGB is needed; "
                "read files with visionmtl.ops.images.read_image, or convert the array"
            )
    was_training = net.training
    net.eval()
    try:
        batches = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
        return [prediction for batch in batches for prediction in _predict_batch(net, batch, size)]
    finally:
        net.train(was_training)


@torch.inference_mode()
def _predict_batch(
    net: MultiTaskNet, images: Sequence[NDArray[np.uint8]], size: tuple[int, int]
) -> list[dict[str, Any]]:
    fitted = [fit(image, size, net.size) for image in images]
    batch = pad([image for image, _ in fitted], size).to(net.mean.device)
    metas = [meta for _, meta in fitted]
    raws = net(batch)
    by_task = {name: task.predict(raws[name], metas, size) for name, task in net.tasks.items()}
    return [{name: of_task[i] for name, of_task in by_task.items()} for i in range(len(images))]


def picture(
    tasks: Mapping[str, Task],
    spaces: Mapping[str, LabelSpace | None],
    image: NDArray[np.uint8],
    rows: Mapping[str, Mapping[str, Any]],
    min_score: float = 0.4,
) -> NDArray[np.uint8]:
    """The image, and beside it a row of drawings for each of `rows`, one column a task.

    rows: by a title such as "prediction" or "truth": values by task in the form of a prediction; None or a missing
    task leaves the place empty.
    """
    table: list[list[drawing.Titled | None]] = []
    for title, values in rows.items():
        cells: list[drawing.Titled | None] = [None if table else ("image", image)]
        for name, task in tasks.items():
            value = values.get(name)
            drawn = None if value is None else task.draw(image, value, spaces[name], min_score)
            cells.append(None if drawn is None else (f"{name}: {title}", drawn))
        table.append(cells)

    widest = max(cell[1].shape[1] for row in table for cell in row if cell is not None)
    return drawing.compare(table, min(widest, MAX_PICTURE_PX // (1 + len(tasks))))
