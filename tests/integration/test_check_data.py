"""`tools/check_data.py` on folders with planted faults: each is told with its file, and the rest is still checked."""

import json
import os
import re
from pathlib import Path
from typing import ClassVar, Literal

import cv2
import numpy as np
import pytest
import write_coco
import write_nyuv2
import yaml
from write_folder import SIZE, FolderData, photo

from visionmtl.cli import main
from visionmtl.datasets import Dataset


class Mine(FolderData):
    """A folder data set that can be checked."""

    def check(self, *options, **data):
        return check(self.root, {"train": [self.settings("train")], "val": [self.settings("val")], **data}, *options)


def check(folder, data, *options):
    """The exit status and the JSON report of `check_data` on this data."""
    config, report = folder / "config.yaml", folder / "report.json"
    config.write_text(yaml.safe_dump({"data": {"size": [64, 64], **data}}))
    report.unlink(missing_ok=True)  # of an earlier check: the tool writes over nothing
    status = main(["check_data", str(config), "--workers", "0", "--json", str(report), *options])
    return status, json.loads(report.read_text()) if report.exists() else None


def found(report, *severities):
    return {(one["rule"], one["role"]) for one in report["findings"] if one["severity"] in severities}


def one(report, rule):
    """The only finding of a rule."""
    (finding,) = [finding for finding in report["findings"] if finding["rule"] == rule]
    return finding


@pytest.fixture
def mine(tmp_path):
    return Mine(tmp_path)


def test_sound_data_pass_and_are_counted(mine, capsys):
    status, report = mine.check()
    assert status == 0, report["findings"]
    assert not report["findings"] and report["counts"] == {"error": 0, "warning": 0, "note": 0}
    train, _ = report["data_sets"]
    assert (train["images"], train["read"], train["labelled"]) == (4, 4, {"boxes": 4, "segmentation": 4, "depth_m": 4})
    assert (train["boxes"]["total"], train["boxes"]["images_without"], train["boxes"]["small"]) == (3, 1, 3)
    assert [one["share"] for one in train["segmentation"]["classes"]] == [40 / 64, 24 / 64]
    assert (train["depth_m"]["min_m"], train["depth_m"]["max_m"]) == pytest.approx((1.0, 1.94))
    assert sum(bar["share"] for bar in train["depth_m"]["histogram"]) == pytest.approx(1)
    assert "4 train + 4 val images read: 0 errors, 0 warnings, 0 notes" in capsys.readouterr().out


def test_a_file_cut_short_is_named_and_the_others_are_read(mine, capsys):
    file = mine.write("images/train/2.png", photo(2))
    file.write_bytes(file.read_bytes()[:200])
    status, report = mine.check()
    assert status == 1 and found(report, "error") == {("unreadable", "train")}
    assert str(file) in one(report, "unreadable")["text"] and one(report, "unreadable")["file"] == str(file)
    assert [data_set["read"] for data_set in report["data_sets"]] == [3, 4]
    assert "1 could not be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "pixels", "text"),
    [
        ("labels/train/1.png", np.zeros((48, 60), np.uint8), "60"),
        ("labels/train/1.png", np.full(SIZE, 9, np.uint8), "9"),
        ("labels/train/1.png", np.zeros(SIZE, np.uint16), "uint16"),
        ("depth/train/1.png", np.zeros((24, 32), np.uint16), "24x32"),
    ],
    ids=["label of another size", "undeclared class", "16-bit label", "depth of another size"],
)
def test_a_label_that_its_reader_refuses_is_a_finding_that_names_it(mine, name, pixels, text):
    file = mine.write(name, pixels)
    status, report = mine.check()
    assert status == 1 and found(report, "error") == {("unreadable", "train")}
    assert str(file) in one(report, "unreadable")["text"] and text in one(report, "unreadable")["text"]


def test_odd_values_are_warnings_that_name_image_and_field(mine):
    mine.write("labels/val/11.png", np.full(SIZE, 255, np.uint8))
    mine.write("depth/val/12.png", np.zeros(SIZE, np.uint16))
    mine.write("images/val/13.png", np.full((*SIZE, 3), 90, np.uint8))
    status, report = mine.check()
    assert status == 0, "warnings alone are no errors"
    warned = {(one["rule"], one["field"], Path(one["file"]).name) for one in report["findings"]}
    assert warned == {
        ("nothing_labelled", "segmentation", "11.png"),
        ("nothing_labelled", "depth_m", "12.png"),
        ("image_constant", "image", "13.png"),
    }


def test_millimetres_taken_for_metres_are_told_with_the_histogram(mine, capsys):
    settings = mine.settings("train") | {"depth": {"files": "depth/{split}/{stem}.png", "metres_per_unit": 1}}
    _, report = mine.check(train=[settings])
    assert found(report, "warning") == {("depth_implausible", "train")}
    assert report["counts"]["warning"] == 4
    printed = capsys.readouterr().out
    assert "warning: depth_implausible, train folder (4 times)" in printed
    assert re.search(r"1.02e\+03 to 1.45e\+03 m +\S+% +\|####", printed)


