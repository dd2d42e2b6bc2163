"""The vocabulary: every value that crosses a border, with axes, dtype, unit and what "missing" looks like.

Axes: B images, T tasks, H W image pixels, h w map cells, C channels, K classes, N boxes, M padded boxes, D detections.
Arrays (numpy) live on the CPU side of the loader, tensors after it.
A *level* l is a feature map of stride 2**l pixels; maps travel as dict[level, float [B, C, h, w]].
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE = 255  # class id of pixels nobody labelled; never a class
MAX_CLASSES = 255

Maps = dict[int, Tensor]
"""Feature maps by level: {3: float [B, C, H/8, W/8], ...}."""

Intrinsics = tuple[float, float, float, float]
"""Pinhole camera (fx, fy, cx, cy): focal lengths and principal point in pixels, in the coordinates of boxes, where the
top left corner of the image is (0, 0) and the centre of its first pixel (0.5, 0.5). OpenCV counts from that centre:
add 0.5 to its cx and cy."""


def has_controls(text: str) -> bool:
    """Whether a text holds control characters, C0, DEL or C1: line ends, tabs, and what a terminal obeys."""
    return any(sign < " " or "\x7f" <= sign <= "\x9f" for sign in text)


@dataclass(frozen=True)
class LabelSpace:
    """A named list of classes; class id = position. A task learns one space, a data set provides one per field."""

    name: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]  # RGB 0..255, one per class
    ids: tuple[int, ...] = ()  # ids in the official files (COCO's 1..90), one per class; () = same as the class id

    def __post_init__(self) -> None:
        if not 0 < len(self.classes) <= MAX_CLASSES or len(self.colours) != len(self.classes):
            raise ValueError(
                f"label space {self.name!r} has {len(self.classes)} classes and {len(self.colours)} colours; "
                f"allowed are 1 to {MAX_CLASSES} classes with one colour each; correct its definition"
            )
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(
                f"label space {self.name!r} has the class {twice!r} twice; each class has a name of its own; remove or "
                "rename one where the classes are named"
            )
        if odd := [name for name in self.classes if has_controls(name)]:
            raise ValueError(
                f"label space {self.name!r} has the class {odd[0]!r}; a name without control characters is needed, for "
                "terminals obey them; correct it where the classes are named"
            )
        if self.ids and len(self.ids) != len(self.classes):
            raise ValueError(
                f"label space {self.name!r} has {len(self.ids)} ids for {len(self.classes)} classes; "
                "allowed is one id a class, or none; correct its definition"
            )

    @property
    def official_ids(self) -> tuple[int, ...]:
        """The id of each class in official files, whether given or the class id."""
        return self.ids or tuple(range(len(self.classes)))

    def plain(self) -> dict[str, Any]:
        """The same as plain data, for checkpoints and JSON."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "colours": [list(colour) for colour in self.colours],
            "ids": list(self.ids),
        }

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> "LabelSpace":
        """Undo `plain`."""
        colours = tuple((int(r), int(g), int(b)) for r, g, b in plain["colours"])
        return LabelSpace(plain["name"], tuple(plain["classes"]), colours, tuple(plain["ids"]))


@dataclass(frozen=True, slots=True)
class Boxes:
    """Labelled boxes of one image; zero boxes means "looked, found none"."""

    xyxy: NDArray[np.float32]  # [N, 4] pixels, x2 and y2 exclusive
    labels: NDArray[np.int64]  # [N] class ids
    crowd: NDArray[np.bool_]  # [N] a region of many objects: neither hit nor miss
    area: NDArray[np.float32]  # [N] px^2 of the object's visible mask, or of the box where there is no mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image and what is known about it. A field that is None was not labelled."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB; where a data set says so, [H, W, C] of other channels
    image_id: str
    boxes: Boxes | None = None
    segmentation: NDArray[np.uint8] | None = None  # [H, W] class ids, IGNORE = not labelled
    depth_m: NDArray[np.float32] | None = None  # [H, W] metres along the optical axis, 0 = not measured
    normals: NDArray[np.float32] | None = None  # [H, W, 3] unit vectors, x right, y down, z forward; 0 0 0 = unknown
    image_labels: NDArray[np.int64] | None = None  # [N] class ids of the image as a whole, each once; N = 0: none fits
    disparity_px_metre: float | None = None  # stereo baseline (m) x focal length (px of the whole image); disparity
    # in px is this / depth_m; None = no stereo camera
    intrinsics: Intrinsics | None = None  # of the camera, for the whole image; of an augmented view for the view
    full_size: tuple[int, int] | None = None  # (H, W) of the labels where `image` is reduced, else None
    jpeg_scale: int = 1  # by which divisor, see `ReadRequest`
    annotated: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict, compare=False)
    # by label field, where a label space unites several: bool [K], the classes its data set looks for; absent = all

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels, to which boxes and maps refer."""
        return self.full_size or (self.image.shape[0], self.image.shape[1])


def as_rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3] to look at, of [H, W, C]: the first three channels, or the first one as grey where there are fewer."""
    if image.shape[2] == 3:
        return image
    chosen = image[..., :3] if image.shape[2] > 3 else np.repeat(image[..., :1], 3, axis=2)
    return np.ascontiguousarray(chosen)


