"""Boxes of an instances file for images that are known by their file name without folder and ending."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from visionmtl.ops.coco_json import read_boxes
from visionmtl.ops.file_names import check_distinct
from visionmtl.structures import Boxes


class BoxesByStem:
    """The boxes of an instances file, in the order of the images that are read."""

    def __init__(self, file: Path, stems: Sequence[str], advice: str) -> None:
        """stems: file names of the images without folder and ending, each once; advice: how to get a sound file."""
        self.file, self._packed, self._advice = file, read_boxes(file), advice
        self.ids = tuple(number for number, _ in self._packed.categories)
        """Official ids of the classes."""
        self.names = tuple(name for _, name in self._packed.categories)
        listed = [Path(self._packed.name(row)).stem for row in range(len(self._packed))]
        check_distinct(listed, f"{file}, file_name without folder and ending", "correct or remove an entry")
        row_of = {stem: row for row, stem in enumerate(listed)}
        self._rows = np.array([row_of.get(stem, -1) for stem in stems])

        self.notes = self._packed.report()
        """What is odd about the file, a sentence each."""
        missing, others = int((self._rows < 0).sum()), len(set(listed).difference(stems))
        if missing == len(stems):
            raise ValueError(
                f"{file} lists none of the {missing} images of the split; an entry in `images` says that somebody "
                f"looked for boxes; leave boxes out of `labels`, or {advice}"
            )
        if missing:
            self.notes.append(f"{file} does not list {missing} of {len(stems)} images: boxes not labelled there")
        if others:
            self.notes.append(f"{file}: {others} of its {len(listed)} images are not in the split")

    def of(self, index: int, size: tuple[int, ...], image: Path) -> Boxes | None:
        """None for an image that the file does not list: nobody looked. size: (H, W) of the image as it was read."""
        row = int(self._rows[index])
        if row < 0:
            return None
        if self._packed.size(row) not in (size, (0, 0)):
            raise ValueError(
                f"{image} is {size}, {self._packed.file} says {self._packed.size(row)} (height, width); boxes would "
                f"not fit; {self._advice}"
            )
        return self._packed.of(row, size)
