"""The benchmarks' protocols by name: what each scores, at which size and by which rules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionmtl.config.registry import did_you_mean
from visionmtl.data.label_spaces import Spaces
from visionmtl.datasets import DatasetReader, NamedDataset, read_part
from visionmtl.metrics.base import Meter, Results
from visionmtl.metrics.depth import NYU_EIGEN_LIMITS_M, NYU_SIZE, DepthMeter
from visionmtl.metrics.detection import DetectionMeter
from visionmtl.metrics.disparity import DisparityMeter
from visionmtl.metrics.normals import NormalsMeter
from visionmtl.metrics.segmentation import SegmentationMeter
from visionmtl.structures import LabelSpace, ReadRequest, Sample
from visionmtl.tasks.base import Task
from visionmtl.tasks.detection import Detection

CITYSCAPES_CATEGORIES = {
    "flat": ("road", "sidewalk"),
    "construction": ("building", "wall", "fence"),
    "object": ("pole", "traffic light", "traffic sign"),
    "nature": ("vegetation", "terrain"),
    "sky": ("sky",),
    "human": ("person", "rider"),
    "vehicle": ("car", "truck", "bus", "train", "motorcycle", "bicycle"),
}
_JUST_ABOVE_80_M = float(np.nextafter(np.float32(80), np.float32(81)))  # meters exclude the limit, Cityscapes includes


@dataclass(frozen=True)
class Part:
    """One thing a protocol scores: tasks that learn this field of `Sample`, in one of these label spaces."""

    field: str
    meter: Callable[[Task, LabelSpace | None], Meter]
    spaces: tuple[str, ...] = ()
    """() for what has no classes."""


@dataclass(frozen=True)
class Protocol:
    """A named way to score. What is printed under its name was made by its rules alone."""

    name: str
    says: str
    parts: tuple[Part, ...]
    size: tuple[int, int] | None = None
    """(H, W) px to which image and truth are brought before anything else; None: as they are."""
    of_size: tuple[int, int] | None = None
    """(H, W) px that images must have, for the benchmark's have it; None: any."""

    def makers(self, tasks: Mapping[str, Task], spaces: Spaces) -> dict[str, Callable[[], Meter]]:
        """By task that this protocol scores: what makes a fresh meter; `named` names its results.

        Raises ValueError when a task learns the right thing in another label space, or no task learns any.
        """
        makers: dict[str, Callable[[], Meter]] = {}
        for part in self.parts:
            learners = [name for name, task in tasks.items() if task.field == part.field]
            fitting = [name for name in learners if _name(spaces[name]) in (part.spaces or (None,))]
            if learners and not fitting:
                raise ValueError(
                    f"protocol {self.name!r} scores {part.field} in {' or '.join(part.spaces)}, but "
                    f"{', '.join(f'task {name!r} learns {_name(spaces[name])}' for name in learners)}; label spaces "
                    "must be those of the protocol; choose another protocol, or a checkpoint that learnt this one"
                )
            for name in fitting:
                makers[name] = partial(part.meter, tasks[name], spaces[name])
        if not makers:
            raise ValueError(
                f"protocol {self.name!r} scores {', '.join(part.field for part in self.parts)}, but the tasks learn "
                f"{', '.join(task.field for task in tasks.values())}; one of them is needed; choose another protocol"
            )
        return makers

    def named(self, results: Results) -> Results:
        """Results of its meters, whose `protocol` begins with its name."""
        return {
            name: result
            if result.get("protocol", self.name).startswith(self.name)
            else {**result, "protocol": f"{self.name}: {result['protocol']}"}
            for name, result in results.items()
        }

    def sources(self, sources: Sequence[NamedDataset]) -> list[NamedDataset]:
        """The data as this protocol wants it; where images must have a size, others are an error when they are read."""
        if self.size is not None:
            return [replace(source, reader=Resized(source.reader, self.size)) for source in sources]
        if self.of_size is not None:
            return [replace(source, reader=_OfSize(source.reader, self.of_size, self.name)) for source in sources]
        return list(sources)


@dataclass(frozen=True)
class Resized:
    """A reader whose samples are brought to one size: the image by area or bilinear, dense labels by nearest pixel."""

    reader: DatasetReader
    size: tuple[int, int]

    @property
    def provides(self) -> Mapping[str, LabelSpace | None]:
        """Those of the reader, without boxes."""
        return {name: space for name, space in self.reader.provides.items() if name != "boxes"}

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> Sample:
        """The sample at `size`; its boxes are left out."""
        sample = self.reader.read(index)
        height, width = self.size
        smaller = height * width < sample.image.shape[0] * sample.image.shape[1]
        interpolation = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        image = cv2.resize(sample.image, (width, height), interpolation=interpolation)
        labels: dict[str, Any] = {"boxes": None}
        if sample.intrinsics is not None:
            fx, fy, cx, cy = sample.intrinsics
            across, down = width / sample.size[1], height / sample.size[0]
            labels["intrinsics"] = fx * across, fy * down, cx * across, cy * down
        for name in ("segmentation", "depth_m", "normals"):
            if getattr(sample, name) is not None:
                labels[name] = _nearest(getattr(sample, name), self.size)
        image = np.asarray(image, np.uint8).reshape(height, width, -1)  # OpenCV drops the axis of a single channel
        return replace(sample, image=image, **labels)