def channels_shown(num_channels: int) -> str:
    """What `as_rgb` shows of an image of so many channels, for captions; "" for RGB."""
    if num_channels == 3:
        return ""
    return f"channel{'s 1 to 3' if num_channels > 3 else ' 1'} of {num_channels}"


LABEL_FIELDS = ("boxes", "segmentation", "depth_m", "normals", "image_labels")

JpegScale = Callable[[tuple[int, int]], int]
"""From the (H, W) of an image to the divisor, 1, 2, 4 or 8, at which it is still large enough."""


def at_full_size(size: tuple[int, int]) -> int:
    """The `JpegScale` that never reduces."""
    return 1


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What is needed of a sample; what is not need not be read.

    Of an image that is reduced by k, pixel (y, x) shows the square of k x k pixels at (k*y, k*x) of the whole one;
    where k does not divide a side, the last row or column may be there or not.
    """

    fields: frozenset[str]  # of LABEL_FIELDS
    choose_scale: JpegScale = at_full_size


EVERYTHING = ReadRequest(frozenset(LABEL_FIELDS))


@dataclass(frozen=True, slots=True)
class ImageMeta:
    """How an original image lies in the network's input: resized to content_size at the top left, then padding."""

    size: tuple[int, int]  # (H, W) of the original, pixels
    content_size: tuple[int, int]  # (H, W) it was resized to
    zoom: float = 1.0  # how much larger than at the size of training: everything looks that much nearer
    annotated: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict, compare=False)
    # see `Sample.annotated`; other classes are not predicted where a data set is to judge

    def content_of(self, values: NDArray[Any]) -> NDArray[Any]:
        """What lies over the image, without padding, of an array [H, W, ...] over the network's input; contiguous."""
        return np.ascontiguousarray(values[: self.content_size[0], : self.content_size[1]])


@dataclass(frozen=True, slots=True)
class Detections:
    """Predicted boxes of one image, best first."""

    xyxy: NDArray[np.float32]  # [D, 4] pixels of the original image
    scores: NDArray[np.float32]  # [D] 0..1
    labels: NDArray[np.int64]  # [D] class ids
    distance_m: NDArray[np.float32] | None = None  # [D] metres, NaN = not measured; filled for drawing only
    crowd: NDArray[np.bool_] | None = None  # [D] of truth for drawing: regions of many objects


@dataclass(frozen=True, slots=True)
class ImageClasses:
    """Predicted classes of a whole image, best first; a class that is not named has score 0."""

    labels: NDArray[np.int64]  # [N] class ids
    scores: NDArray[np.float32]  # [N] 0..1


@dataclass(frozen=True, slots=True)
class BadFile:
    """A sample that could not be read."""

    dataset: str
    index: int  # in its data set
    file: str | None  # of its image; None where the data set has no names of files
    error: str


@dataclass(slots=True)
class Batch:
    """Padded tensors of a shape fixed by the config."""

    image: Tensor  # uint8 [B, C, H, W], RGB unless the encoder has other `in_chans`
    targets: dict[str, dict[str, Tensor]]  # by task, then by the names its `collate` gives
    labelled: dict[str, Tensor]  # by task: bool [B]
    counts: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by task, as its `count` gives: float32 scalars
    color: Tensor | None = None  # float32 [B, 3, 4] for `ops.color.apply_matrices`; None = leave the colours alone
    metas: list[ImageMeta] = field(default_factory=list)  # filled for evaluation only, as are the next two
    samples: list[Sample] = field(default_factory=list)  # the originals
    datasets: list[str] = field(default_factory=list)  # names of their data sets
    bad_files: list[BadFile] = field(default_factory=list)
    # in training: what could not be read; in its place there is an unlabelled copy of another image

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`; from pinned memory, the host does not wait for the copies."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory; DataLoader's thread calls this."""
        return self._map(Tensor.pin_memory)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the batch."""
        yield self.image
        yield from self.labelled.values()
        for of_task in (*self.targets.values(), *self.counts.values()):
            yield from of_task.values()
        if self.color is not None:
            yield self.color

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            image=function(self.image),
            targets={task: {key: function(x) for key, x in of_task.items()} for task, of_task in self.targets.items()},
            labelled={task: function(x) for task, x in self.labelled.items()},
            counts={task: {key: function(x) for key, x in of_task.items()} for task, of_task in self.counts.items()},
            color=None if self.color is None else function(self.color),
        )
