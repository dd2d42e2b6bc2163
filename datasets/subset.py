"""A part of another data set, or all its images with a part of their labels: for held-out images and label curves."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from typing_extensions import Self

from visionmtl.datasets import Dataset, Locality, PartReader, most_boxes, num_channels, read_part, sample_names
from visionmtl.structures import LabelSpace, ReadRequest, Sample

LabelField = Literal["boxes", "segmentation", "depth_m", "normals", "image_labels"]
Fraction = Annotated[float, Field(gt=0, lt=1)]
NOISE_BLOCK_PX = 16


class Subset(Dataset):
    """Images of another data set in the order of a hash of their file names.

    Of their paths below the folder that holds them all, where folders hold files of one name; of their numbers, where
    they have none. Shards have an order of their own: write shards of the parts instead of taking parts of shards.

    So a part is the same everywhere, a larger fraction contains every smaller one, and parts that do not overlap have
    no image in common. Nothing is random.
    """

    type: Literal["subset"] = "subset"
    of: Dataset
    part: tuple[float, float] = (0.0, 1.0)
    """From which fraction of the images to which: [0, 0.1] are a tenth of them, [0.1, 1] the others."""
    labels: dict[LabelField, Fraction] = {}
    """Of the images in the part, the fraction that keeps a label; the others are not labelled there."""
    random_normals: bool = False
    """Give every image random normals, the same at each reading: labels that nothing in the image tells. A task that
    learns them is a control: what it does to the others is interference, not transfer."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        begin, end = self.part
        if not 0 <= begin < end <= 1:
            raise ValueError(f"part is [{begin}, {end}]; allowed is 0 <= begin < end <= 1; correct it")
        if (begin, end) == (0, 1) and not self.labels and not self.random_normals:
            raise ValueError(
                "part [0, 1] with all labels is the data set itself; a subset leaves something out or adds random "
                "normals; narrow `part`, set `labels` or `random_normals`, or use what stands in `of`"
            )
        if self.of.name or self.of.weight != 1:
            raise ValueError(
                f"of.name is {self.of.name!r}, of.weight {self.of.weight}; a name and a weight belong to the subset, "
                "so these would have no effect; set them beside `of`"
            )
        if self.random_normals and "normals" in self.labels:
            raise ValueError(
                "random_normals is set, and `labels` keeps a fraction of the normals; random ones are on every image; "
                "remove one of the two"
            )
        return self

    def build(self) -> "_Reader":
        return _Reader(self)


class _Reader(PartReader):
    def __init__(self, spec: Subset) -> None:
        self._spec = spec
        self._reader = reader = spec.of.build()
        self.channels = num_channels(reader)
        self.most_boxes = most_boxes(reader)
        if unknown := [field for field in spec.labels if field not in reader.provides]:
            raise ValueError(
                f"labels of a subset of {spec.of.type} names {unknown[0]!r}, which that data set does not provide; it "
                f"provides {', '.join(reader.provides)}; correct `labels`"
            )
        ranked = np.array(_ranked(reader), np.int64)
        begin, end = (round(fraction * len(ranked)) for fraction in spec.part)
        if begin == end:
            raise ValueError(
                f"part [{spec.part[0]}, {spec.part[1]}] of {len(ranked)} images of {spec.of.type} is empty; one image "
                "or more is needed; widen it"
            )
        chosen = ranked[begin:end]
        self._indices: NDArray[np.int64] = np.sort(chosen)
        lies: Locality | None = getattr(reader, "locality", None)
        self.locality = None if lies is None else lies.of(self._indices)
        self._labelled = {
            field: np.isin(self._indices, chosen[: max(1, round(fraction * len(chosen)))])
            for field, fraction in spec.labels.items()
        }
        self.provides: Mapping[str, LabelSpace | None] = dict(reader.provides)
        if spec.random_normals:
            self.provides = {**reader.provides, "normals": None}
        self.notes = [*getattr(reader, "notes", ()), f"{len(chosen)} of {len(ranked)} images"]
        self.notes += [f"{field}: labels of {flags.sum()} images" for field, flags in self._labelled.items()]

    def __len__(self) -> int:
        return len(self._indices)

    def __getattr__(self, name: str) -> Any:
        if name in ("file", "label_files", "sample_name", "fetch"):  # which not every reader has
            of_reader: Callable[[int], Any] = getattr(self._reader, name)
            return lambda index: of_reader(int(self._indices[index]))
        raise AttributeError(name)

    def read_part(self, index: int, request: ReadRequest) -> Sample:
        dropped = {field for field, flags in self._labelled.items() if not flags[index]}
        if self._spec.random_normals:
            dropped.add("normals")
        number = int(self._indices[index])
        sample = read_part(self._reader, number, replace(request, fields=request.fields - dropped))
        nothing: dict[str, Any] = dict.fromkeys(dropped)
        sample = replace(sample, **nothing)
        if self._spec.random_normals and "normals" in request.fields:
            sample = replace(sample, normals=_random_normals(number, sample.size))
        return sample


def _ranked(reader: Any) -> list[int]:
    """All indices of a reader in the order of their hashes."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in sample_names(reader)]
    return sorted(range(len(digests)), key=lambda index: (digests[index], index))


def _random_normals(number: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """[H, W, 3] unit vectors, one for each block of NOISE_BLOCK_PX pixels, in all directions alike."""
    blocks = [-(-side // NOISE_BLOCK_PX) for side in size]
    vectors = np.random.default_rng([number, 1]).normal(size=(*blocks, 3))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    full = vectors.astype(np.float32).repeat(NOISE_BLOCK_PX, axis=0).repeat(NOISE_BLOCK_PX, axis=1)
    return np.ascontiguousarray(full[: size[0], : size[1]])