def test_boxes_that_the_reader_drops_are_told_and_others_over_the_edge_too(mine):
    def spoil(objects):
        objects[0]["bbox"] = [4, 5, 0, 30]
        objects[1]["bbox"] = [50, 5, 20, 30]

    mine.boxes("train", spoil)
    status, report = mine.check()
    assert status == 0
    told = " ".join(one["text"] for one in report["findings"] if one["rule"] == "told_by_reader")
    assert "dropped 1 of 3 boxes: 1 without width or height" in told
    assert report["data_sets"][0]["boxes"]["total"] == 2


def test_an_image_given_twice_is_an_error_in_one_split_and_between_the_two(mine):
    mine.write("images/train/3.png", photo(1))
    mine.write("images/val/12.png", photo(0))
    status, report = mine.check()
    assert status == 1 and found(report, "error", "warning") == {("duplicate", "train"), ("leak", "val")}
    assert one(report, "duplicate")["file"].endswith("train/3.png")
    assert "train/1.png of train folder" in one(report, "duplicate")["text"]
    assert one(report, "leak")["file"].endswith("val/12.png")
    assert "train/0.png of train folder" in one(report, "leak")["text"]


def test_a_picture_saved_anew_in_the_other_split_is_a_warning(mine):
    (mine.root / "images/val/12.png").unlink()
    content = json.loads((mine.root / "val.json").read_text().replace("12.png", "12.jpg"))
    mine.annotate("val", content)
    mine.write("images/val/12.jpg", photo(0))
    status, report = mine.check()
    assert status == 0 and found(report, "error", "warning") == {("near_leak", "val")}


def test_one_data_set_listed_twice_is_told_once_not_for_each_image(mine):
    settings = mine.settings("train")
    status, report = mine.check(train=[settings, {**settings, "name": "again"}])
    assert status == 0
    assert one(report, "duplicate_elsewhere")["text"] == "train again: 4 images are also in train folder"


def test_classes_that_nobody_learns_are_told(mine):
    for split in ("train", "val"):
        content = json.loads((mine.root / f"{split}.json").read_text())
        content["categories"].append({"id": 8, "name": "fork"})
        content["annotations"][0]["category_id"] = 7 if split == "train" else 8
        mine.annotate(split, content)
    status, report = mine.check()
    assert status == 0
    assert "1 of 2 classes of folder_boxes never occurs: fork" in one(report, "class_absent")["text"]
    text = one(report, "class_untrained")["text"]
    assert "1 class of folder_boxes occurs here, but in no training data: fork" in text


def test_classes_of_lists_in_another_order_are_matched_by_name(mine):
    """Training matches them so; of the validation list's second class, fork, no training image tells."""
    for split, names in (("train", ["knife", "spoon", "fork"]), ("val", ["spoon", "fork"])):
        content = json.loads((mine.root / f"{split}.json").read_text())
        content["categories"] = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        for number, annotation in enumerate(content["annotations"]):
            annotation["category_id"] = 2 if split == "train" else 1 + number % 2
        mine.annotate(split, content)
    _, report = mine.check()
    assert "training data: fork;" in one(report, "class_untrained")["text"]


def test_a_data_set_that_cannot_be_opened_leaves_the_others_checked(mine, capsys):
    (mine.root / "train.json").write_text('{"images": [')
    status, report = mine.check()
    assert status == 1 and found(report, "error") == {("not_opened", "train")}
    assert str(mine.root / "train.json") in one(report, "not_opened")["text"]
    assert [data_set["read"] for data_set in report["data_sets"]] == [0, 4]

    (mine.root / "val.json").unlink()
    status, report = mine.check("--sheet", str(mine.root / "sheet.png"))
    assert status == 2 and report["counts"]["error"] == 2, "nothing was checked"
    assert "no data set could be opened" in capsys.readouterr().err
    assert not (mine.root / "sheet.png").exists(), "there is nothing to draw"


def test_the_official_layouts_are_read_as_they_are(tmp_path):
    write_coco.write_coco(tmp_path / "coco", 3, 2, stuffthingmaps=True)
    metas = write_nyuv2.drawn_frames(3, (64, 96))
    write_nyuv2.write_prepared(tmp_path / "nyuv2", metas, "train", [1, 2])
    write_nyuv2.write_prepared(tmp_path / "nyuv2", metas, "test", [3])
    coco, nyuv2 = {"type": "coco", "root": str(tmp_path / "coco")}, {"type": "nyuv2", "root": str(tmp_path / "nyuv2")}
    data = {"train": [coco, nyuv2], "val": [coco | {"split": "val"}, nyuv2 | {"split": "test"}]}
    status, report = check(tmp_path, data)
    assert status == 0, [one["text"] for one in report["findings"] if one["severity"] == "error"]
    names = [(one["role"], one["name"], one["images"], one["read"]) for one in report["data_sets"]]
    assert names == [("train", "coco", 3, 3), ("train", "nyuv2", 2, 2), ("val", "coco", 2, 2), ("val", "nyuv2", 1, 1)]
    assert [one["boxes"]["crowds"] for one in report["data_sets"]] == [1, 0, 1, 0]


