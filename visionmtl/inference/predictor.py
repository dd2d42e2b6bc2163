"""A trained network at work: images in, results at their own size out, with the numbers of `tools/eval.py`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from visionmtl.config.suggest import did_you_mean
from visionmtl.data.collate import pad
from visionmtl.data.transforms.augment import fit
from visionmtl.engine.checkpoint import Opened, open_model
from visionmtl.engine.distributed import choose_device
from visionmtl.engine.evaluator import Precision, forward
from visionmtl.io.images import list_images, read_image
from visionmtl.io.video import is_video, read_frames
from visionmtl.network import MultiTaskNet
from visionmtl.structures import Detections, ImageClasses, LabelSpace, as_rgb, channels_shown
from visionmtl.tasks.base import Task
from visionmtl.visualization import draw

MAX_PICTURE_PX = 3200
MIN_SCORE = 0.4
"""Boxes below are left out of pictures; results hold all that `tools/eval.py` scores."""

Pixels = NDArray[np.uint8]  # [H, W, 3] RGB
PixelInput = Pixels | Tensor | Image.Image
"""An image in memory: NumPy uint8 [H, W, 3] RGB, torch uint8 [3, H, W] RGB, or Pillow's."""


@dataclass(frozen=True, eq=False)
class ResultBoxes:
    """Boxes found in one image, best first."""

    xyxy: NDArray[np.float32] = field(repr=False)  # [D, 4] pixels of the original image
    scores: NDArray[np.float32] = field(repr=False)  # [D] 0..1
    labels: NDArray[np.int64] = field(repr=False)  # [D] class ids
    names: list[str]  # [D] class names
    depth_m: NDArray[np.float32] | None = field(default=None, repr=False)  # of the image, where a task predicts it

    def __len__(self) -> int:
        return len(self.scores)

    @cached_property
    def distance_m(self) -> NDArray[np.float32] | None:
        """[D] metres: the median of predicted depth over the inner half of each box (half its width and height).

        The rim of a box shows what lies behind the object. None where no task predicts depth.
        """
        if self.depth_m is None:
            return None
        return np.array([_inner_median(self.depth_m, box) for box in self.xyxy], np.float32)


@dataclass(frozen=True, eq=False)
class ResultClasses:
    """Classes of a whole image, best first."""

    names: list[str]
    scores: NDArray[np.float32] = field(repr=False)  # 0..1, of each name

    @property
    def name(self) -> str:
        """The class of the highest score."""
        return self.names[0]

    @property
    def score(self) -> float:
        """The highest score."""
        return float(self.scores[0])


def _inner_median(depth_m: NDArray[np.float32], box: NDArray[np.float32]) -> float:
    """Of the pixels whose centres lie in the inner half; of the middle pixel where that holds none."""
    spans = []
    for low, high, size in ((box[1], box[3], depth_m.shape[0]), (box[0], box[2], depth_m.shape[1])):
        middle, quarter = (low + high) / 2, (high - low) / 4
        first, last = int(np.ceil(middle - quarter - 0.5)), int(np.floor(middle + quarter - 0.5))
        if first > last:
            first = last = int(middle)
        spans.append(slice(min(max(first, 0), size - 1), min(max(last, 0), size - 1) + 1))
    return float(np.median(depth_m[spans[0], spans[1]]))


@dataclass(frozen=True, eq=False)
class Result:
    """What a network predicts of one image, in user units at the image's own size."""

    image: Pixels = field(repr=False)
    source: str | None
    """The file, or video and frame number; None for an image in memory."""
    predictions: dict[str, Any] = field(repr=False)
    """By name of the task, in the form that the task documents."""
    tasks: Mapping[str, Task] = field(repr=False)
    spaces: Mapping[str, LabelSpace | None] = field(repr=False)
    """The classes that each task learnt; None for tasks without classes."""
    boxes: ResultBoxes | None = None
    segmentation: NDArray[np.uint8] | None = field(default=None, repr=False)  # [H, W] class ids
    depth_m: NDArray[np.float32] | None = field(default=None, repr=False)  # [H, W] metres along the optical axis
    normals: NDArray[np.float32] | None = field(default=None, repr=False)  # [H, W, 3] x right, y down, z forward
    classification: ResultClasses | None = None

    @staticmethod
    def of(
        image: Pixels,
        source: str | None,
        predictions: dict[str, Any],
        tasks: Mapping[str, Task],
        spaces: Mapping[str, LabelSpace | None],
    ) -> "Result":
        """Each field is filled by the first task whose `result_field` names it."""
        fields: dict[str, Any] = {}
        names: dict[str, list[str]] = {}  # by field: the classes of the prediction's labels
        for name, task in tasks.items():
            if task.result_field is not None and task.result_field not in fields:
                fields[task.result_field] = predictions[name]
                if isinstance(found := predictions[name], Detections | ImageClasses):
                    space = spaces[name]
                    assert space is not None
                    names[task.result_field] = [space.classes[label] for label in found.labels]
        if isinstance(found := fields.get("boxes"), Detections):
            boxes = found.xyxy, found.scores, found.labels, names["boxes"]
            fields["boxes"] = ResultBoxes(*boxes, fields.get("depth_m"))
        if isinstance(found := fields.get("classification"), ImageClasses):
            fields["classification"] = ResultClasses(names["classification"], found.scores)
        return Result(image, source, predictions, tasks, spaces, **fields)

    def plot(self, min_score: float = MIN_SCORE) -> Image.Image:
        """The image and each task's drawing side by side; boxes below min_score are left out."""
        rows = {"prediction": self.predictions}
        return Image.fromarray(picture(self.tasks, self.spaces, self.image, rows, min_score))

    def save(self, path: str | Path, min_score: float = MIN_SCORE) -> Path:
        """Write `plot` as an image file, whose ending names the format. Raises ValueError where the file exists."""
        return save_picture(Path(path), self.plot(min_score))


