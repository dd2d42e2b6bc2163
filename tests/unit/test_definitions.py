"""The same predictions under all definitions in use, by hand."""

import numpy as np
import pytest

from visionmtl.metrics.definitions import with_definitions
from visionmtl.metrics.depth import DepthMeter
from visionmtl.metrics.detection import DetectionMeter
from visionmtl.metrics.segmentation import SegmentationMeter
from visionmtl.structures import IGNORE, LabelSpace, Sample

SPACE = LabelSpace("abc", ("a", "b", "c"), ((0, 0, 0),) * 3)


def sample(image_id: str, **labels: np.ndarray) -> Sample:
    return Sample(image=np.zeros((1, 1, 3), np.uint8), image_id=image_id, **labels)


def test_miou_by_hand():
    """Image 1: truth a a a b, guess a a b b, and void guessed as b. Image 2: truth a a, guess a c."""
    meter = with_definitions(SegmentationMeter(SPACE))
    pairs = [([0, 0, 1, 1, 1], [0, 0, 0, 1, IGNORE]), ([0, 2], [0, 0])]
    for number, (guess, truth) in enumerate(pairs):
        meter.update(np.array([guess], np.uint8), sample(str(number), segmentation=np.array([truth], np.uint8)))

    result = meter.compute()
    rows = result["definitions"]

    # together: a 3 hits of 5 true and 3 predicted, b 1 of 1 and 2, c 0 of 0 and 1
    assert rows["one table, void left out"] == pytest.approx({"miou": (3 / 5 + 1 / 2 + 0) / 3, "pixel_accuracy": 4 / 6})
    assert rows["one table, over classes of the truth"]["miou"] == pytest.approx((3 / 5 + 1 / 2) / 2)
    # the void pixel makes b's union 3, and 7 pixels in all
    assert rows["one table, void pixels are wrong"] == pytest.approx(
        {"miou": (3 / 5 + 1 / 3 + 0) / 3, "pixel_accuracy": 4 / 7}
    )
    # alone: a 2/3, b 1/2; then a 1/2, c 0
    first, second = (2 / 3 + 1 / 2) / 2, (1 / 2 + 0) / 2
    assert rows["mean of images, void left out"] == pytest.approx(
        {"miou": (first + second) / 2, "pixel_accuracy": (3 / 4 + 1 / 2) / 2}
    )
    assert rows["mean of images, over classes of the truth"]["miou"] == pytest.approx((first + 1 / 2) / 2)
    assert result["miou"] == rows["one table, void left out"]["miou"]


def test_depth_by_hand():
    """Two images of 480x640, exact but for a factor of 1.5 and of 1, the first with a tenth of the pixels."""
    meter = with_definitions(DepthMeter("nyu_eigen", 1e-3, 10.0))
    few, all_ = np.zeros((480, 640), np.float32), np.full((480, 640), 2, np.float32)
    few[100:148] = 2  # 48 of 480 rows, all inside the crop's
    meter.update(few * 1.5 + (few == 0), sample("0", depth_m=few))
    meter.update(all_, sample("1", depth_m=all_))

    rows = meter.compute()["definitions"]

    assert len(rows) == 8
    assert all(row["rmse_m"] == 0 and row["delta1"] == 1 for name, row in rows.items() if "median-aligned" in name)
    for crop, share in {"whole image": 48 / (48 + 480), "crop 45:471 x 41:601": 48 / (48 + 426)}.items():
        assert rows[f"mean of images, {crop}, metric"]["rmse_m"] == pytest.approx(0.5)  # of 1 m and of 0
        assert rows[f"all pixels pooled, {crop}, metric"]["rmse_m"] == pytest.approx(np.sqrt(share))
        assert rows[f"all pixels pooled, {crop}, metric"]["delta1"] == pytest.approx(1 - share)


def test_ranks_and_other_sizes():
    rng = np.random.default_rng(0)
    for make, field in ((lambda: SegmentationMeter(SPACE), "segmentation"), (lambda: DepthMeter(), "depth_m")):
        together, ranks = with_definitions(make()), [with_definitions(make()) for _ in range(2)]
        for number in range(5):
            truth, guess = (rng.integers(0, 3, (6, 7)).astype("uint8" if field[0] == "s" else "float32") for _ in "ab")
            for meter in (together, ranks[number % 2]):
                meter.update(guess, sample(str(number), **{field: truth}))
        ranks[1].merge(ranks[0].state())
        assert ranks[1].compute() == together.compute()
    assert list(together.compute()["definitions"]) == [  # Eigen's crop is of 480x640 alone
        "mean of images, whole image, metric", "mean of images, whole image, median-aligned",
        "all pixels pooled, whole image, metric", "all pixels pooled, whole image, median-aligned",
    ]  # fmt: skip


def test_boxes_have_one_definition():
    meter = DetectionMeter(SPACE)
    assert with_definitions(meter) is meter
