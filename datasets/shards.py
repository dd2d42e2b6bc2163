"""Shards: a data set in tar files with an index, in a folder, on a web server or in an object store.

    {type: shards, root: /data/shards/train}   or   {type: shards, root: "https://example.org/shards/train"}

`visionmtl prepare shards CONFIG DST` writes them from any other data set; `visionmtl.io.shards` describes the format.
Samples are those of the data set they were made from, bit for bit. From a URL whole shards are fetched into a folder of
bounded size, checked, and removed again when others need the room; training reads them shard by shard. Licence: that of
the images.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from visionmtl.datasets import Dataset, Locality, PartReader
from visionmtl.io.remote import RemoteFolder, StoreError, is_url
from visionmtl.io.shards import (
    INDEX,
    MAX_INDEX_BYTES,
    Members,
    ShardPlaces,
    key,
    read_index,
    read_members,
    read_places,
    shard_name,
    to_sample,
)
from visionmtl.structures import LabelSpace, ReadRequest, Sample

WINDOW = 8
_MAX_PLACES = 64  # shards whose index a process keeps in memory, about 1 MB each


class Shards(Dataset):
    """A data set in shards. What does not answer is asked again; then the run ends, and goes on with --resume."""

    type: Literal["shards"] = "shards"
    root: str
    """The folder or URL of index.json. URLs (https://, s3://, ...) need the extra `shards`."""
    window: Annotated[int, Field(ge=1)] | None = None
    """Shards among whose samples training is shuffled at a time. None: 8 of a URL; of a folder all, in the order of
    any other data set."""
    cache: Path | None = None
    """Of a URL: the folder for fetched shards, on a fast disk; None: in the user's cache (VISIONMTL_CACHE)."""
    cache_gb: Annotated[float, Field(gt=0)] = 20.0
    """Of a URL: what fetched shards may take; those used last stay. Twice `window` shards must fit."""
    retries: Annotated[int, Field(ge=0, le=20)] = 6
    """Of a URL: further attempts where it does not answer, after 1, 2, 4, ... seconds."""
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Of a URL: how long it may be silent in an attempt."""

    @field_validator("root")
    @classmethod
    def _files_can_lie_below(cls, root: str) -> str:
        if not is_url(root):
            return root
        scheme, mark, rest = root.partition("://")
        if scheme.lower() in ("http", "https") and (found := re.search("[?#]", rest)):
            raise ValueError(
                f"root {root} has a {found[0]!r}, behind which no name of a file can follow; a URL to which "
                f"/{INDEX} can be added is needed; leave out what begins with {found[0]!r}, or copy the shards into a "
                "folder where a server demands it"
            )
        return scheme.lower() + mark + rest

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        fields = type(self).model_fields
        names = ("cache", "cache_gb", "retries", "timeout_s")
        idle = [name for name in names if getattr(self, name) != fields[name].default]
        if idle and not is_url(self.root):
            raise ValueError(
                f"{', '.join(idle)} would have no effect, since root {self.root} is a folder, whose shards are read "
                "where they lie; these are for URLs; remove them"
            )
        return self

    def build(self) -> "ShardsReader":
        return ShardsReader(self)


class ShardsReader(PartReader):
    """The samples in the order of the data set that they were made from."""

    def __init__(self, spec: Shards) -> None:
        self._root = spec.root.rstrip("/")
        self._remote: RemoteFolder | None = None
        if is_url(spec.root):
            folder = spec.cache or RemoteFolder.default_folder(self._root)
            self._remote = RemoteFolder(self._root, folder, int(spec.cache_gb * 1e9), spec.retries, spec.timeout_s)
            self._index_file = self._remote.listing(INDEX, MAX_INDEX_BYTES)
        else:
            self._index_file = Path(self._root) / INDEX
            if not self._index_file.is_file():
                raise ValueError(
                    f"found no {self._index_file}; it lists the shards of a data set; write them with `visionmtl "
                    "prepare shards CONFIG DST`, wait until that is done, or correct `root`"
                )
        index = read_index(self._index_file, f"{self._root}/{INDEX}")
        self.provides: dict[str, LabelSpace | None] = index.provides
        self.channels, self.most_boxes = index.channels, index.most_boxes
        self._shards = index.shards
        sizes = np.array([shard.num_samples for shard in index.shards], np.int64)
        self._ends = np.cumsum(sizes)
        window = spec.window or (WINDOW if self._remote else None)
        self.locality = None if window is None else Locality(sizes, window)
        """See `DatasetReader`."""
        self._places: dict[int, ShardPlaces] = {}
        num_bytes = sum(shard.tar.num_bytes for shard in index.shards)
        self.notes = [*index.notes, f"{len(sizes)} shards, {num_bytes / 1e9:.2f} GB, in {self._root}"]
        if self._remote:
            assert window is not None
            self._check_room(self._remote.limit_bytes, window)
            self.notes.append(f"fetched into {self._remote.folder}, at most {spec.cache_gb:g} GB")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_places": {}}  # workers read their own

    def __len__(self) -> int:
        return int(self._ends[-1])

    def file(self, index: int) -> str:
        """The shard and the sample's name in it."""
        return f"{self._root}/{shard_name(self._locate(index)[0])}.tar#{key(index)}"

    def label_files(self, index: int) -> list[Path]:
        """What changes when a sample does: the index, and the shard where it lies in a folder."""
        tar = [] if self._remote else [Path(self._root) / f"{shard_name(self._locate(index)[0])}.tar"]
        return [self._index_file, *tar]

    def read_part(self, index: int, request: ReadRequest) -> Sample:
        return to_sample(self.members(index), request, self.provides, self.file(index))

    def members(self, index: int) -> Members:
        """The files of a sample as they lie in the tar, by what follows its name and a dot."""
        number, position = self._locate(index)
        for attempt in (1, 2, 3):
            try:
                members = read_members(self._file(number, "tar"), self._read_places(number).samples[position])
            except FileNotFoundError as error:
                if self._remote is None:
                    raise self._damaged(index, "is missing") from error
                continue  # it was removed for another shard, between finding and opening it
            if members is not None:
                return members
            if self._remote is None:
                raise self._damaged(index, "has another checksum than when it was written")
            if attempt < 3:
                self._remote.discard(f"{shard_name(number)}.tar", self._shards[number].tar.sha256)
        assert self._remote is not None
        raise StoreError(
            f"{self.file(index)} was fetched three times and could not be read whole from {self._remote.folder}; a "
            "disk that keeps what is written, with room for the shards, is needed; check it, or set `cache`"
        )

    def fetch(self, index: int) -> None:
        """Bring the shard of a sample near, in one attempt; does nothing where it lies in a folder."""
        if self._remote is None:
            return
        number = self._locate(index)[0]
        for ending in ("json", "tar"):
            self._file(number, ending, ahead=True)

    def _locate(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its position there."""
        if not 0 <= index < len(self):
            raise IndexError(f"no sample {index}; allowed are 0 to {len(self) - 1}; correct the index")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number] - self._shards[number].num_samples)

    def _file(self, number: int, ending: Literal["tar", "json"], ahead: bool = False) -> Path:
        name, shard = f"{shard_name(number)}.{ending}", self._shards[number]
        if self._remote is None:
            return Path(self._root) / name
        entry = shard.tar if ending == "tar" else shard.index
        return self._remote.file(name, entry.num_bytes, entry.sha256, ahead)

    def _read_places(self, number: int) -> ShardPlaces:
        if number not in self._places:
            shard, place = self._shards[number], f"{self._root}/{shard_name(number)}.json"
            places = read_places(self._file(number, "json"), shard.tar.num_bytes, place)
            first = int(self._ends[number]) - shard.num_samples
            if (len(places.samples), places.first) != (shard.num_samples, first):
                raise ValueError(
                    f"{place} has {len(places.samples)} samples from {places.first} on, "
                    f"and {INDEX} says {shard.num_samples} from {first} on; the two belong together; write the data "
                    "set again, or copy all of it"
                )
            while len(self._places) >= _MAX_PLACES:
                self._places.pop(next(iter(self._places)))
            self._places[number] = places
        return self._places[number]

    def _damaged(self, index: int, what: str) -> ValueError:
        return ValueError(
            f"{self.file(index)} {what}; shards stay as they were written; copy the shard again, or write the data set "
            "anew with `visionmtl prepare shards`"
        )

    def _check_room(self, limit_bytes: int, window: int) -> None:
        """The shards of one window are read while those of the next are fetched."""
        largest = max(shard.tar.num_bytes + shard.index.num_bytes for shard in self._shards)
        needed = largest * min(2 * window, len(self._shards))
        if limit_bytes < needed:
            raise ValueError(
                f"cache_gb of {self._root} is {limit_bytes / 1e9:g}, and twice `window` = {window} shards of up to "
                f"{largest / 1e9:.2g} GB take {needed / 1e9:.2g} GB; so many must fit; raise cache_gb, or lower window"
            )
