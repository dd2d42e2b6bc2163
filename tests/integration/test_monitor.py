"""The best checkpoint: every metric in its own direction, and refused before the first step where nothing tells it."""

from typing import Any

import numpy as np
import pytest

from visionmtl.datasets import NamedDataset
from visionmtl.engine.monitor import Monitor
from visionmtl.structures import Boxes, LabelSpace, Sample
from visionmtl.tasks.base import Task
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.normals import Normals
from visionmtl.tasks.segmentation import Segmentation

SPACE = LabelSpace("two", ("chair", "sofa"), ((0, 0, 0), (255, 255, 255)))
TASKS: dict[str, Task] = {"seg": Segmentation(), "depth": Depth(), "normals": Normals(), "boxes": Detection()}
SPACES = {"seg": SPACE, "depth": None, "normals": None, "boxes": SPACE}
NAMES = {name: name for name in TASKS}
RESULTS = {
    "seg": {"miou": 0.5, "pixel_accuracy": 0.75, "per_class": {"sofa": {"iou": 0.25}}},
    "depth": {"rmse_m": 3.0, "delta1": 0.4},
    "normals": {"mean_deg": 20.0, "within_11_25": None},
    "boxes": {"images": 0},
}


def monitor(best: str, names: dict[str, str] = NAMES) -> Monitor:
    return Monitor(best, TASKS, names)


@pytest.mark.parametrize(
    ("best", "value"),
    [
        ("mean", (0.5 + 1 / (1 + 3)) / 2),  # over the tasks that were measured
        ("seg/pixel_accuracy", 0.75),
        ("seg/per_class/sofa/iou", 0.25),
        ("depth/rmse_m", -3),
        ("depth/delta1", 0.4),
        ("normals/mean_deg", -20),
    ],
)
def test_higher_is_better_for_every_metric(best: str, value: float):
    assert monitor(best).value(RESULTS) == pytest.approx(value)


def test_a_task_of_several_data_sets_counts_once_in_the_mean_and_each_can_be_named():
    names = {"depth@a": "depth", "depth@b": "depth", "seg": "seg"}
    results = {"depth@a": {"rmse_m": 1.0}, "depth@b": {"rmse_m": 3.0}, "seg": {"miou": 0.25}}

    assert monitor("mean", names).value(results) == pytest.approx(((1 / 2 + 1 / 4) / 2 + 0.25) / 2)
    assert monitor("depth@b/rmse_m", names).value(results) == -3


@pytest.mark.parametrize(
    ("best", "said"),
    [
        ("dpth/rmse_m", r"train.best is 'dpth/rmse_m' \(did you mean 'depth'\?\), but the validation data judge seg,"),
        (
            "depth/rmse",
            r"'rmse' \(did you mean 'rmse_m'\?\) is no metric of this task; allowed after depth/ are abs_rel",
        ),
        ("depth/pixels", r"'pixels' is a count, neither better nor worse; allowed after depth/ are abs_rel, sq_rel"),
        ("boxes/ap5", r"'ap5' \(did you mean 'ap\d*'\?\) is no metric of this task"),
        ("depth/images", "'images' is no metric of this task"),
        ("seg/per_class/sofa/pixels", "'per_class/sofa/pixels'.* is a count"),
    ],
)
def test_what_has_no_direction_is_refused(best: str, said: str):
    with pytest.raises(ValueError, match=said):
        monitor(best)


class Reader:
    """Three images: the first without depth, the second with nothing measured, the third with all at 2 m."""

    provides = {"segmentation": SPACE, "depth_m": None, "boxes": SPACE}

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 3

    def read(self, index: int) -> Sample:
        self.reads.append(index)
        side = 10 * (index + 1)  # px: small boxes only
        box = Boxes(
            np.array([[0, 0, side, side]], np.float32), np.zeros(1, np.int64), np.zeros(1, bool),
            np.array([side**2], np.float32),
        )  # fmt: skip
        depth_m = None if index == 0 else np.full((4, 4), 2.0 * (index - 1), np.float32)
        return Sample(
            image=np.zeros((4, 4, 3), np.uint8), image_id=str(index), boxes=box,
            segmentation=np.zeros((4, 4), np.uint8), depth_m=depth_m,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("best", "reads"),
    [
        ("mean", [0]),
        ("seg/miou", [0]),
        ("depth/delta1", [0, 1, 2]),
        ("boxes/ap_small", [0]),
        ("boxes/per_class/chair/ap50", [0]),
    ],
)
def test_labels_are_read_until_they_tell_the_metric(best: str, reads: list[int]):
    reader = Reader()

    monitor(best).check(SPACES, [NamedDataset("home", reader)])

    assert reader.reads == reads


@pytest.mark.parametrize(
    ("best", "names", "limit"),
    [
        ("boxes/ap_large", NAMES, None),
        ("seg/per_class/sofa/iou", NAMES, None),
        ("seg/per_class/sofaa/iou", NAMES, None),
        ("boxes/ar7", NAMES, None),
        ("depth/rmse_m", NAMES, 2),  # the third image would tell
        ("normals/mean_deg", NAMES, None),
        ("depth@street/rmse_m", {"depth@home": "depth", "depth@street": "depth"}, None),
        ("mean", {"normals": "normals"}, None),
    ],
)
def test_what_no_label_of_the_split_tells_is_refused(best: str, names: dict[str, str], limit: int | None):
    sources: list[Any] = [NamedDataset("home", Reader())]

    with pytest.raises(ValueError, match=f"train.best is '{best}', but the validation images have no labels that tell"):
        monitor(best, names).check(SPACES, sources, limit)


@pytest.mark.parametrize(
    ("best", "saved_best", "value", "expected"),
    [
        ("depth/delta1", "depth/delta1", 0.5, True),
        ("depth/delta1", "depth/rmse_m", -2.0, False),
        ("normals/mean_deg", "normals/mean_deg", 60.0, False),  # an older version kept the largest
        ("normals/mean_deg", "normals/mean_deg", -20.0, True),
        ("mean", "mean", 0.3, True),
    ],
)
def test_a_value_by_another_rule_or_direction_is_not_comparable(
    best: str, saved_best: str, value: float, expected: bool
):
    assert monitor(best).comparable(saved_best, value) is expected
