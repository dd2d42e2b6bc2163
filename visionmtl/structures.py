"""The vocabulary: every value that crosses a border, with axes, dtype, unit and what "missing" looks like.

Axes: B images, T tasks, H W image pixels, h w map cells, C channels, K classes, N boxes, M padded boxes, D detections.
Arrays (numpy) live on the CPU side of the loader, tensors after it.
A *level* l is a feature map of stride 2**l pixels; maps travel as dict[level, float [B, C, h, w]].
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IGNORE = 255  # class id of pixels nobody labelled; never a class
MAX_CLASSES = 255

Maps = dict[int, Tensor]
"""Feature maps by level: {3: float [B, C, H/8, W/8], ...}."""


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
        if self.ids and len(self.ids) != len(self.classes):
            raise ValueError(
                f"label space {self.name!r} has {len(self.ids)} ids for {len(self.classes)} classes; "
                "allowed is one id a class, or none; correct its definition"
            )

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


@dataclass(frozen=True, slots=True)
class Jpeg:
    """A photograph as its file holds it, for the device to decode."""

    content: NDArray[np.uint8]  # [N] bytes of the whole file
    size: tuple[int, int]  # (H, W) in pixels, once it is turned
    orientation: int  # 1 to 8, as EXIF counts them: how to turn what is decoded; 1 = leave it
    file: str  # for messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image and what is known about it. A field that is None was not labelled."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB; [0, 0, 3] where `jpeg` holds it
    image_id: str
    boxes: Boxes | None = None
    segmentation: NDArray[np.uint8] | None = None  # [H, W] class ids, IGNORE = not labelled
    depth_m: NDArray[np.float32] | None = None  # [H, W] metres along the optical axis, 0 = not measured
    normals: NDArray[np.float32] | None = None  # [H, W, 3] unit vectors, x right, y down, z forward; 0 0 0 = unknown
    disparity_px_metre: float | None = None  # stereo baseline (m) x focal length (px of the whole image); disparity
    # in px is this / depth_m; None = no stereo camera
    full_size: tuple[int, int] | None = None  # (H, W) of the labels where `image` is reduced, else None
    jpeg_scale: int = 1  # by which divisor, see `ReadRequest`
    jpeg: Jpeg | None = None  # the image, where it was wanted `encoded`

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels, to which boxes and maps refer."""
        whole = self.full_size or (self.jpeg and self.jpeg.size)
        return whole or (self.image.shape[0], self.image.shape[1])


LABEL_FIELDS = ("boxes", "segmentation", "depth_m", "normals")

JpegScale = Callable[[tuple[int, int]], int]
"""From the (H, W) of an image to the divisor, 1, 2, 4 or 8, at which it is still large enough."""


def at_full_size(size: tuple[int, int]) -> int:
    """The `JpegScale` that never reduces."""
    return 1


@dataclass(frozen=True, slots=True)
class Photo:
    """A decoded photograph, perhaps reduced, or one that is not decoded (see `ReadRequest`)."""

    pixels: NDArray[np.uint8]  # [h, w, 3] RGB; [0, 0, 3] where `jpeg` holds them
    full_size: tuple[int, int]  # (H, W) of the whole one
    jpeg_scale: int  # h = H / jpeg_scale, rounded up
    jpeg: Jpeg | None = None


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What is needed of a sample; what is not need not be read.

    Of an image that is reduced by k, pixel (y, x) shows the square of k x k pixels at (k*y, k*x) of the whole one;
    where k does not divide a side, the last row or column may be there or not.
    """

    fields: frozenset[str]  # of LABEL_FIELDS
    choose_scale: JpegScale = at_full_size
    encoded: bool = False  # the image is wanted as `Sample.jpeg`; a reader of other files gives pixels, or an error


EVERYTHING = ReadRequest(frozenset(LABEL_FIELDS))


@dataclass(frozen=True, slots=True)
class ImageMeta:
    """How an original image lies in the network's input: resized to content_size at the top left, then padding."""

    size: tuple[int, int]  # (H, W) of the original, pixels
    content_size: tuple[int, int]  # (H, W) it was resized to
    zoom: float = 1.0  # how much larger than at the size of training: everything looks that much nearer


@dataclass(frozen=True, slots=True)
class Detections:
    """Predicted boxes of one image, best first."""

    xyxy: NDArray[np.float32]  # [D, 4] pixels of the original image
    scores: NDArray[np.float32]  # [D] 0..1
    labels: NDArray[np.int64]  # [D] class ids


@dataclass(frozen=True, slots=True)
class View:
    """What a batch shows of a JPEG: a rectangle of the photograph, resized, and mirrored last."""

    file: str  # for messages
    num_bytes: int
    size: tuple[int, int]  # (H, W) of the photograph, once it is turned
    orientation: int  # see `Jpeg`
    top: int  # the rectangle, in pixels of the turned photograph
    left: int
    crop: tuple[int, int]  # (h, w)
    choose_scale: int  # divides `crop`: means of squares of so many pixels are enough
    out: tuple[int, int]  # (h, w) in pixels of the network's input, whose top left it fills
    mirrored: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """The images of a batch before the device decodes them."""

    content: Tensor  # uint8 [N] on the CPU: one JPEG file after the other
    views: list[View]  # B
    size: tuple[int, int]  # (H, W) of the padded images

    def pin_memory(self) -> "Encoded":
        """What DataLoader calls: it looks into no dataclass by itself."""
        return replace(self, content=self.content.pin_memory())


@dataclass(slots=True)
class Batch:
    """Padded tensors of a shape fixed by the config."""

    image: Tensor  # uint8 [B, 3, H, W], RGB; [B, 3, 0, 0] as long as there is `encoded`
    targets: dict[str, dict[str, Tensor]]  # by task, then by the names its `collate` gives
    labelled: dict[str, Tensor]  # by task: bool [B]
    metas: list[ImageMeta] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)  # the originals; filled for evaluation only
    sources: list[str] = field(default_factory=list)  # names of their data sets; as above
    colour: Tensor | None = None  # float32 [B, 3, 4] for `ops.colour.apply_matrices`; None = leave the colours alone
    encoded: Encoded | None = None  # `image` before it is decoded; `colour` is then that of images of mean grey 1
