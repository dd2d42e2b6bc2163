"""Files that would be scored wrong, or written over, are refused by what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from visionmtl.config.text_files import read_yaml
from visionmtl.engine.checkpoint import find_resumed
from visionmtl.inference.results_io import open_predictions
from visionmtl.metrics.coco_ap import score_files
from visionmtl.structures import LabelSpace, Sample
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


def corners_and_sizes(num: int) -> tuple[list[list[int]], list[list[int]]]:
    """The same boxes as x1, y1, x2, y2 and as x, y, width, height, in images of 100 x 100."""
    corners = [[40 + at, 30, 90, 70 + at] for at in range(num)]
    return corners, [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in corners]


@pytest.mark.parametrize("spoilt", ["truth", "results"])
def test_corners_in_place_of_width_and_height_are_refused(tmp_path: Path, spoilt: str):
    corners, right = corners_and_sizes(12)
    truth, results = tmp_path / "truth.json", tmp_path / "results.json"

    def write(boxes: list[list[int]], found: list[list[int]]) -> None:
        annotations = [
            {"id": at, "image_id": 1, "category_id": 3, "bbox": box, "area": 9, "iscrowd": 0}
            for at, box in enumerate(boxes, start=1)
        ]
        images, categories = [{"id": 1, "width": 100, "height": 100}], [{"id": 3, "name": "cat"}]
        truth.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
        results.write_text(json.dumps([{**BOX, "bbox": box} for box in found]))

    write(right, right)
    assert score_files(results, truth)[1]["ap"] == pytest.approx(1)
    write(corners if spoilt == "truth" else right, corners if spoilt == "results" else right)
    said = r"all 12 boxes end inside .* 12 end outside .* \[40.0, 30.0, 90.0, 70.0\]; .* write x2 - x1"
    with pytest.raises(ValueError, match=rf"{spoilt}.json: {said}"):
        score_files(results, truth)
    write(corners[:9], right)  # of nine boxes nothing is certain
    assert score_files(results, truth)[1]["ap"] < 1


def test_fractions_as_truth_are_refused(tmp_path: Path):
    truth, results = tmp_path / "truth.json", tmp_path / "results.json"
    annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0.1, 0.2, 0.3, 0.4], "area": 1, "iscrowd": 0}
    lists = {"images": [{"id": 1}], "categories": [{"id": 3, "name": "cat"}], "annotations": [annotation]}
    truth.write_text(json.dumps(lists))
    results.write_text(json.dumps([BOX]))
    with pytest.raises(ValueError, match=r"truth.json: all 1 boxes lie in 0..1"):
        score_files(results, truth)


def test_corners_in_a_file_of_predictions_are_refused(tmp_path: Path):
    corners, right = corners_and_sizes(12)
    sample = Sample(image=np.zeros((100, 100, 3), np.uint8), image_id="1")
    for boxes in (right, corners):
        (tmp_path / "boxes.json").write_text(json.dumps([{**BOX, "bbox": box} for box in boxes]))
        read = open_predictions(tmp_path / "boxes.json", Detection(), SPACE).read
        if boxes is right:
            assert read(sample)[1].xyxy.tolist() == corners
    with pytest.raises(ValueError, match=r"boxes.json: image '1': all 12 boxes end inside their image as corners"):
        read(sample)


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
