"""A trained network at work: images in, results at their own size out, with the numbers of `tools/eval.py`."""

import io
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, get_args, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from visionmtl.config.imports import allow_imports
from visionmtl.config.paths import home_path
from visionmtl.config.suggest import did_you_mean
from visionmtl.data.collate import pad
from visionmtl.data.transforms.augment import fit
from visionmtl.engine.checkpoint import Opened, open_model
from visionmtl.engine.distributed import choose_device
from visionmtl.engine.evaluator import forward
from visionmtl.io.atomic import atomic_write, plain_json
from visionmtl.io.coco.results import rows_of
from visionmtl.io.images import SUFFIXES, check_pixels, list_images, picture_format, read_image
from visionmtl.io.video import count_frames, is_video, whole_frames
from visionmtl.metrics.distance import box_columns
from visionmtl.network import MultiTaskNet
from visionmtl.ops.precision import Precision
from visionmtl.structures import Detections, ImageClasses, Intrinsics, LabelSpace, Sample
from visionmtl.tasks.base import Task
from visionmtl.visualization.draw import MIN_SCORE, DrawOptions, check_score
from visionmtl.visualization.panels import draw_panels

Pixels = NDArray[np.uint8]  # [H, W, 3] RGB
PixelInput = Pixels | Tensor | Image.Image
"""An image in memory: NumPy uint8 [H, W, 3] RGB, torch uint8 [3, H, W] RGB, or Pillow's."""


@dataclass(frozen=True, eq=False, repr=False)
class ResultBoxes:
    """Boxes found in one image, best first; `boxes[i]`, slices and masks are some of them, in this form, too."""

    xyxy: NDArray[np.float32]  # [D, 4] pixels of the original image
    scores: NDArray[np.float32]  # [D] 0..1
    labels: NDArray[np.int64]  # [D] class ids
    names: list[str]  # [D] class names
    depth_m: NDArray[np.float32] | None = None  # of the image, where a task predicts it
    intrinsics: Intrinsics | None = None  # of the camera, where it is known

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, chosen: "int | slice | Sequence[int] | Sequence[bool] | NDArray[Any]") -> "ResultBoxes":
        """The boxes that NumPy would choose of an array: by number, slice, numbers, or a mask of bool [D]."""
        rows = np.atleast_1d(np.arange(len(self))[chosen])
        names = [self.names[row] for row in rows]
        return replace(self, xyxy=self.xyxy[rows], scores=self.scores[rows], labels=self.labels[rows], names=names)

    def __iter__(self) -> Iterator["ResultBoxes"]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"ResultBoxes({len(self)}{_best(self.names, self.scores)})"

    @cached_property
    def _columns(self) -> Mapping[str, NDArray[np.float32]]:
        return {} if self.depth_m is None else box_columns(self.depth_m, self.xyxy, self.intrinsics)

    @property
    def distance_m(self) -> NDArray[np.float32] | None:
        """[D] metres: the median of predicted depth over the inner half of each box (half its width and height).

        The rim of a box shows what lies behind the object. None where no task predicts depth.
        """
        return self._columns.get("distance_m")

    @property
    def distance_spread_m(self) -> NDArray[np.float32] | None:
        """[D] metres: half the range from the 16th to the 84th percentile of the depths that `distance_m` is of."""
        return self._columns.get("distance_spread_m")

    @property
    def positions_m(self) -> NDArray[np.float32] | None:
        """[D, 3] metres in camera coordinates (x right, y down, z forward): the middle of each box at `distance_m`.

        None where no task predicts depth or the camera's intrinsics are not known.
        """
        return self._columns.get("position_m")

    def above(self, min_score: float) -> "ResultBoxes":
        """The boxes with a score of at least min_score, which is 0 to 1."""
        check_score(min_score)
        return self[self.scores >= min_score]

    def rows(self) -> list[dict[str, Any]]:
        """Each box as plain data: name, label, score, xyxy, and distance_m, distance_spread_m, position_m if known."""
        columns = {"label": self.labels, "score": self.scores, "xyxy": self.xyxy, **self._columns}
        lists = plain_json({"name": self.names, **columns})
        return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _best(names: Sequence[str], scores: NDArray[np.float32]) -> str:
    """The first three of them, for people."""
    best = [f"{name} {score:.2f}" for name, score in zip(names[:3], scores, strict=False)]
    return "".join([": " if best else "", ", ".join(best), ", ..." if len(names) > len(best) else ""])