@pytest.mark.slow
def test_processes_find_what_one_finds(mine):
    mine.write("images/val/12.png", photo(0))
    alone = mine.check()
    assert mine.check("--workers", "2") == alone


def test_a_limit_reads_some_and_says_nothing_of_what_is_absent(mine, capsys):
    mine.boxes("train", lambda objects: objects.clear())
    _, whole = mine.check()
    _, report = mine.check("--limit", "2")
    assert {"class_absent", "class_untrained"} == {rule for rule, _ in found(whole, "warning")}
    assert found(report, "warning") == set()
    assert [data_set["read"] for data_set in report["data_sets"]] == [2, 2]
    assert "only some images were read" in capsys.readouterr().out


def test_the_sheet_shows_every_data_set_whatever_is_wrong_with_it(mine):
    mine.boxes("train", lambda objects: objects[0].update(bbox=[50, 5, 20, 30]))
    mine.write("depth/val/12.png", np.zeros(SIZE, np.uint16))
    sheet = mine.root / "new" / "sheet.png"
    assert mine.check("--sheet", str(sheet))[0] == 0
    picture = cv2.imread(str(sheet))
    assert picture.shape[1] > 1900 and picture.shape[0] > 8 * 400, "eight images, three pictures each"


def test_files_are_written_before_anything_is_printed(mine, monkeypatch):
    def closed_pipe(*_):
        raise BrokenPipeError

    monkeypatch.setattr("visionmtl.data.check.terminal.print_result", closed_pipe)
    monkeypatch.setattr("os.dup2", lambda *_: None)  # the tool silences its stdout, which is pytest's here
    assert mine.check("--sheet", str(mine.root / "sheet.png"))[0] == 141
    assert json.loads((mine.root / "report.json").read_text())["data_sets"] and (mine.root / "sheet.png").is_file()


def test_what_cannot_start_ends_with_2_and_says_why(mine, capsys):
    assert mine.check(train=[]) == (2, None)
    assert "data.train" in capsys.readouterr().err
    assert main(["check", "no_such_config"]) == 2
    assert mine.check("--sheet", str(mine.root)) == (2, None)
    assert "is a folder" in capsys.readouterr().err
    assert mine.check("--sheet", str(mine.root / "sheet.txt")) == (2, None)
    said = capsys.readouterr()
    assert "names no format of image files" in said.err and not said.out
    with pytest.raises(SystemExit) as stopped:
        mine.check("--limit", "0")
    assert stopped.value.code == 2


class Deadly(Dataset):
    """Reading it ends the process, as a decoder that crashes does."""

    type: Literal["test_check_data.Deadly"] = "test_check_data.Deadly"
    provides: ClassVar = {"depth_m": None}

    def build(self):
        return self

    def __len__(self):
        return 1

    def read(self, index):
        os._exit(3)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_check_with_2(tmp_path, capsys):
    deadly = [{"type": "test_check_data.Deadly"}]
    assert check(tmp_path, {"train": deadly, "val": deadly}, "--workers", "1") == (2, None)
    said = capsys.readouterr().err
    assert "loader worker 1 of 1" in said and "ended with exit status 3 while it read image 0 of Deadly" in said


def test_a_config_without_a_model_is_enough_and_overrides_reach_it(capsys):
    few = [f"data.{role}.0.num_images=12" for role in ("train", "val")]
    rest = ["~model", "~tasks", "train.epochs=none", "--workers", "0"]
    assert main(["check", "quickstart.yaml", *few, *rest]) == 0
    assert "12 train + 12 val images read: 0 errors" in capsys.readouterr().out
    assert main(["check", "quickstart.yaml", *few, *rest, "data.val.0.split=train"]) == 1
    assert "12 train + 12 val images read: 12 errors" in capsys.readouterr().out


def test_it_says_which_classes_of_a_union_each_data_set_teaches(tmp_path):
    write_coco.write_coco(tmp_path / "coco", num_train=2, num_val=2)
    (tmp_path / "nyuv2").mkdir()
    for split in ("train", "test"):
        write_nyuv2.write_prepared(tmp_path / "nyuv2", write_nyuv2.drawn_frames(2, (480, 640)), split)

    def run(*overrides):
        report = tmp_path / f"report{len(list(tmp_path.glob('*.json')))}.json"
        shared = [f"data.root={tmp_path}", "--workers", "0", "--json", str(report)]
        return main(["check_data", "union.yaml", *shared, *overrides]), json.loads(report.read_text())

    _, report = run()
    texts = [one["text"] for one in report["findings"] if one["rule"] == "classes_taught"]
    assert [text.partition(" classes:")[0] for text in texts] == [
        "train coco teaches task 'detection' 80 of 107", "train nyuv2 teaches task 'detection' 37 of 107",
        "val coco judges task 'detection' 80 of 107", "val nyuv2 judges task 'detection' 37 of 107",
    ]  # fmt: skip

    status, report = run("tasks.detection.rename.couch=soffa")
    assert status == 1 and "calls 'couch' 'soffa' (did you mean 'sofa'?)" in one(report, "classes")["text"]