def save_picture(path: Path, drawn: Image.Image) -> Path:
    """Write an image file and never over another one; folders are made. Raises ValueError where the file exists."""
    suffixes = Image.registered_extensions()
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} names no format of image files; endings such as .png, .jpg, .webp do; correct it")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("xb") as file:
            drawn.save(file, format=suffixes[path.suffix.lower()])
    except FileExistsError:
        raise ValueError(f"{path} exists already; nothing is written over; choose another name") from None
    except OSError:  # a full disk leaves half a picture
        path.unlink(missing_ok=True)
        raise
    return path


class Predictor:
    """A trained network, ready for images of any size: `predictor("photo.jpg")` is a `Result`.

    Images are resized, padded and batched as in evaluation, in the run's precision. The numbers are those of
    `tools/eval.py` bit for bit where the batches are the same (`batch_size` images in their order); another size of
    batch may take another convolution algorithm, which moves the last bits.
    A task with `classes` chooses among all of them, where evaluation chooses among those its data set annotates.
    """

    def __init__(self, opened: Opened, tasks: Sequence[str] | None = None, precision: Precision | None = None) -> None:
        """tasks: only these are computed; precision: None = the run's."""
        self.net, self.run = opened.net, opened.run
        self.precision: Precision = precision or opened.run.train.precision
        self.batch_size = opened.run.train.batch_size
        self.net.keep(list(choose_tasks(self.net.tasks, tasks)))

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.net.mean.device

    @overload
    def __call__(self, source: PixelInput) -> Result: ...
    @overload
    def __call__(self, source: Sequence[PixelInput | str | Path]) -> list[Result]: ...
    @overload
    def __call__(self, source: str | Path) -> Any: ...

    def __call__(self, source: Any) -> Any:
        """The result of an image (a file, NumPy uint8 [H, W, 3] RGB, torch uint8 [3, H, W] or Pillow's).

        A list of these gives a list; a folder, a video file or camera:0 an iterator, which reads as it goes.
        """
        if isinstance(source, str | Path):
            if is_video(str(source)):
                frames = ((frame, f"{source}#{number}") for number, frame in enumerate(read_frames(str(source))[1]))
                # a camera's frame should not wait for the next ones
                return self._stream(frames, 1 if str(source).startswith("camera:") else self.batch_size)
            if Path(source).is_dir():
                files = list_images(Path(source))
                if not files:
                    raise ValueError(f"{source} is a folder without images; one or more are needed; correct the path")
                return self._stream(map(_pixels, files), self.batch_size)
        elif isinstance(source, list | tuple):
            return list(self._stream(map(_pixels, source), self.batch_size))
        return next(self._stream([_pixels(source)], 1))

    def _stream(self, images: Iterable[tuple[Pixels, str | None]], batch_size: int) -> Iterator[Result]:
        images = iter(images)
        while batch := list(islice(images, batch_size)):
            size = self.run.data.input_size
            predictions = predict(self.net, [image for image, _ in batch], size, self.precision, batch_size)
            for (image, source), of_image in zip(batch, predictions, strict=True):
                yield Result.of(image, source, of_image, self.net.tasks, self.net.spaces)


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    tasks: Sequence[str] | None = None,
    precision: Precision | None = None,
) -> Predictor:
    """The network of a checkpoint, or of a run folder (its best checkpoint, else its last).

    device: None = CUDA where there is one, else the CPU
    tasks: only these are computed; None = all of the run
    precision: "fp32", "bf16" or "fp16"; None = the run's, so that the numbers are those of `tools/eval.py`
    """
    chosen = device if isinstance(device, torch.device) else choose_device(device or "auto")
    return Predictor(open_model(path, chosen), tasks, precision)


