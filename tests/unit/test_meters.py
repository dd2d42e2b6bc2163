"""All meters: a split measured by several ranks gives exactly the numbers of one; and normals by hand."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from visionmtl.metrics.base import declared, numbers
from visionmtl.metrics.depth import DepthMeter
from visionmtl.metrics.detection import DetectionMeter
from visionmtl.metrics.disparity import DisparityMeter
from visionmtl.metrics.distance import DistanceMeter
from visionmtl.metrics.normals import NormalsMeter
from visionmtl.metrics.segmentation import SegmentationMeter
from visionmtl.structures import Boxes, Detections, LabelSpace, Sample

SPACE = LabelSpace("five", tuple("abcde"), ((0, 0, 0),) * 5)
PIXEL = np.zeros((1, 1, 3), np.uint8)

METERS = {
    "detection": lambda: DetectionMeter(SPACE),
    "segmentation": lambda: SegmentationMeter(SPACE),
    "depth per image": lambda: DepthMeter("per_image"),
    "depth pooled": lambda: DepthMeter("pooled"),
    "depth batch mean": lambda: DepthMeter("batch_mean", group_images=3),
    "depth as disparity": lambda: DisparityMeter(1e-3, 10.0),
    "normals": NormalsMeter,
    "distance": lambda: DistanceMeter(SPACE),
}


def labelled(number, rng):
    """An image with every label, and a prediction for each kind of meter."""
    corners = rng.uniform(0, 80, (6, 2)).astype(np.float32)
    xyxy = np.concatenate([corners, corners + rng.uniform(5, 60, (6, 2)).astype(np.float32)], axis=1)
    classes = rng.integers(0, 5, 6)
    scores = rng.choice([0.2, 0.4, 0.6], 6).astype(np.float32)  # many ties
    sample = Sample(
        image=PIXEL,
        image_id=str(number),
        boxes=Boxes(xyxy, classes, rng.random(6) < 0.2, (xyxy[:, 2:] - xyxy[:, :2]).prod(axis=1)),
        segmentation=rng.choice([0, 1, 2, 3, 255], (9, 11)).astype(np.uint8),
        depth_m=rng.uniform(0, 11, (9, 11)).astype(np.float32),
        normals=rng.normal(size=(9, 11, 3)).astype(np.float32),
        disparity_px_metre=400 + number,
    )
    detections = Detections(xyxy + rng.normal(0, 3, xyxy.shape).astype(np.float32), scores, classes)
    return sample, {
        "detection": detections,
        "distance": (detections, rng.uniform(0.01, 11, (9, 11)).astype(np.float32)),
        "segmentation": rng.integers(0, 4, (9, 11)).astype(np.uint8),
        "depth": rng.uniform(0.01, 11, (9, 11)).astype(np.float32),
        "normals": rng.normal(size=(9, 11, 3)).astype(np.float32),
    }


@pytest.mark.parametrize("name", METERS)
def test_merged_ranks_equal_one_process_exactly(name):
    rng = np.random.default_rng(3)
    one, ranks = METERS[name](), [METERS[name]() for _ in range(3)]
    for number in range(13):
        sample, predictions = labelled(number, rng)
        one.update(predictions[name.split()[0]], sample)
        ranks[number % 3].update(predictions[name.split()[0]], sample)

    states = [pickle.loads(pickle.dumps(rank.state())) for rank in ranks]
    covered = {path: declared(one.metrics, path) for path, _ in numbers(one.compute())}
    assert [path for path, pattern in covered.items() if pattern is None] == [], "every number has its direction"
    assert set(one.metrics) == set(covered.values()), "and every direction has its number"
    counts = {path for path, value in numbers(one.compute()) if isinstance(value, int)}
    neither = {path for path, pattern in covered.items() if one.metrics[pattern] is None}
    assert counts == neither - {"log_bias"}  # which is best near 0

    merged = METERS[name]()
    for state in reversed(states):
        merged.merge(state)

    assert merged.compute() == one.compute()  # every digit
    json.dumps(one.compute(), allow_nan=False)


class Waits(TorchDispatchMode):
    """Collects the operators for which the host of a GPU would stop until a value is there."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("segmentation", {}), ("depth", {"protocol": "pooled"}), ("depth", {"align": "median"})],
)
def test_tensors_are_counted_where_they_lie_without_waiting_and_give_the_same(name, settings):
    rng = np.random.default_rng(4)
    arrays, tensors = (SegmentationMeter(SPACE) if name == "segmentation" else DepthMeter(**settings) for _ in range(2))
    for number in range(5):
        sample, predictions = labelled(number, rng)
        arrays.update(predictions[name], sample)
        with Waits() as waits:
            tensors.update(torch.from_numpy(predictions[name]), sample)
        assert not waits.found

    assert tensors.compute() == arrays.compute()


