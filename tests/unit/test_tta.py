"""Flipping at test time: what is mirrored, and how a task makes one prediction of two views."""

import numpy as np
import pytest
import torch
from contract import FRAMES, SIZE, decoder, found, random_maps

from visionmtl.engine.evaluator import mirror_contents
from visionmtl.structures import Detections, ImageClasses, ImageMeta
from visionmtl.tasks.base import Task
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.normals import Normals
from visionmtl.tasks.segmentation import Segmentation

WHOLE = [ImageMeta(SIZE, SIZE)] * 2
every_task = pytest.mark.parametrize("task", [pytest.param(p.values[0](), id=p.id) for p in found(Task)])


def two_views(task):
    module = decoder(task).eval()
    with torch.no_grad():
        return module(random_maps(task.levels, 2)), module(random_maps(task.levels, 2))


def turned(prediction, width):
    """The prediction for the mirrored image."""
    if isinstance(prediction, Detections):
        x1, y1, x2, y2 = prediction.xyxy.T
        return Detections(np.stack([width - x2, y1, width - x1, y2], axis=1), prediction.scores, prediction.labels)
    if isinstance(prediction, ImageClasses):
        return prediction
    mirrored = prediction[:, ::-1]
    return mirrored * np.float32([-1, 1, 1]) if prediction.ndim == 3 else mirrored


def rows(prediction):
    table = np.concatenate([prediction.xyxy, prediction.scores[:, None], prediction.labels[:, None]], axis=1)
    return table[np.lexsort(table.T.round(3))]


@every_task
def test_exchanging_the_views_mirrors_the_prediction(task: Task):
    one, other = two_views(task)

    with torch.no_grad():
        there, back = (task.predict_mirrored(*views, FRAMES[:2], SIZE) for views in ((one, other), (other, one)))

    for a, b, meta in zip(there, back, FRAMES, strict=False):
        expected = turned(b, meta.size[1])
        if isinstance(a, Detections):
            a, expected = rows(a), rows(expected)
        if isinstance(a, ImageClasses):
            np.testing.assert_array_equal(a.labels, expected.labels)
            a, expected = a.scores, expected.scores
        np.testing.assert_allclose(a, expected, atol=2e-3)


@pytest.mark.parametrize("task", [Segmentation(), Depth(), Normals()], ids=lambda task: task.type)
def test_two_views_that_agree_change_nothing(task: Task):
    raw, _ = two_views(task)
    mirrored = raw.flip(-1) * (torch.tensor([-1.0, 1, 1])[:, None, None] if task.type == "normals" else 1)

    both = task.predict_mirrored(raw, mirrored, WHOLE, SIZE)

    for a, b in zip(both, task.predict(raw, WHOLE, SIZE), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_content_is_mirrored_and_the_padding_stays():
    image = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    metas = [ImageMeta((9, 9), (2, 3)), ImageMeta((4, 5), (4, 5))]

    mirrored = mirror_contents(image, metas)

    assert torch.equal(mirrored[0, :, :2, :3], image[0, :, :2, :3].flip(-1))
    assert torch.equal(mirrored[0, :, 2:], image[0, :, 2:])
    assert torch.equal(mirrored[0, :, :, 3:], image[0, :, :, 3:])
    assert torch.equal(mirrored[1], image[1].flip(-1))
    assert torch.equal(mirror_contents(mirrored, metas), image)


def test_a_task_that_cannot_join_two_views_says_what_to_do():
    class Mute(Segmentation, frozen=True):
        predict_mirrored = Task.predict_mirrored

    with pytest.raises(ValueError, match=r"'segmentation' does not say.*define it in .*, or leave out --tta flip"):
        Mute().predict_mirrored(None, None, [], SIZE)
