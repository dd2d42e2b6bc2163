"""Files of results bear the ids of the data set that they are for, whatever the training data called its classes."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from visionmtl.data.label_spaces import align, numbered
from visionmtl.datasets import NamedDataset
from visionmtl.inference.results_io import SubmissionWriter, open_predictions, with_declared
from visionmtl.metrics.coco_ap import score_files
from visionmtl.structures import Detections, LabelSpace, Sample
from visionmtl.tasks.detection import Detection
from visionmtl.visualization.palette import palette


def space(name: str, ids: Mapping[str, int]) -> LabelSpace:
    return LabelSpace(name, tuple(ids), palette(len(ids)), tuple(ids.values()))


class Reader:
    def __init__(self, offer: LabelSpace) -> None:
        self.provides = {"boxes": offer}

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Sample:
        return Sample(image=np.zeros((100, 100, 3), np.uint8), image_id="1")


LEARNT = space("toys", {"box": 1, "ball": 2})
SWAPPED = space("toys", {"ball": 1, "box": 2})
TASKS = {"detection": Detection()}
FOUND = Detections(np.array([[10, 20, 40, 60]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64))  # a box


def sets(*offers: LabelSpace) -> list[NamedDataset]:
    return [NamedDataset(f"set{number}", Reader(offer)) for number, offer in enumerate(offers)]


@pytest.mark.parametrize(
    ("own", "offers", "ids"),
    [
        (LEARNT, [LEARNT], (1, 2)),
        (LEARNT, [SWAPPED], (2, 1)),
        (LEARNT, [space("toys", {"box": 2})], (2, 3)),  # 2 is taken, though no box of this data set is a ball
        (LEARNT, [space("toys", {"box": 7})], (7, 2)),
        (space("toys", {"box": 1, "ball": 254}), [space("toys", {"box": 254})], (254, 256)),  # 255 means void
        (LEARNT, [space("others", {"box": 9})], (1, 2)),
        (LEARNT, [LEARNT, SWAPPED], None),
        (LEARNT, [space("toys", {"box": 5}), space("toys", {"ball": 5})], None),
    ],
)
def test_classes_have_the_ids_of_the_data_that_judge(
    own: LabelSpace, offers: list[LabelSpace], ids: tuple[int, ...] | None
):
    spaces, notes = numbered({"detection": own}, TASKS, sets(*offers))
    found = spaces["detection"]
    assert found is not None and found.classes == own.classes and found.ids == (ids or own.ids)
    assert [note.partition(" number")[0] for note in notes] == ([] if ids else ["detection: set0, set1"])


def test_a_union_bears_the_ids_of_each_data_set():
    union = LabelSpace("union", ("box", "ball", "cup"), palette(3))
    task = Detection(classes="union", rename={"mug": "cup"})
    for offer, ids in ((LEARNT, (1, 2, 3)), (space("kitchen", {"ball": 3, "mug": 8}), (0, 3, 8))):
        spaces, _ = numbered({"detection": union}, {"detection": task}, sets(offer))
        assert spaces["detection"] is not None and spaces["detection"].ids == ids


def test_saved_boxes_score_alike_by_class_names_and_by_official_ids(tmp_path: Path):
    image = {"id": 1, "width": 100, "height": 100}
    box = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0}
    categories = [{"id": 1, "name": "ball"}, {"id": 2, "name": "box"}]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"images": [image], "categories": categories, "annotations": [box]}))
    judge = sets(SWAPPED)
    spaces, _ = numbered({"detection": LEARNT}, TASKS, judge)
    sample = align(judge, TASKS, {"detection": LEARNT})[0].read(0)

    for folder, ids in (("official", spaces), ("own", {"detection": LEARNT})):
        writer = SubmissionWriter(tmp_path / folder, TASKS, ids)
        writer.add(sample, {"detection": FOUND})
        writer.close()
        file = tmp_path / folder / "detection.json"
        read = open_predictions(file, TASKS["detection"], LEARNT).read  # by the ids that submission.json declares
        assert read(sample)[1].labels.tolist() == [0]
    predicted = spaces["detection"]
    assert score_files(tmp_path / "official/detection.json", truth, predicted=predicted)[1]["ap"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"has category_id 1 for 'box', as submission.json .*, and in .* it is 2"):
        score_files(tmp_path / "own/detection.json", truth, predicted=LEARNT)


def test_a_split_that_lacks_a_class_is_judged_in_the_classes_of_the_prediction(tmp_path: Path):
    writer = SubmissionWriter(tmp_path, TASKS, {"detection": LEARNT})
    writer.add(sets(LEARNT)[0].read(0), {"detection": FOUND})
    writer.close()
    paths = {"detection": tmp_path / "detection.json"}
    for offer in (space("toys", {"box": 1}), SWAPPED):
        assert with_declared({"detection": offer}, paths) == {"detection": LEARNT}
    for offer in (space("others", {"box": 1}), space("toys", {"box": 1, "cup": 2})):
        assert with_declared({"detection": offer}, paths) == {"detection": offer}
    manifest = json.loads((tmp_path / "submission.json").read_text())
    manifest["detection"]["space"]["colours"] = 3
    (tmp_path / "submission.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"submission.json: detection has as space .*, which is none .* write"):
        with_declared({"detection": LEARNT}, paths)
