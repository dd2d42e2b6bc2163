"""Names of files as people have them: other alphabets, capital endings, links; read as meant, or refused by name."""

import json
import os
import sys
from pathlib import Path

import pytest
from bad_rows import assert_same_labels
from drawn_layouts import LAYOUTS

FOLDER, COCO = LAYOUTS["folder"], LAYOUTS["coco"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "folder").mkdir()
    FOLDER.write(tmp_path / "folder")
    return tmp_path / "folder"


def rename(root: Path, new: str) -> None:
    """Image a, its labels and its entries."""
    for file in (*root.glob("images/a.*"), root / "labels/a.png", root / "depth/a.png"):
        file.rename(file.with_name(new + file.suffix))
    (root / "list.txt").write_text(f"{new}\nb\n", encoding="utf-8")
    boxes = json.loads((root / "boxes.json").read_text())
    boxes["images"][0]["file_name"] = f"{new}.jpg"
    (root / "boxes.json").write_text(json.dumps(boxes))


@pytest.mark.parametrize("name", ["Straße 3", "写真", "фото.1", "a'b\"c", "é" * 100])
def test_names_in_any_alphabet_are_read(folder, name):
    before = FOLDER.read(folder)[0]
    rename(folder, name)
    after = next(one for one in FOLDER.read(folder) if one.image_id == name)
    assert_same_labels(after, before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names in Unicode")
def test_a_name_that_is_not_in_utf8_is_refused(folder):
    os.rename(os.fsencode(folder / "images/a.jpg"), os.fsencode(folder / "images") + b"/caf\xe9.jpg")
    with pytest.raises(ValueError, match=r"1 of 2 images have names that are not in UTF-8, the first is .*caf\\xe9"):
        FOLDER.open(folder, boxes=None, list_file=None)


def test_capital_endings_that_a_pattern_leaves_out_are_noted(folder):
    (folder / "images/a.jpg").rename(folder / "images/a.JPG")
    only_b = {"boxes": {"file": "boxes.json"}, "list_file": None}
    reader = FOLDER.open(folder, **only_b)
    assert len(reader) == 1
    assert "1 files match 'images/*.jpg' but for the case of their ending and are not read" in reader.notes[0]
    assert reader.notes[0].endswith("a.JPG")
    both = FOLDER.open(folder, images="images/*", boxes=None)
    assert len(both) == 2 and not both.notes


@pytest.mark.parametrize("name", ["folder", "coco", "cityscapes", "nyuv2", "nyuv2_mat"])
def test_data_behind_links_is_read(tmp_path, name):
    layout, real = LAYOUTS[name], tmp_path / "real"
    real.mkdir()
    layout.write(real)
    photo = real / next(iter(layout.files.values()))
    photo.rename(tmp_path / "elsewhere")
    photo.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(real)
    assert len(layout.read(tmp_path / "link")) == 2

    (tmp_path / "elsewhere").unlink()
    with pytest.raises(ValueError, match=r"missing or no readable|is no file|found no"):
        layout.read(tmp_path / "link")
