"""Tasks: what the contract promises, for every task on disk and every loss it can choose."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from contract import (
    CHANNELS,
    FRAMES,
    SIZE,
    SPACE,
    blank,
    check_prediction,
    decoder,
    found,
    gradients,
    loss_parts,
    random_maps,
    sample,
    total,
)
from pydantic import ValidationError

from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.heads.fcos import FCOS
from visionmtl.ops.ranks import step_totals
from visionmtl.structures import Boxes, ImageMeta, Sample
from visionmtl.tasks.base import Task
from visionmtl.tasks.classification import Classification
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.normals import Normals
from visionmtl.tasks.segmentation import Segmentation
from visionmtl.visualization.draw import DrawOptions

CHOICES = {
    "detection with fcos": Detection(head=FCOS(num_convs=1)),
    "detection with bins": Detection(head=Aligned(num_convs=1, bins=8)),
    "segmentation with ohem": Segmentation(hardest=0.3, label_smoothing=0.1),
    "segmentation with weights": Segmentation(class_weights=(1, 2, 0.5)),
    "segmentation with dice": Segmentation(region_loss="dice"),
    "segmentation with lovasz": Segmentation(region_loss="lovasz", region_weight=0.5),
    "classification of many": Classification(many=True, class_weights=(1, 2, 0.5)),
    "classification with smoothing": Classification(label_smoothing=0.1, level=4),
    "depth in bins": Depth(head="bins", num_bins=16),
}
TASKS = [pytest.param(p.values[0](), id=p.id) for p in found(Task)] + [
    pytest.param(task, id=name) for name, task in CHOICES.items()
]
every_task = pytest.mark.parametrize("task", TASKS)


@every_task
def test_a_task_learns_from_labelled_empty_and_unlabelled_images_together(task: Task):
    module = decoder(task).train()

    parts = loss_parts(task, module(random_maps(task.levels, 3)), [sample(0), blank(task), None], spoil=True)
    total(parts).backward()

    for name, part in parts.items():
        assert part.dtype == torch.float32 and part.shape == () and part.isfinite() and part >= 0, name
    assert all(g.isfinite().all() for g in gradients(module).values())


@every_task
def test_its_gradient_reaches_every_parameter(task: Task):
    module = decoder(task).train()
    total(loss_parts(task, module(random_maps(task.levels, 2)), [sample(0), sample(1)])).backward()
    assert [name for name, gradient in gradients(module).items() if not gradient.any()] == []


@every_task
def test_images_without_a_label_teach_exactly_nothing(task: Task):
    module = decoder(task).train()

    loss = total(loss_parts(task, module(random_maps(task.levels, 2)), [None, None], spoil=True))
    loss.backward()

    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(module).values())


@every_task
def test_unlabelled_images_in_the_batch_change_neither_loss_nor_gradient(task: Task):
    module = decoder(task).eval()  # batch statistics would connect the images
    maps = random_maps(task.levels, 5)
    first = {level: values[:2] for level, values in maps.items()}

    alone = loss_parts(task, module(first), [sample(0), sample(1)])
    total(alone).backward()
    wanted = gradients(module)
    joined = loss_parts(task, module(maps), [sample(0), sample(1), None, None, None], spoil=True)
    total(joined).backward()

    torch.testing.assert_close(joined, alone, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients(module), wanted, rtol=1e-4, atol=1e-6)


@every_task
def test_predictions_are_in_user_units_at_the_original_size_and_can_be_judged_and_drawn(task: Task):
    raw = decoder(task).eval()(random_maps(task.levels, 3))
    meter = task.meter(SPACE)

    with torch.no_grad():
        predictions = task.predict(raw, FRAMES, SIZE)

    for seed, (prediction, meta) in enumerate(zip(predictions, FRAMES, strict=True)):
        truth = sample(seed, size=meta.size)
        check_prediction(prediction, meta.size)
        meter.update(prediction, truth)
        picture = task.draw(truth.image, prediction, SPACE, DrawOptions(0.0))
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    metric = meter.compute()[task.primary_metric]
    assert isinstance(metric, float) and np.isfinite(metric)


@every_task
def test_the_truth_is_a_perfect_prediction_and_draws_like_one(task: Task):
    one, other = task.meter(SPACE), task.meter(SPACE)
    for meter, seed in ((one, 0), (other, 1)):
        known = sample(seed)
        meter.update(task.truth(known), known)
        true = task.truth(known)
        assert task.draw(known.image, true, SPACE, DrawOptions(0.5)).dtype == np.uint8
        wrong = task.draw_errors(known.image, true, true, SPACE, DrawOptions(0.5))
        assert wrong is None or wrong.dtype == np.uint8
    one.merge(other.state())

    best = {"max": 1, "min": 0}[task.meter_type.metrics[task.primary_metric]]
    assert one.compute()[task.primary_metric] == pytest.approx(best, abs=1e-6)


@every_task
def test_what_was_not_labelled_has_no_truth(task: Task):
    others = [name for name in ("boxes", "segmentation", "depth_m", "normals") if name != task.field]
    assert task.truth(sample(0, *others)) is None


@pytest.mark.parametrize("task", [case for case in TASKS if case.values[0].field not in ("boxes", "image_labels")])
def test_padding_is_no_label(task: Task):
    raw = decoder(task).eval()(random_maps(task.levels, 1))
    raw.retain_grad()

    total(loss_parts(task, raw, [sample(0, size=(40, 50))])).backward()

    assert raw.grad[:, :, :9, :12].any()
    assert not raw.grad[:, :, 11:].any() and not raw.grad[:, :, :, 14:].any(), "one cell beyond is interpolation"


def test_box_targets_are_padded_to_a_few_lengths():
    lengths = [Detection().collate([sample(0, num_boxes=n), None], SIZE)["boxes"].shape for n in (0, 32, 33, 256, 257)]
    assert lengths == [(2, 32, 4), (2, 32, 4), (2, 64, 4), (2, 256, 4), (2, 512, 4)]


def test_a_crowd_reaches_the_loss_as_a_crowd():
    boxes = Boxes(np.array([[0, 0, 9, 9]], np.float32), np.array([1]), np.array([True]), np.array([81], np.float32))
    targets = Detection().collate([Sample(image=np.zeros((*SIZE, 3), np.uint8), image_id="", boxes=boxes)], SIZE)
    assert targets["crowd"][0].sum() == 1 == targets["valid"][0].sum()


def test_a_depth_out_of_the_metric_range_counts_as_missing():
    task = Depth(min_depth_m=1, max_depth_m=5)
    raw = torch.zeros(1, 1, SIZE[0] // 4, SIZE[1] // 4, requires_grad=True)
    depth_m = torch.zeros(1, *SIZE)
    depth_m[0, 0, :4] = torch.tensor([0.5, 9.0, torch.nan, torch.inf])
    targets = {"depth_m": depth_m}
    totals = step_totals([{"depth": task.count(targets, SIZE)}])["depth"]
    assert total(task.loss(raw, targets, torch.tensor([True]), totals)) == 0


def test_depth_under_bfloat16_is_not_rounded_to_bfloat16():
    module = decoder(Depth()).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        raw = module(random_maps(Depth().levels, 1))
    assert raw.dtype == torch.float32
    assert len(raw.unique()) > raw.numel() // 2, "bfloat16 has 64 values between 1 and 2"


def test_depth_of_an_input_twice_as_large_as_in_training_is_doubled():
    task, meta = Depth(max_depth_m=100), ImageMeta(size=SIZE, content_size=SIZE)
    raw = torch.full((1, 1, SIZE[0] // 4, SIZE[1] // 4), math.log(3))
    for predict in (task.predict, lambda raw, *rest: task.predict_mirrored(raw, raw, *rest)):
        assert predict(raw, [meta], SIZE)[0].mean() == pytest.approx(3, rel=1e-5)
        assert predict(raw, [replace(meta, zoom=2.0)], SIZE)[0].mean() == pytest.approx(6, rel=1e-5)


def test_of_equal_logits_the_first_class_is_predicted():
    logits = torch.randint(3, (2, 5, *SIZE)).float()
    task = Segmentation()
    whole = [ImageMeta(size=SIZE, content_size=SIZE)] * 2
    expected = logits.numpy().argmax(axis=1)
    np.testing.assert_array_equal(task.predict(logits, whole, SIZE), expected)
    graph = torch.compile(lambda raw: task.decode_in_graph(raw, SIZE, torch.tensor([SIZE]), 1.0), backend="eager")
    for decode in (graph, lambda raw: task.decode_in_graph(raw, SIZE, torch.tensor([SIZE]), 1.0)):
        np.testing.assert_array_equal(decode(logits)["classes"], expected)


def test_predicted_normals_have_unit_length():
    with torch.no_grad():
        raw = decoder(Normals()).eval()(random_maps(Normals().levels, 3))
        for prediction in Normals().predict(raw, FRAMES, SIZE):
            np.testing.assert_allclose(np.linalg.norm(prediction, axis=2), 1, atol=1e-5)


def test_a_box_in_the_padding_is_no_detection():
    task = Detection(head=FCOS(num_convs=0), min_score=0.0)
    with torch.no_grad():
        raw = decoder(task)(random_maps(task.levels, 1))
        (prediction,) = task.predict(raw, [ImageMeta(size=(64, 64), content_size=(32, 32))], SIZE)
    assert len(prediction.scores) > 0 and (prediction.xyxy[:, 2:] > prediction.xyxy[:, :2]).all()
    assert (prediction.xyxy <= 64).all(), "the original is twice as large as the content"


def test_idle_and_contradicting_settings_are_errors():
    with pytest.raises(ValidationError, match="choose region_loss 'dice' or 'lovasz'"):
        Segmentation(region_weight=2)
    with pytest.raises(ValidationError, match="choose head 'bins' or remove num_bins"):
        Depth(num_bins=8)
    with pytest.raises(ValidationError, match="the first must be smaller"):
        Depth(min_depth_m=3, max_depth_m=2)
    with pytest.raises(ValueError, match="one factor for each of: ball, box, wall"):
        Segmentation(class_weights=(1, 2)).build(CHANNELS, SPACE)
