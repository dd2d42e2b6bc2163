"""Predictions written by two processes are, byte for byte, those that one writes."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import scene_run
import torch
from contract import sample

from visionmtl.cli import main
from visionmtl.datasets import NamedDataset
from visionmtl.engine import distributed
from visionmtl.engine.evaluator import evaluate_files
from visionmtl.inference.results_io import SubmissionWriter
from visionmtl.structures import Detections, LabelSpace, Sample
from visionmtl.tasks.base import Task
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection

WITH_NORMALS = (*scene_run.TASKS, "normals")


def save_run(folder: Path) -> Path:
    """A checkpoint with random weights, to be judged by five images: one of two ranks has one more."""
    data = {"val": [scene_run.scenes(5, split="val")]}
    run = scene_run.run(folder, names=WITH_NORMALS, data=data, train={"batch_size": 1})
    return scene_run.save_untrained(run, folder, step=0)


def evaluate(folder: Path, target: Path) -> int:
    torch.set_num_threads(1)
    command = ["eval", str(folder / "run/checkpoints/last.pt"), "--device", "cpu", "--save-predictions", str(target)]
    return main([*command, "--json", str(target.with_suffix(".json"))])


def one_of_two(groups: Iterator[None], folder: Path) -> None:
    """What each process runs: the evaluation; a second one, which must not be mixed with it; a name given twice."""
    codes = []
    for _ in range(2):
        next(groups)
        codes.append(evaluate(folder, folder / "two"))
    assert codes == [0, 2], codes

    rank = int(os.environ["RANK"])
    images = [replace(sample(rank), image_id=name) for name in ("1", "01")]
    tasks = {"depth": Depth()}
    turns = [(folder / "twice", images[rank]), (folder / f"apart{rank}", sample(rank))]
    for number, (target, image) in enumerate(turns):
        next(groups)
        distributed.start("cpu")
        writer = SubmissionWriter(target, tasks, {"depth": None})
        writer.add(image, {"depth": np.ones((4, 5), np.float32)})
        try:
            writer.close()
        except ValueError as error:
            (folder / f"said-{number}-{rank}").write_text(str(error))
        distributed.stop()

    next(groups)
    distributed.start("cpu")
    try:
        judge_by_files(rank)
    except ValueError as error:
        (folder / f"shared-{rank}").write_text(str(error))
    distributed.stop()


class Two:
    """A data set of two images, called after their numbers or the other way round."""

    provides: Mapping[str, LabelSpace | None] = {"depth_m": None}

    def __init__(self, ids: str) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return 2

    def read(self, index: int) -> Sample:
        return replace(sample(index, "depth_m"), image_id=self.ids[index])


def judge_by_files(rank: int) -> None:
    """Of the images called alike, no process sees both."""
    tasks: dict[str, Task] = {"depth": Depth()}
    sources = [NamedDataset("up", Two("01")), NamedDataset("down", Two("10"))]
    meters = {f"depth@{source.name}": tasks["depth"].meter(None) for source in sources}
    reads = {"depth": lambda one: (one.image_id, one.depth_m)}
    evaluate_files(reads, meters, tasks, {"depth": None}, sources, rank, world=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions in `one` and `two`, written by that many processes."""
    folder = tmp_path_factory.mktemp("ranks")
    save_run(folder / "run")
    assert evaluate(folder, folder / "one") == 0
    processes.run(2, one_of_two, folder, num_groups=5)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_files_of_two_processes_are_those_of_one(folder: Path):
    one, two = files(folder / "one"), files(folder / "two")
    assert len(one) == 3 * 5 + 2, "PNGs of three tasks, boxes, and what the values mean"
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []
    rows = json.loads(one["detection.json"])
    ids = list(dict.fromkeys(row["image_id"] for row in rows))
    assert len(rows) > 5 and ids == sorted(ids)


def test_the_numbers_of_two_processes_are_those_of_their_files(folder: Path):
    one, two = (json.loads((folder / f"{name}.json").read_text())["results"] for name in ("one", "two"))
    for task, result in one.items():
        numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
        assert {name: two[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-6)


def test_a_name_that_two_processes_give_is_refused_by_both(folder: Path):
    for rank in range(2):
        said = (folder / f"said-0-{rank}").read_text()
        assert said.startswith("two images are called '01'; one submission holds each image once")


def test_a_file_that_two_data_sets_claim_is_refused_by_both_processes(folder: Path):
    for rank in range(2):
        assert "images '0' of down and '0' of up are both evaluated by" in (folder / f"shared-{rank}").read_text()


def test_files_that_lie_in_several_folders_are_refused(folder: Path):
    assert "1 of 2 PNGs are not in" in (folder / "said-1-0").read_text()
    assert not (folder / "said-1-1").exists()


def test_boxes_are_in_the_order_of_image_ids_whichever_come_first(tmp_path: Path):
    found = sample(0, "boxes", num_boxes=2)
    space = scene_run.state(scene_run.run(names=("detection",))).net.spaces["detection"]
    writer = SubmissionWriter(tmp_path / "p", {"boxes": Detection()}, {"boxes": space})
    for name in ("b", "10", "a", "9"):
        scores = np.float32([0.9, 0.1])
        writer.add(replace(found, image_id=name), {"boxes": Detections(found.boxes.xyxy, scores, np.int64([0, 1]))})
    writer.close()
    rows = json.loads((tmp_path / "p/boxes.json").read_text())
    assert [row["image_id"] for row in rows] == [9, 9, 10, 10, "a", "a", "b", "b"]
    assert [row["score"] > 0.5 for row in rows] == [True, False] * 4
