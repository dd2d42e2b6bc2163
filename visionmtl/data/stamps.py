"""What tells without reading them whether the images and files of a data set are those of another time."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionmtl.datasets import NamedDataset, sample_names


def stamps(source: NamedDataset) -> NDArray[np.int64]:
    """[N] of each sample a digest of the size and last change (ns) of its image and of every file with its labels."""

    @cache  # annotation files are those of many images
    def stamp(file: str) -> tuple[int, int]:
        try:
            status = Path(file).stat()
        except FileNotFoundError:  # labels may be missing
            return 0, 0
        return status.st_size, status.st_mtime_ns

    found = np.zeros(len(source), np.int64)
    for index in range(len(source)):
        image = source.file(index)
        files = [*([] if image is None else [image]), *map(str, source.label_files(index))]
        digest = hashlib.blake2b(json.dumps([stamp(file) for file in files]).encode(), digest_size=8)
        found[index] = int.from_bytes(digest.digest(), "little", signed=True)
    return found


def image_lists(sources: Sequence[NamedDataset]) -> dict[str, list[int | str]]:
    """By data set the number of its images, and a digest of their names in order; the same wherever it lies."""
    return {
        one.name: [len(one), hashlib.blake2b(json.dumps(sample_names(one.reader)).encode(), digest_size=8).hexdigest()]
        for one in sources
    }
