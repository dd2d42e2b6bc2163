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
    (folder / "images/read.me").write_text("no image, whatever its case")
    assert not FOLDER.open(folder, images="images/**/*", boxes=None).notes


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


@pytest.mark.parametrize("name", ["folder", "coco", "cityscapes", "nyuv2", "nyuv2_mat"])
def test_sidecars_of_macos_are_passed_over(tmp_path, name):
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    before, notes = layout.read(tmp_path), layout.open(tmp_path).notes
    for file in [one for one in tmp_path.rglob("*") if one.is_file()]:
        file.with_name(f"._{file.name}").write_bytes(b"\x00\x05\x16\x07")
    after = layout.read(tmp_path)
    assert len(after) == len(before) and layout.open(tmp_path).notes == notes
    for one, other in zip(after, before, strict=True):
        assert_same_labels(one, other)


def test_photos_of_an_annotation_file_are_found_in_another_unicode_form(tmp_path):
    COCO.write(tmp_path)
    before, file = COCO.read(tmp_path), tmp_path / COCO.files["boxes"]
    content = json.loads(file.read_text())
    for image in content["images"]:
        photo = next(tmp_path.rglob(image["file_name"].rpartition(".")[0] + ".jpg"))
        image["file_name"] = f"é_{image['file_name']}"
        photo.rename(photo.with_name(f"e\u0301_{photo.name}"))
    file.write_text(json.dumps(content))
    for one, other in zip(COCO.read(tmp_path), before, strict=True):
        assert_same_labels(one, other)