@dataclass(frozen=True, eq=False, repr=False)
class ResultClasses:
    """Classes of a whole image, best first."""

    names: list[str]
    scores: NDArray[np.float32]  # 0..1, of each name

    def __repr__(self) -> str:
        return f"ResultClasses({len(self.names)}{_best(self.names, self.scores)})"

    @property
    def name(self) -> str:
        """The class of the highest score."""
        return self.names[0]

    @property
    def score(self) -> float:
        """The highest score."""
        return float(self.scores[0])


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What a network predicts of one image, in user units at the image's own size."""

    image: Pixels
    source: str | None
    """The file, or video and frame number; None for an image in memory."""
    predictions: dict[str, Any]
    """By name of the task, in the form that the task documents."""
    tasks: Mapping[str, Task]
    spaces: Mapping[str, LabelSpace | None]
    """The classes that each task learnt; None for tasks without classes."""
    boxes: ResultBoxes | None = None
    segmentation: NDArray[np.uint8] | None = None  # [H, W] class ids
    depth_m: NDArray[np.float32] | None = None  # [H, W] metres along the optical axis
    normals: NDArray[np.float32] | None = None  # [H, W, 3] x right, y down, z forward
    classification: ResultClasses | None = None

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        parts = [*([] if self.source is None else [repr(self.source)]), f"{height}x{width} px"]
        for name in ("boxes", "segmentation", "depth_m", "normals", "classification"):
            if (value := getattr(self, name)) is not None:
                is_map = isinstance(value, np.ndarray)
                parts.append(f"{name}={value.dtype}{list(value.shape)}" if is_map else f"{name}={value}")
        parts += [f"predictions[{name!r}]" for name, task in self.tasks.items() if task.result_field is None]
        return f"Result({', '.join(parts)})"

    @staticmethod
    def of(
        image: Pixels,
        source: str | None,
        predictions: dict[str, Any],
        tasks: Mapping[str, Task],
        spaces: Mapping[str, LabelSpace | None],
        intrinsics: Intrinsics | None = None,
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
            fields["boxes"] = ResultBoxes(*boxes, fields.get("depth_m"), intrinsics)
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

    def _repr_png_(self) -> bytes:
        """The picture that a notebook shows."""
        buffer = io.BytesIO()
        self.plot().save(buffer, format="png")
        return buffer.getvalue()

    def to_dict(self, min_score: float = 0.0) -> dict[str, Any]:
        """As plain data for JSON: source, size [H, W], and what was predicted; boxes below min_score are left out.

        boxes: a list, see `ResultBoxes.rows`; segmentation: the share of pixels of each class, largest first; depth_m:
        min, median and max; classification: names and scores, best first. The maps themselves are arrays of this
        object: `tools/predict.py` writes them as files.
        """
        plain: dict[str, Any] = {"source": self.source, "size": list(self.image.shape[:2])}
        if self.boxes is not None:
            plain["boxes"] = self.boxes.above(min_score).rows()
        if self.segmentation is not None:
            plain["segmentation"] = self._shares(self.segmentation)
        if self.depth_m is not None:
            low, middle, high = np.percentile(self.depth_m, (0, 50, 100)).tolist()
            plain["depth_m"] = {"min": low, "median": middle, "max": high}
        if self.classification is not None:
            scores = self.classification.scores.tolist()
            names = self.classification.names
            plain["classification"] = [{"name": n, "score": s} for n, s in zip(names, scores, strict=True)]
        return plain

    def _shares(self, segmentation: NDArray[np.uint8]) -> dict[str, float]:
        labels, counts = np.unique(segmentation, return_counts=True)
        classes = self.space("segmentation").classes
        order = np.argsort(-counts, kind="stable")
        return {classes[labels[i]]: float(counts[i] / segmentation.size) for i in order if labels[i] < len(classes)}

    def space(self, result_field: str) -> LabelSpace:
        """The classes of the task that filled a field, as "boxes" or "segmentation"."""
        name = next(name for name, task in self.tasks.items() if task.result_field == result_field)
        space = self.spaces[name]
        assert space is not None
        return space

    def to_coco(self, image_id: str | int | None = None) -> list[dict[str, Any]]:
        """The boxes as entries of a COCO results file: image_id, category_id, bbox [x, y, width, height], score.

        Category ids are the official ones where the label space has them. Distances stand beside, as in `to_dict`;
        readers of COCO results pass over them. image_id: None = of an image file its name without
        folder and ending, of a frame NAME#NUMBER, of a sample its id.
        """
        boxes = self._boxes("to_coco")
        given: Any = _image_id(str(self.source)) if image_id is None and self.source is not None else image_id
        is_number = isinstance(given, int | np.integer) and not isinstance(given, bool)
        given = int(given) if is_number else given
        if not is_number and (not isinstance(given, str) or not given):
            why = "the image came from memory" if image_id is None else f"image_id is {image_id!r}"
            raise ValueError(
                f"{why}, so its entries have no image_id; COCO results need a text or a whole number; give it as "
                "to_coco(image_id)"
            )
        found = Detections(boxes.xyxy, boxes.scores, boxes.labels)
        return rows_of(given, found, self.space("boxes"), boxes._columns)

    def to_supervision(self, min_score: float = 0.0) -> Any:
        """The boxes as `supervision.Detections`, for its annotators, trackers and zones; extra `supervision`.

        `data` holds class_name, and distance_m, distance_spread_m, position_m where known.
        """
        boxes = self._boxes("to_supervision").above(min_score)
        try:
            import supervision
        except ImportError as error:
            raise ImportError(
                "the package supervision is not installed; to_supervision needs it; install it with "
                "pip install 'visionmtl[supervision]'"
            ) from error
        data: dict[str, Any] = {"class_name": np.array(boxes.names, dtype=np.str_), **boxes._columns}
        return supervision.Detections(
            xyxy=boxes.xyxy, confidence=boxes.scores, class_id=boxes.labels.astype(int), data=data
        )

    def _boxes(self, what: str) -> ResultBoxes:
        if self.boxes is None:
            raise ValueError(
                f"{what} gives boxes, but the tasks predicted are {', '.join(self.tasks)}; a task that predicts boxes "
                "is needed; load the network with it"
            )
        return self.boxes


def _image_id(source: str) -> str:
    file, _, frame = source.rpartition("#")
    if frame.isdigit() and is_video(file):
        return f"{Path(file).stem}#{frame}"
    return Path(source).stem if Path(source).suffix.lower() in SUFFIXES else source


def save_picture(path: Path, drawn: Image.Image) -> Path:
    """Write an image file and never over another one; folders are made. Raises ValueError where the file exists."""
    path, buffer = home_path(path), io.BytesIO()
    kind = picture_format(path)
    try:
        drawn.save(buffer, format=kind)
    except (ValueError, OSError) as error:  # WebP holds 16,383 pixels a side
        raise ValueError(
            f"{path} cannot hold this picture of {drawn.width}x{drawn.height} pixels ({drawn.mode}): {error}; a format "
            "that can is needed; choose .png"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        raise ValueError(f"{path} exists already; nothing is written over; choose another name") from None
    try:
        with atomic_write(path, num_bytes=buffer.tell()) as file:
            file.write(buffer.getvalue())
    except BaseException:  # Ctrl-C, too, leaves no empty file in the way of the next try
        path.unlink(missing_ok=True)
        raise
    return path


class Predictor:
    """A trained network, ready for images of any size: `predictor("photo.jpg")` is a `Result`.

    Images are resized, padded and batched as in evaluation, in the run's precision. The numbers are those of
    `tools/eval.py` bit for bit where the batches are the same (`batch_size` images in their order), single images
    those of an evaluation with --batch-size 1. Another size of batch may take another convolution or matrix algorithm,
    which moves the last bits; so may `compile`. The size of an image never matters to another one in its batch.
    A task with `classes` chooses among all of them, but for a `Sample`, as in evaluation, among those that its data set
    annotates.

    Several threads may use one predictor at the same time and get what they would get in turn.
    """

    def __init__(
        self,
        opened: Opened,
        tasks: Sequence[str] | None = None,
        precision: Precision | None = None,
        *,
        batch_size: int | None = None,
        threads: int = 1,
        compile: bool = False,
    ) -> None:
        """opened: as `engine.checkpoint.open_model` gives it; `visionmtl.load` does both.

        tasks: only these are computed, and nothing that serves the others alone is kept; None = all of the run
        precision: "fp32", or half precision "bf16" or "fp16" (autocast); None = the run's, as in `tools/eval.py`
        batch_size: images computed together, of lists, folders and videos; None = the run's train.batch_size
        threads: decode image files ahead in so many threads; 0 = each when it is needed
        compile: compile the network at its first call, for one image and for `batch_size` images; smaller batches are
            filled up, so that no other graph is needed
        """
        numbers: tuple[tuple[str, Any, int], ...] = (("batch_size", batch_size, 1), ("threads", threads, 0))
        for name, value, least in numbers:
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
                raise ValueError(f"{name} is {value!r}; {least} or more, a whole number, is allowed; correct it")
        if precision is not None and precision not in get_args(Precision):
            raise ValueError(f"precision is {precision!r}; allowed are {', '.join(get_args(Precision))}; correct it")
        self.net, self.run = opened.net, opened.run
        self.name = opened.name
        self.precision: Precision = precision or opened.run.train.precision
        self.batch_size = batch_size or opened.run.train.batch_size
        self.threads = threads
        self.net.keep(list(choose_tasks(self.net.tasks, tasks)))
        self._compiled = torch.compile(self.net, fullgraph=True, dynamic=False) if compile else None
        self._compiling = Lock()  # the compiler makes one graph at a time

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": self._compiled is not None, "_compiling": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_compiling": Lock()}
        self._compiled = torch.compile(self.net, fullgraph=True, dynamic=False) if state["_compiled"] else None

    def __repr__(self) -> str:
        return f"Predictor({self.name!r}, {', '.join(self.net.tasks)}, on {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.net.mean.device

    @overload
    def __call__(
        self,
        source: PixelInput | Sample,
        *,
        tasks: Sequence[str] | None = None,
        intrinsics: Intrinsics | None = None,
        progress: bool = False,
    ) -> Result: ...
    @overload
    def __call__(
        self,
        source: Sequence[PixelInput | Sample | str | Path],
        *,
        tasks: Sequence[str] | None = None,
        intrinsics: Intrinsics | None = None,
        progress: bool = False,
    ) -> list[Result]: ...
    @overload
    def __call__(
        self,
        source: str | Path | Iterator[PixelInput | Sample | str | Path],
        *,
        tasks: Sequence[str] | None = None,
        intrinsics: Intrinsics | None = None,
        progress: bool = False,
    ) -> Any: ...

    def __call__(
        self,
        source: Any,
        *,
        tasks: Sequence[str] | None = None,
        intrinsics: Intrinsics | None = None,
        progress: bool = False,
    ) -> Any:
        """The result of an image: a file, NumPy uint8 [H, W, 3] RGB, torch uint8 [3, H, W], Pillow's, or a `Sample`.

        A list of these, of any sizes, gives a list; a folder with those in it, a video file, camera:0 or an iterator of
        images gives an iterator, which reads as it goes. A video that was cut short ends with a ValueError.

        tasks: only these decoders run in this call; None = all of the predictor
        intrinsics: (fx, fy, cx, cy) in pixels of the image, which place boxes in space; None = a sample's own, if known
        progress: show a bar on stderr
        """
        chosen = choose_tasks(self.net.tasks, tasks)
        if intrinsics is not None:
            intrinsics = checked_intrinsics(intrinsics, chosen)
        stream = partial(self._stream, tasks=chosen, intrinsics=intrinsics)
        if isinstance(source, str | Path):
            if str(source).startswith("~"):  # the address of a stream is no path
                source = home_path(source)
            if is_video(str(source)):
                frames = (_Image(frame, f"{source}#{number}") for number, frame in enumerate(whole_frames(str(source))))
                # a camera's frame should not wait for the next ones
                size = 1 if str(source).startswith("camera:") else self.batch_size
                total = count_frames(str(source)) if progress else None
                return _with_progress(stream(frames, size), total, progress)
            if not str(source):
                raise ValueError("the path is empty; a file, a folder, a video or camera:0 is needed; correct it")
            if Path(source).is_dir():
                files = list_images(Path(source))
                if not files:
                    raise ValueError(f"{source} is a folder without images; one or more are needed; correct the path")
                return _with_progress(stream(self._read_ahead(files), self.batch_size), len(files), progress)
        elif isinstance(source, list | tuple):
            return list(_with_progress(stream(self._read_ahead(source), self.batch_size), len(source), progress))
        elif isinstance(source, Iterator):
            return _with_progress(stream(map(_pixels, source), self.batch_size), None, progress)
        return next(stream([_pixels(source)], 1))

    def _read_ahead(self, sources: Sequence[Any]) -> Iterator["_Image"]:
        """Each image, in order; files are decoded by threads while the network computes."""
        if not self.threads or not any(isinstance(source, str | Path) for source in sources):
            yield from map(_pixels, sources)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: deque[Future[_Image]] = deque()
            for source in sources:
                waiting.append(pool.submit(_pixels, source))
                if len(waiting) > 2 * self.batch_size:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _stream(
        self, images: Iterable["_Image"], batch_size: int, tasks: Mapping[str, Task], intrinsics: Intrinsics | None
    ) -> Iterator[Result]:
        images, size = iter(images), self.run.data.input_size
        while batch := list(islice(images, batch_size)):
            if self._compiled is None:
                predictions = _predict(self.net, batch, size, self.precision, batch_size, list(tasks))
            else:
                check_pixels([image.pixels for image in batch], self.net.in_chans)
                filled = [*batch, *batch[-1:] * (batch_size - len(batch))]
                with self._compiling:
                    predictions = _predict_batch(
                        self.net, filled, size, self.precision, list(tasks), forward_with=self._compiled
                    )
            for image, of_image in zip(batch, predictions, strict=False):
                yield Result.of(
                    image.pixels, image.source, of_image, tasks, self.net.spaces, intrinsics or image.intrinsics
                )


def load(
    path: str | Path,
    device: str | int | torch.device | None = None,
    tasks: Sequence[str] | None = None,
    precision: Precision | None = None,
    *,
    batch_size: int | None = None,
    threads: int = 1,
    compile: bool = False,
    allow_import: Sequence[str] = (),
) -> Predictor:
    """The network of a checkpoint, or of a run folder (its best checkpoint, else its last).

    device: as torch names them, or the number of a CUDA device; None = CUDA where there is one, else the CPU
    tasks: only these are computed; None = all of the run
    precision: "fp32", "bf16" or "fp16"; None = the run's, so that the numbers are those of `tools/eval.py`
    batch_size, threads, compile: see `Predictor`
    allow_import: modules of plug-ins that the checkpoint may import, which runs them
    """
    chosen = choose_device("auto" if device is None else f"cuda:{device}" if isinstance(device, int) else str(device))
    with allow_imports(allow_import):
        opened = open_model(path, chosen)
    return Predictor(opened, tasks, precision, batch_size=batch_size, threads=threads, compile=compile)


def checked_intrinsics(intrinsics: Any, tasks: Mapping[str, Task]) -> Intrinsics:
    """As four numbers. Raises ValueError for those of no camera, and for tasks that place nothing in space."""
    try:
        fx, fy, cx, cy = (float(value) for value in intrinsics)
    except (TypeError, ValueError):
        fx = fy = cx = cy = math.nan
    if not all(map(math.isfinite, (fx, fy, cx, cy))) or min(fx, fy) <= 0:
        raise ValueError(
            f"intrinsics are {intrinsics!r}; (fx, fy, cx, cy) in pixels with focal lengths above 0 are needed; correct "
            "them"
        )
    if missing := {"boxes", "depth_m"} - {task.result_field for task in tasks.values()}:
        raise ValueError(
            f"intrinsics would have no effect: they place boxes in space, which needs boxes and depth, and the tasks "
            f"{', '.join(tasks)} do not predict {' and '.join(sorted(missing))}; leave them out, or predict both"
        )
    return fx, fy, cx, cy


def _with_progress(results: Iterator[Result], total: int | None, progress: bool) -> Iterator[Result]:
    if not progress:
        return results
    from rich.progress import track

    from visionmtl.config.console import Console

    return iter(track(results, "images", total=total, console=Console(stderr=True)))


def choose_tasks(tasks: Mapping[str, Task], names: Sequence[str] | None) -> dict[str, Task]:
    """The tasks of these names, in the order of the run; None = all. Raises ValueError for a name it does not have."""
    if names is not None and (isinstance(names, str) or not isinstance(names, Collection) or not names):
        raise ValueError(
            f"tasks is {names!r}; a list of one name or more is needed, or None for all; this run has "
            f"{', '.join(tasks)}; correct it"
        )
    for name in names or ():
        if name not in tasks:
            raise ValueError(
                f"there is no task {name!r}{did_you_mean(name, tasks)}; this run has {', '.join(tasks)}; correct it"
            )
    return {name: task for name, task in tasks.items() if names is None or name in names}


def predict(
    net: MultiTaskNet,
    images: Sequence[Pixels],
    size: tuple[int, int],
    precision: Precision,
    batch_size: int,
    tasks: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Each image's predictions by task, at the image's own resolution.

    images: uint8 [H, W, 3] RGB of any sizes; size: (H, W) of the network's input (`run.data.input_size`); tasks: None =
    all. Runs where the network's weights are, in evaluation mode, and leaves the network in the mode it was in.
    """
    return _predict(net, [_Image(pixels) for pixels in images], size, precision, batch_size, tasks)


def _predict(
    net: MultiTaskNet,
    images: Sequence["_Image"],
    size: tuple[int, int],
    precision: Precision,
    batch_size: int,
    tasks: Sequence[str] | None,
) -> list[dict[str, Any]]:
    check_pixels([image.pixels for image in images], net.in_chans)
    was_training = net.training
    if was_training:  # threads may share a network that is in evaluation mode
        net.eval()
    try:
        batches = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
        return [prediction for batch in batches for prediction in _predict_batch(net, batch, size, precision, tasks)]
    finally:
        if was_training:
            net.train()


@torch.inference_mode()
def _predict_batch(
    net: MultiTaskNet,
    images: Sequence["_Image"],
    size: tuple[int, int],
    precision: Precision,
    tasks: Sequence[str] | None = None,
    forward_with: Callable[..., Any] | None = None,
) -> list[dict[str, Any]]:
    """forward_with: the compiled network; None: the network."""
    resized, metas = zip(*(fit(image.pixels, size, net.size) for image in images), strict=True)
    metas = tuple(
        replace(meta, annotated=image.annotated) if image.annotated else meta
        for meta, image in zip(metas, images, strict=True)
    )
    batch = pad(resized, size).to(net.mean.device)
    raw = forward(net if forward_with is None else forward_with, batch, precision, tasks)
    by_task = {name: task.predict(raw[name], metas, size) for name, task in net.tasks.items() if name in raw}
    return [{name: of_task[i] for name, of_task in by_task.items()} for i in range(len(images))]


class _Image(NamedTuple):
    """uint8 [H, W, 3] RGB with the file it was read from, its camera and the classes annotated, where known."""

    pixels: Pixels
    source: str | None = None
    intrinsics: Intrinsics | None = None
    annotated: Mapping[str, NDArray[np.bool_]] = {}  # as in `Sample`


def _pixels(source: PixelInput | Sample | str | Path) -> _Image:
    """uint8 [H, W, 3] RGB with what is known of it."""
    if isinstance(source, Sample):
        return _Image(source.image, source.image_id, source.intrinsics, source.annotated)
    if isinstance(source, str) and "://" in source:
        raise ValueError(f"{source} is an address; image files of this machine are read; fetch it first")
    if isinstance(source, str | Path):
        return _Image(read_image(home_path(source)), str(source))
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.ndim != 3 or source.shape[0] != 3:
            raise ValueError(
                f"the image is a {source.dtype} tensor {list(source.shape)}; uint8 [3, H, W] RGB of 0..255 is needed; "
                "convert it, a batch image by image"
            )
        return _Image(source.permute(1, 2, 0).cpu().numpy())
    if isinstance(source, Image.Image):
        if source.mode.startswith(("I", "F")):
            raise ValueError(
                f"the image has Pillow's mode {source.mode!r}, whose white is unknown; 8 bits a channel are needed; "
                "convert it with the range you mean"
            )
        upright = ImageOps.exif_transpose(source)
        if upright.mode in ("La", "RGBa"):  # colours times transparency
            upright = upright.convert("LA" if upright.mode == "La" else "RGBA")
        if upright.has_transparency_data:
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
        return _Image(np.array(upright.convert("RGB")))
    if isinstance(source, np.ndarray):
        return _Image(source)
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
    """As `visualization.panels.draw_panels`; boxes below min_score are left out."""
    return draw_panels(tasks, spaces, image, rows, DrawOptions(min_score))
