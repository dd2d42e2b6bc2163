"""Files that would be scored wrong, or written over, are refused by what is wrong."""

import json
from pathlib import Path

import pytest

from visionmtl.config.text_files import read_yaml
from visionmtl.engine.checkpoint import find_resumed
from visionmtl.inference.results_io import open_predictions
from visionmtl.metrics.coco_ap import score_files
from visionmtl.structures import LabelSpace
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.segmentation import Segmentation

COLOURS = ((0, 0, 0), (9, 9, 9))
SPACE = LabelSpace("pets", ("cat", "dog"), COLOURS, ids=(3, 7))
BOX = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 40], "score": 0.5}


@pytest.mark.parametrize("name", ["config.yaml", "env.json", "train.log"])
@pytest.mark.parametrize("which", [None, "auto"])
def test_a_run_writes_over_no_file_that_is_not_a_runs(tmp_path: Path, name: str, which: str | None):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"{name} is of no run, and a run would write over it; .* choose another"):
        find_resumed(tmp_path, which)
    assert find_resumed(tmp_path, which, dry_run=True) is None
    (tmp_path / "metrics.jsonl").touch()  # a start that was left before its first step
    assert find_resumed(tmp_path, which) is None


@pytest.mark.parametrize("number", ["010", "-07", "1:30", "0_1"])
def test_numbers_that_yaml_reads_otherwise_than_people_are_refused(tmp_path: Path, number: str):
    file = tmp_path / "a.yaml"
    file.write_text(f"epochs: {number}\n")
    with pytest.raises(ValueError, match=rf"a.yaml:1: '{number}' is .* to some readers and not to others; .* quotes"):
        read_yaml(file)
    file.write_text(f"a: '{number}'\nb: 0\nc: 1_000\nd: 0x10\ne: 10\n")
    assert read_yaml(file)[0] == {"a": number, "b": 0, "c": 1000, "d": 16, "e": 10}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"category_id": "cat"}, r"none of 1 results has a category of .*truth.json; the first has category_id 'cat'"),
        ({"category_id": 93}, r"category_id '?93'?, and 3, 7 are annotated; write these ids"),
        ({"score": float("nan")}, r"none of 1 results has numbers alone as box and score"),
        ({"bbox": [0.1, 0.2, 0.3, 0.4]}, r"all 1 boxes lie in 0..1, the first is .* COCO's are pixels"),
    ],
)
def test_results_that_can_match_nothing_are_no_result_of_0(tmp_path: Path, change: dict, said: str):
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0}
    images = [{"id": 1, "width": 100, "height": 100, "file_name": "1.jpg"}]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"images": images, "categories": categories, "annotations": [annotation]}))
    results = tmp_path / "results.json"
    results.write_text(json.dumps([BOX]))
    assert score_files(results, truth)[1]["ap"] == pytest.approx(1)
    results.write_text(json.dumps([{**BOX, **change}]))
    with pytest.raises(ValueError, match=said):
        score_files(results, truth)


def test_predictions_of_other_classes_are_not_scored(tmp_path: Path):
    (tmp_path / "boxes.json").write_text(json.dumps([BOX]))
    manifest = tmp_path / "submission.json"

    def declare(field: str, space: LabelSpace) -> None:
        manifest.write_text(json.dumps({"boxes": {"field": field, "space": space.plain()}}))

    declare("boxes", SPACE)
    open_predictions(tmp_path / "boxes.json", Detection(), SPACE)
    declare("boxes", LabelSpace("pets", ("dog", "cat"), COLOURS, ids=(3, 7)))
    with pytest.raises(ValueError, match=r"submission.json: boxes was predicted with classes .*dog.*cat.* both must"):
        open_predictions(tmp_path / "boxes.json", Detection(), SPACE)
    declare("segmentation", SPACE)
    with pytest.raises(ValueError, match=r"boxes holds .segmentation., and the task scored needs boxes"):
        open_predictions(tmp_path / "boxes.json", Detection(), SPACE)
    manifest.unlink()
    (tmp_path / "boxes.json").write_text(json.dumps([{**BOX, "category_id": 9}]))
    with pytest.raises(ValueError, match=r"none of the 1 boxes has a category that is scored; .* 3, 7; write"):
        open_predictions(tmp_path / "boxes.json", Detection(), SPACE)
    (tmp_path / "maps").mkdir()
    manifest.write_text(json.dumps({"maps": {"field": "segmentation", "space": {"classes": ["a", "b"]}}}))
    with pytest.raises(ValueError, match="maps was predicted with classes"):
        open_predictions(tmp_path / "maps", Segmentation(), SPACE)
