"""Rows of the tests of bad input: what is spoilt in which reader's files, and the answer that is due."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_layouts import LAYOUTS

from visionmtl.structures import Sample

Spoil = Callable[[Path], Any]
"""Spoils a file. What it returns, if anything, is the picture that should be read nevertheless."""


@dataclass(frozen=True)
class Row:
    """One thing spoilt in one file of one reader's data set."""

    item: str
    reader: str
    file: str
    spoil: Spoil
    refused: str = ""
    """What the error says."""
    noted: str = ""
    """What a note says; the rest is read."""
    settings: tuple[tuple[str, Any], ...] = ()


def rows(item: str, readers: str, file: str, spoil: Spoil, refused: str = "", noted: str = "", **settings: Any) -> list:
    """A row for each reader; without an answer, labels and picture are read as if nothing were spoilt."""
    of_all = [Row(item, name, file, spoil, refused, noted, tuple(settings.items())) for name in readers.split()]
    return [pytest.param(row, id=f"{item}-{row.reader}-{file}") for row in of_all]


def check(row: Row, drawn: Path, root: Path) -> None:
    """The claim of a row. drawn: the folder with all layouts; root: a folder to make."""
    layout, settings = LAYOUTS[row.reader], dict(row.settings)
    shutil.copytree(drawn / row.reader, root, symlinks=True)
    file = root / layout.files[row.file]
    expected = row.spoil(file)

    if row.refused:
        with pytest.raises(ValueError, match=row.refused) as told:
            layout.read(root, **settings)
        text = str(told.value)
        assert type(told.value) is ValueError, "another library's error slipped through"
        assert text.count(";") >= 2, f"found; allowed; to do: {text}"
        assert not file.is_file() or file.name in text or str(file.parent) in text, text
        return

    reader = layout.open(root, **settings)
    samples, notes = [reader.read(index) for index in range(len(reader))], reader.notes
    if row.noted:
        assert any(re.search(row.noted, note) for note in notes), notes
        assert all(np.isfinite(one.boxes.xyxy).all() for one in samples if one.boxes is not None)
        return
    sound = layout.read(drawn / row.reader, **settings)
    assert len(notes) == len(layout.open(drawn / row.reader, **settings).notes), notes
    for one, other in zip(samples, sound, strict=True):
        assert_same_labels(one, other)
    if expected is not None:
        image = samples[layout.index].image
        assert image.shape == expected.shape and np.abs(image.astype(int) - expected).mean() < 4  # JPEG loses a little


def assert_same_labels(one: Sample, other: Sample) -> None:
    """Boxes, classes and depth are equal."""
    for name in ("segmentation", "depth_m"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("xyxy", "labels", "crowd", "area"):
        np.testing.assert_array_equal(getattr(one.boxes, name, None), getattr(other.boxes, name, None))


def content(data: bytes | str) -> Spoil:
    """The file holds this instead."""
    return lambda file: file.write_bytes(data.encode() if isinstance(data, str) else data) and None


def change(function: Callable[[Any], Any]) -> Spoil:
    """The file's JSON after `function`, which changes it or returns another; NaN and halves of characters included."""

    def spoil(file: Path) -> None:
        before = json.loads(file.read_text())
        after = function(before)
        file.write_text(json.dumps(before if after is None else after))

    return spoil


def put(path: str, value: Any) -> Spoil:
    """One value in a JSON file. path: "annotations/0/bbox"; "box" is the first box, wherever it is."""

    def function(inside: Any) -> None:
        *way, last = (_first_box(inside) + path[4:] if path.startswith("box/") else path).split("/")
        for key in way:
            inside = inside[int(key) if key.isdigit() else key]
        inside[int(last) if last.isdigit() else last] = value

    return change(function)


def twice(key: str) -> Spoil:
    """The first entry of a list once more."""
    return change(lambda inside: inside[key].append(inside[key][0]))


def cut(file: Path) -> None:
    """Half of the file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove(file: Path) -> None:
    file.unlink()


def make_folder(file: Path) -> None:
    """A folder where the file was."""
    file.unlink()
    file.mkdir()


def _first_box(inside: Any) -> str:
    return "annotations/0/segments_info/0/" if "segments_info" in inside["annotations"][0] else "annotations/0/"