def choose_tasks(tasks: Mapping[str, Task], names: Sequence[str] | None) -> dict[str, Task]:
    """The tasks of these names, in the order of the run; None = all. Raises ValueError for a name it does not have."""
    for name in names or ():
        if name not in tasks:
            raise ValueError(
                f"there is no task {name!r}{did_you_mean(name, tasks)}; this run has {', '.join(tasks)}; correct it"
            )
    return {name: task for name, task in tasks.items() if names is None or name in names}


def predict(
    net: MultiTaskNet, images: Sequence[Pixels], size: tuple[int, int], precision: Precision, batch_size: int
) -> list[dict[str, Any]]:
    """Each image's predictions by task, at the image's own resolution.

    images: uint8 [H, W, 3] RGB of any sizes; size: (H, W) of the network's input (`run.data.input_size`).
    Runs where the network's weights are, in evaluation mode, and leaves the network in the mode it was in.
    """
    for number, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != net.in_chans:
            kind = "[H, W, 3] RGB" if net.in_chans == 3 else f"[H, W, {net.in_chans}], as training read it,"
            raise ValueError(
                f"image {number} is {image.dtype} {list(image.shape)}; uint8 {kind} is needed; "
                "read files with visionmtl.io.images.read_image, or convert the array"
            )
    was_training = net.training
    net.eval()
    try:
        batches = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
        return [prediction for batch in batches for prediction in _predict_batch(net, batch, size, precision)]
    finally:
        net.train(was_training)


@torch.inference_mode()
def _predict_batch(
    net: MultiTaskNet, images: Sequence[Pixels], size: tuple[int, int], precision: Precision
) -> list[dict[str, Any]]:
    resized, metas = zip(*(fit(image, size, net.size) for image in images), strict=True)
    raw = forward(net, pad(resized, size).to(net.mean.device), precision)
    by_task = {name: task.predict(raw[name], metas, size) for name, task in net.tasks.items()}
    return [{name: of_task[i] for name, of_task in by_task.items()} for i in range(len(images))]


def _pixels(source: PixelInput | str | Path) -> tuple[Pixels, str | None]:
    """uint8 [H, W, 3] RGB, and the file it was read from."""
    if isinstance(source, str | Path):
        return read_image(source), str(source)
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.ndim != 3 or source.shape[0] != 3:
            raise ValueError(
                f"the image is a {source.dtype} tensor {list(source.shape)}; uint8 [3, H, W] RGB of 0..255 is needed; "
                "convert it, a batch image by image"
            )
        return source.permute(1, 2, 0).cpu().numpy(), None
    if isinstance(source, Image.Image):
        if source.mode.startswith(("I", "F")):
            raise ValueError(
                f"the image has Pillow's mode {source.mode!r}, whose white is unknown; 8 bits a channel are needed; "
                "convert it with the range you mean"
            )
        upright = ImageOps.exif_transpose(source)
        if upright.has_transparency_data:
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
        return np.array(upright.convert("RGB")), None
    if isinstance(source, np.ndarray):
        return source, None
    raise ValueError(
        f"{type(source).__name__} is no image; a path, NumPy uint8 [H, W, 3] RGB, torch uint8 [3, H, W], a Pillow "
        "image or a list of these is needed; convert it"
    )


def picture(
    tasks: Mapping[str, Task],
    spaces: Mapping[str, LabelSpace | None],
    image: Pixels,
    rows: Mapping[str, Mapping[str, Any]],
    min_score: float = MIN_SCORE,
) -> Pixels:
    """The image, and beside it a row of drawings for each of `rows`, one column a task.

    rows: by a title such as "prediction" or "truth": values by task in the form of a prediction; None or a missing
    task leaves the place empty.
    """
    table: list[list[draw.Titled | None]] = []
    shown, image = channels_shown(image.shape[2]), as_rgb(image)
    for title, values in rows.items():
        cells: list[draw.Titled | None] = [None if table else (f"image {shown}".strip(), image)]
        for name, task in tasks.items():
            value = values.get(name)
            drawn = None if value is None else task.draw(image, value, spaces[name], min_score)
            cells.append(None if drawn is None else (f"{name}: {title}", drawn))
        table.append(cells)

    widest = max(cell[1].shape[1] for row in table for cell in row if cell is not None)
    return draw.compare(table, min(widest, MAX_PICTURE_PX // (1 + len(tasks))))