def test_what_is_wrong_in_a_tensor_is_found_at_the_end():
    sample, predictions = labelled(0, np.random.default_rng(4))
    classes, depth = SegmentationMeter(SPACE), DepthMeter()
    classes.update(torch.from_numpy(predictions["segmentation"] + 7), sample)
    depth.update(torch.from_numpy(predictions["depth"] * np.float32(np.nan)), sample)

    with pytest.raises(ValueError, match=r"the prediction has class ids .* label space 'five' has 0 to 4"):
        classes.compute()
    with pytest.raises(ValueError, match=r"image '0': .* predicted depths are NaN"):
        depth.state()


def disparity_metered(predicted, true, camera=500.0, **limits):
    """camera: 0.25 m apart, 2000 px."""
    meter = DisparityMeter(**{"min_m": 1e-3, "max_m": 80.0, **limits})
    sample = Sample(image=PIXEL, image_id="a", depth_m=np.float32(true), disparity_px_metre=camera)
    meter.update(np.float32(predicted), sample)
    return meter.compute()


def test_disparity_by_hand():
    result = disparity_metered([[10, 5, 50]], [[20, 0, 50]])  # 50 px for 25 px, not measured, 10 px for 10 px

    assert result["abs_err_px"] == 12.5  # 25 px on one of two measured pixels
    assert result["abs_err"] == pytest.approx(12.5 * 256 / 65535)  # as in the official files, brought to 0..1
    assert result["rel_err"] == pytest.approx(25 * 256 / (25 * 256 + 1) / 2)
    assert result["pixels"] == 2
    assert "(256 px + 1) / 65535, px of the whole image" in result["protocol"]
    assert disparity_metered([[1]], [[0]])["rel_err"] is None
    with pytest.raises(ValueError, match="1 predicted depths are not positive"):
        disparity_metered([[0, 1]], [[1, 1]])
    with pytest.raises(ValueError, match=r"image 'a' has depth, but no stereo camera; .*; score this data set with"):
        disparity_metered([[1]], [[1]], camera=None)


def angled(*degrees):
    """Normals [1, P, 3] at these angles from straight ahead."""
    radians = np.radians(np.array(degrees, np.float64))
    return np.stack([np.sin(radians), 0 * radians, np.cos(radians)], axis=-1)[None].astype(np.float32)


def normals_metered(predicted, true):
    meter = NormalsMeter()
    meter.update(predicted, Sample(image=PIXEL, image_id="a", normals=true))
    return meter.compute()


def test_normal_angles_by_hand():
    result = normals_metered(angled(0, 10, 20, 60), angled(0, 0, 0, 0))

    assert result["mean_deg"] == pytest.approx(22.5, abs=1e-4)
    assert result["median_deg"] == pytest.approx(15, abs=0.01)
    assert (result["within_11_25"], result["within_22_5"], result["within_30"]) == (0.5, 0.75, 0.75)


def test_opposite_normals_are_180_degrees_apart():
    result = normals_metered(angled(180), angled(0))

    assert result["mean_deg"] == pytest.approx(180, abs=1e-4)
    assert result["median_deg"] == pytest.approx(180, abs=0.01)


def test_unknown_normals_do_not_count_and_a_prediction_without_direction_is_no_hit():
    true = angled(0, 0, 0)
    true[0, 2] = 0

    result = normals_metered(np.zeros_like(true), true)

    assert result["pixels"] == 2
    assert result["mean_deg"] == 90


def test_the_length_of_a_normal_does_not_matter():
    assert normals_metered(100 * angled(25), angled(0))["mean_deg"] == pytest.approx(25, abs=1e-4)


def test_without_known_normals_every_score_is_none():
    result = normals_metered(angled(0), np.zeros((1, 1, 3), np.float32))

    assert result["mean_deg"] is None
    assert result["median_deg"] is None
    assert result["within_30"] is None


@pytest.mark.parametrize(
    ("predicted", "message"),
    [(angled(0, 0), "allowed is .* one size"), (np.nan * angled(0), "1 predicted normals are NaN")],
)
def test_wrong_predictions_of_normals_are_errors(predicted, message):
    with pytest.raises(ValueError, match=message):
        normals_metered(predicted, angled(0))
