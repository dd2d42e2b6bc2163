"""Predictions in files: what is written, that it reads back as it was, and COCO's own files scored as COCO does."""

import json
import resource

import cv2
import numpy as np
import pytest
from contract import sample

from visionmtl.datasets import NamedDataset
from visionmtl.datasets.coco import COCO81
from visionmtl.inference.results_io import (
    SubmissionWriter,
    check_empty,
    check_images,
    open_predictions,
    paths_by_task,
)  # fmt: skip
from visionmtl.io.atomic import DiskFull
from visionmtl.io.cityscapes import CITYSCAPES19
from visionmtl.structures import IGNORE, Detections, LabelSpace, Sample
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.normals import Normals
from visionmtl.tasks.segmentation import Segmentation

TASKS = {"boxes": Detection(), "classes": Segmentation(), "depth": Depth(), "normals": Normals()}
ANIMALS = LabelSpace("animals", ("cat", "dog", "bird"), ((0, 0, 0),) * 3, (17, 18, 90))
SPACES = {"boxes": ANIMALS, "classes": ANIMALS, "depth": None, "normals": None}
FOUND = Detections(
    np.float32([[0.1, 2.7, 30.3, 41.9], [5, 5, 6, 6]]), np.float32([0.9, 1 / 3]), np.array([2, 0], np.int64)
)


def written(folder, one, predictions, **settings):
    tasks = {name: TASKS[name] for name in predictions}
    writer = SubmissionWriter(folder, tasks, {**SPACES, **settings.pop("spaces", {})}, **settings)
    writer.add(one, predictions)
    writer.close()


def read(folder, name, one, space=None, units=None):
    path = paths_by_task([str(folder)], {name: TASKS[name]})[name]
    return open_predictions(path, TASKS[name], space or SPACES[name], units).read(one)[1]


def test_boxes_are_coco_results_and_come_back_exactly(tmp_path):
    one = Sample(image=np.zeros((1, 1, 3), np.uint8), image_id="000000000139")
    written(tmp_path / "p", one, {"boxes": FOUND})

    first, second = json.loads((tmp_path / "p" / "boxes.json").read_text())
    assert (first["image_id"], first["category_id"], second["category_id"]) == (139, 90, 17)
    assert first["bbox"] == pytest.approx([0.1, 2.7, 30.2, 39.2], abs=1e-5)
    back = read(tmp_path / "p", "boxes", one)
    for field in ("xyxy", "scores", "labels"):
        np.testing.assert_array_equal(getattr(back, field), getattr(FOUND, field))


def test_an_image_without_boxes_is_no_missing_image(tmp_path):
    one = sample(0)
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    written(tmp_path / "p", one, {"boxes": nothing})

    assert read(tmp_path / "p", "boxes", one).xyxy.shape == (0, 4)


def test_classes_are_written_with_official_ids_and_void_stays_void(tmp_path):
    one = sample(0)
    classes = one.segmentation.copy()
    classes[0, 0] = IGNORE
    written(tmp_path / "p", one, {"classes": classes})

    values = cv2.imread(str(tmp_path / "p" / "classes" / "image_0.png"), cv2.IMREAD_UNCHANGED)
    assert set(np.unique(values)) == {0, 17, 18, 90}
    np.testing.assert_array_equal(read(tmp_path / "p", "classes", one), classes)


def test_background_whose_official_id_is_0_is_a_class(tmp_path):
    one = sample(0)
    classes = np.full_like(one.segmentation, COCO81.classes.index("background"))
    classes[0, :2] = 3, IGNORE
    written(tmp_path / "p", one, {"classes": classes}, spaces={"classes": COCO81})

    np.testing.assert_array_equal(read(tmp_path / "p", "classes", one, COCO81), classes)


def test_cityscapes_files_are_called_as_its_evaluation_looks_for_them(tmp_path):
    name = "frankfurt_000000_000294"
    one = Sample(image=np.zeros((4, 5, 3), np.uint8), image_id=name)
    classes = np.arange(20, dtype=np.uint8).reshape(4, 5) % 19
    written(tmp_path / "p", one, {"classes": classes}, spaces={"classes": CITYSCAPES19})

    file = tmp_path / "p" / "classes" / f"{name}_pred_labelIds.png"
    values = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    assert (values.ravel()[:2].tolist(), values.ravel()[18]) == ([7, 8], 33)
    np.testing.assert_array_equal(read(tmp_path / "p", "classes", one, CITYSCAPES19), classes)


@pytest.mark.parametrize(("units", "step_m"), [(256, 1 / 256), (1000, 1e-3)])
def test_depth_comes_back_within_half_a_step_whatever_the_unit(tmp_path, units, step_m):
    one = sample(0)
    written(tmp_path / "p", one, {"depth": one.depth_m}, units_per_metre=units)

    values = cv2.imread(str(tmp_path / "p" / "depth" / "image_0.png"), cv2.IMREAD_UNCHANGED)
    assert values.dtype == np.uint16
    assert np.abs(read(tmp_path / "p", "depth", one) - one.depth_m).max() <= step_m / 2 * 1.001  # float32
    assert read(tmp_path / "p", "depth", one, units=2 * units).max() < 5, "a unit that is given wins"


def test_normals_come_back_within_half_a_step(tmp_path):
    one = sample(0)
    written(tmp_path / "p", one, {"normals": one.normals})

    assert np.abs(read(tmp_path / "p", "normals", one) - one.normals).max() <= 1.001 / 65535