class _OfSize:
    """A reader whose images must have one size."""

    def __init__(self, reader: DatasetReader, size: tuple[int, int], protocol: str) -> None:
        self.reader, self.size, self.protocol = reader, size, protocol

    def __getattr__(self, name: str) -> Any:
        if name == "reader":  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.reader, name)

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> Sample:
        """Raises ValueError for an image of another size."""
        return self._checked(self.reader.read(index))

    def read_part(self, index: int, request: ReadRequest) -> Sample:
        """The same of what is requested."""
        return self._checked(read_part(self.reader, index, request))

    def _checked(self, sample: Sample) -> Sample:
        if sample.size != self.size:
            raise ValueError(
                f"image {sample.image_id!r} is {sample.size[0]}x{sample.size[1]} px; protocol {self.protocol!r} is "
                f"defined for {self.size[0]}x{self.size[1]}; give the data set's own files, or leave --protocol out"
            )
        return sample


def _nearest(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Each pixel takes the value that lies under its centre: nothing is mixed, invalid stays invalid."""
    rows, columns = ((np.arange(to) * 2 + 1) * of // (2 * to) for to, of in zip(size, values.shape, strict=False))
    return np.ascontiguousarray(values[rows[:, None], columns])


def _name(space: LabelSpace | None) -> str | None:
    return None if space is None else space.name


def _boxes(task: Task, space: LabelSpace | None) -> Meter:
    assert space is not None
    assert isinstance(task, Detection)
    return DetectionMeter(space, backend=task.ap_backend)


def _pixels(task: Task, space: LabelSpace | None) -> Meter:
    assert space is not None
    return SegmentationMeter(space)


def _categories(task: Task, space: LabelSpace | None) -> Meter:
    assert space is not None
    return SegmentationMeter(space, CITYSCAPES_CATEGORIES if space.name == "cityscapes19" else None)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "coco",
            "box AP of COCO's 80 classes: IoU .50:.05:.95, 101 recalls, at most 100 detections an image and class",
            (Part("boxes", _boxes, ("coco80",)),),
        ),
        Protocol(
            "cityscapes",
            "19 classes in one confusion matrix at 1024x2048; depth per image, 0 < truth <= 80 m, no crop",
            (
                Part("segmentation", _pixels, ("cityscapes19",)),
                Part("depth_m", lambda task, space: DepthMeter("per_image", 1e-3, _JUST_ABOVE_80_M)),
            ),
            of_size=(1024, 2048),
        ),
        Protocol(
            "nyu_eigen",
            "depth papers: crop 45:471 x 41:601 of 480x640, 1e-3 < truth < 10 m, mean over images",
            (Part("depth_m", lambda task, space: DepthMeter("nyu_eigen", *NYU_EIGEN_LIMITS_M)),),
            of_size=NYU_SIZE,
        ),
        Protocol(
            "nyu_median",
            "each predicted depth scaled by median(truth) / median(prediction) of its image, 1e-3 < truth < 10 m; then "
            "errors per valid pixel, no crop",
            (Part("depth_m", lambda task, space: DepthMeter("nyu_median", *NYU_EIGEN_LIMITS_M)),),
            of_size=NYU_SIZE,
        ),
        Protocol(
            "nyu13_288x384",
            "multi-task tables: everything at 288x384; 13 classes; depth errors and normal angles per valid pixel",
            (
                Part("segmentation", _pixels, ("nyu13",)),
                Part("depth_m", lambda task, space: DepthMeter("pooled", 1e-3, 10.0)),
                Part("normals", lambda task, space: NormalsMeter()),
            ),
            (288, 384),
        ),
        Protocol(
            "nyu_joint",
            "boxes, classes and metres of one network: COCO's box AP of 19 classes, one confusion matrix of 13 or 40 "
            "classes, depth as nyu_eigen; everything at 480x640 (docs/results.md)",
            (
                Part("boxes", _boxes, ("nyu_things19",)),
                Part("segmentation", _pixels, ("nyu13", "nyu40")),
                Part("depth_m", lambda task, space: DepthMeter("nyu_eigen", *NYU_EIGEN_LIMITS_M)),
            ),
            of_size=NYU_SIZE,
        ),
        Protocol(
            "nyu40",
            "multi-task papers: 40 classes at 480x640; depth errors and normal angles per valid pixel",
            (
                Part("segmentation", _pixels, ("nyu40",)),
                Part("depth_m", lambda task, space: DepthMeter("pooled", 1e-3, 10.0)),
                Part("normals", lambda task, space: NormalsMeter()),
            ),
            of_size=NYU_SIZE,
        ),
        Protocol(
            "cityscapes_disparity_128x256",
            "multi-task tables: everything at 128x256; 7 categories; errors of disparity as Cityscapes stores it, by "
            "65535 (1 = 256 px of 2048); sky and ego vehicle, without depth, are left out",
            (
                Part("segmentation", _categories, ("cityscapes7", "cityscapes19")),
                Part("depth_m", lambda task, space: DisparityMeter(1e-3, 1e4)),
            ),
            (128, 256),
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """Raises ValueError with the known names."""
    if name not in PROTOCOLS:
        known = "; ".join(f"{one.name} ({one.says})" for one in PROTOCOLS.values())
        raise ValueError(
            f"unknown protocol {name!r}{did_you_mean(name, PROTOCOLS)}; known are {known}; choose one of these names"
        )
    return PROTOCOLS[name]