def test_files_of_one_task_are_found_wherever_they_lie(tmp_path):
    one = sample(0)
    written(tmp_path / "p", one, {"classes": one.segmentation, "boxes": FOUND})

    assert set(paths_by_task([str(tmp_path / "p")], TASKS)) == {"boxes", "classes"}
    named = paths_by_task([f"classes={tmp_path / 'p' / 'classes'}"], TASKS)
    assert named == {"classes": tmp_path / "p" / "classes"}
    with pytest.raises(ValueError, match=r"no task 'clases' \(did you mean 'classes'\?\)"):
        paths_by_task(["clases=x"], TASKS)
    with pytest.raises(ValueError, match=r"gives 'classes' files a second time, after .*; leave one out"):
        paths_by_task([str(tmp_path / "p"), f"classes={tmp_path}"], TASKS)
    with pytest.raises(ValueError, match="holds predictions of none of the tasks"):
        paths_by_task([str(tmp_path)], TASKS)


def test_a_map_that_does_not_fit_on_the_disk_is_told_and_removed(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = SubmissionWriter(tmp_path, {"depth": Depth()}, {"depth": None})
    noise_m = np.random.default_rng(0).uniform(1, 5, (60, 60)).astype(np.float32)  # 7,200 bytes, hardly fewer as PNG
    one = Sample(image=np.zeros((60, 60, 3), np.uint8), image_id="a")
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, before[1]))  # OpenCV calls that a success
    try:
        with pytest.raises(DiskFull, match=r"a\.png cannot be written: File too large; [\d,]+ bytes are needed"):
            writer.add(one, {"depth": noise_m})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "depth").iterdir())


def test_old_predictions_are_not_mixed_with_new_ones(tmp_path):
    written(tmp_path / "p", sample(0), {"boxes": FOUND})

    with pytest.raises(ValueError, match="not an empty folder"):
        check_empty(tmp_path / "p")


def test_files_that_cannot_be_meant_are_errors_that_teach(tmp_path):
    one = sample(0)
    written(tmp_path / "p", one, {"depth": one.depth_m})
    folder = tmp_path / "p" / "depth"

    with pytest.raises(ValueError, match=r"image 'image_1' has no prediction in .* which holds 1 PNGs"):
        open_predictions(folder, Depth(), None).read(sample(1))
    with pytest.raises(ValueError, match=r"depth holds .depth_m., and the task scored needs segmentation"):
        open_predictions(folder, Segmentation(), ANIMALS)
    (tmp_path / "p" / "submission.json").unlink()
    with pytest.raises(ValueError, match=r"1 channel\(s\) of 16 bits; 1 of 8 bits are needed"):
        open_predictions(folder, Segmentation(), ANIMALS).read(one)
    cv2.imwrite(str(folder / "image_0.png"), np.zeros(one.depth_m.shape, np.uint16))
    with pytest.raises(
        ValueError, match=r"image_0.png has 0, no prediction, in [\d,]+ pixels whose depth was measured"
    ):
        open_predictions(folder, Depth(), None).read(one)
    cv2.imwrite(str(folder / "image_0.png"), np.full((2, 2), 3, np.uint8))
    with pytest.raises(ValueError, match=r"image_0.png holds the value 3; animals has 17, 18, 90, and 255 is no class"):
        open_predictions(folder, Segmentation(), ANIMALS).read(one)
    with pytest.raises(ValueError, match="leads out of the folder"):
        written(tmp_path / "q", Sample(image=one.image, image_id="../x"), {"depth": one.depth_m})
    writer = SubmissionWriter(tmp_path / "r", {"depth": Depth()}, SPACES)
    writer.add(one, {"depth": one.depth_m})
    with pytest.raises(ValueError, match="two images are called 'image_0'"):
        writer.add(one, {"depth": one.depth_m})


@pytest.mark.parametrize(
    ("files", "image_id", "found"),
    [
        (["b/x", "x"], "b/x", "b/x"),
        (["x"], "b/x", "x"),  # all in one folder, whatever folders the images lie in
        (["run1/b/x", "run1/c/x"], "b/x", "run1/b/x"),  # in a folder of their own
        (["run1/x_pred_labelIds"], "x", "run1/x_pred_labelIds"),
        (["a/x", "c/x"], "b/x", "'b/x' has no prediction in .* which holds 2 PNGs"),
        (["run1/x", "run2/x"], "x", "'x' has 2 predictions in .*: run1/x, run2/x; each .* name the folder"),
    ],
)
def test_the_file_of_an_image_is_never_that_of_another(tmp_path, files, image_id, found):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((2, 3), np.uint16))
    predictions = open_predictions(tmp_path, Depth(), None)
    one = Sample(image=np.zeros((2, 3, 3), np.uint8), image_id=image_id)

    if " " not in found:
        assert predictions.read(one)[0] == found
        return
    with pytest.raises(ValueError, match=found):
        predictions.read(one)


class Photographs:
    """Three images, the second without labels."""

    provides = {"boxes": ANIMALS}

    def __len__(self):
        return 3

    def read(self, index):
        return Sample(image=np.zeros((8, 9, 3), np.uint8), image_id=f"{index:03}")


def test_boxes_of_images_that_no_data_set_has_are_refused(tmp_path):
    row = {"category_id": 17, "bbox": [0, 0, 4, 4], "score": 0.5}
    photographs, file = NamedDataset("photographs", Photographs()), tmp_path / "boxes.json"

    def check(*image_ids):
        file.write_text(json.dumps([{**row, "image_id": image_id} for image_id in image_ids]))
        predictions = open_predictions(file, Detection(), ANIMALS)
        for labelled in (0, 2):
            predictions.read(photographs.read(labelled))
        check_images(file, predictions, [photographs])

    check(0, 1, "002")  # the image without labels is one of the data set's
    with pytest.raises(ValueError, match=r"2 image\(s\) that are not in photographs, the first is 3; .* --split"):
        check(0, 3, "7")
