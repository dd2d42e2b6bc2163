"""Box geometry: values checkable by hand, and parity with torchvision."""

import pytest
import torch
import torchvision
from torch import Tensor

from visionmtl.ops.boxes import (
    anchor_points,
    box_area,
    from_distances,
    generalised_iou,
    nms,
    nms_in_graph,
    pairwise_iou,
    to_distances,
)


def random_boxes(*shape: int, extent: float = 100) -> Tensor:
    low = torch.rand(*shape, 2) * extent
    return torch.cat([low, low + torch.rand(*shape, 2) * extent / 2 + 0.5], dim=-1)


def test_cells_are_centred_in_their_strides():
    centres, strides = anchor_points([(3, 2, 3), (4, 1, 1)], torch.zeros(()))
    assert centres.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8]]
    assert strides.tolist() == [8] * 6 + [16]


def test_distances_point_left_top_right_bottom_and_lead_back():
    boxes, centres = torch.tensor([[[2.0, 3, 10, 20]]]), torch.tensor([[4.0, 4]])
    assert to_distances(boxes, centres).tolist() == [[[2, 1, 6, 16]]]
    torch.testing.assert_close(from_distances(to_distances(boxes, centres), centres), boxes)
    assert to_distances(boxes, torch.tensor([[0.0, 4]])).min() < 0, "outside"


def test_two_half_overlapping_squares_share_a_third():
    left, right = torch.tensor([[[0.0, 0, 2, 2]]]), torch.tensor([[[1.0, 0, 3, 2]]])
    assert pairwise_iou(left, right).item() == pytest.approx(1 / 3)
    assert generalised_iou(left, right).item() == pytest.approx(1 / 3), "the hull is the union"


def test_disjoint_squares_have_a_giou_below_zero():
    left, right = torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 0, 3, 1])
    assert generalised_iou(left, right).item() == pytest.approx(-1 / 3), "hull 3, union 2"
    assert generalised_iou(left, torch.tensor([99.0, 99, 100, 100])) > -1


def test_overlaps_equal_those_of_torchvision():
    torch.manual_seed(0)
    a, b = random_boxes(2, 30), random_boxes(2, 40)
    for i in range(2):
        torch.testing.assert_close(pairwise_iou(a, b)[i], torchvision.ops.box_iou(a[i], b[i]))
        paired = torchvision.ops.generalized_box_iou(a[i], b[i, :30]).diagonal()
        torch.testing.assert_close(generalised_iou(a, b[:, :30])[i], paired)


def test_no_boxes_overlap_nothing():
    assert pairwise_iou(torch.zeros(2, 0, 4), random_boxes(2, 5)).shape == (2, 0, 5)


def test_boxes_without_an_area_keep_overlaps_and_gradients_finite():
    point = torch.tensor([[[5.0, 5, 5, 5]]], requires_grad=True)
    assert pairwise_iou(point, point).item() == 0
    assert box_area(torch.tensor([5.0, 5, 3, 9])) == 0, "a negative width does not make a positive area"
    giou = generalised_iou(point, point.detach())
    giou.sum().backward()
    assert giou.isfinite().all() and point.grad.isfinite().all()


def reference(boxes: Tensor, scores: Tensor, max_iou: float, min_score: float, keep: int) -> tuple[Tensor, ...]:
    """One image by torchvision."""
    cell, label = (scores > min_score).nonzero(as_tuple=True)
    kept = torchvision.ops.batched_nms(boxes[cell], scores[cell, label], label, max_iou)[:keep]
    return boxes[cell][kept], scores[cell, label][kept], label[kept]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("keep", [5, 1000])
def test_suppression_of_a_batch_equals_torchvision_image_by_image(keep: int, together: bool):
    torch.manual_seed(0)
    boxes, scores = random_boxes(3, 80), torch.rand(3, 80, 4)
    scores[2] *= 0.1  # an image in which little is sure

    found = nms(boxes, scores, max_iou=0.5, min_score=0.09, candidates=320, keep=keep, together=together)

    for i in range(3):
        for ours, theirs in zip(found[i], reference(boxes[i], scores[i], 0.5, 0.09, keep), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("together", [False, True])
def test_many_classes_and_images_do_not_blur_the_boxes(together: bool):
    """The last of 64 x 500 groups is shifted by 20 million pixels, where float32 knows even numbers only."""
    pair = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [639, 0, 640, 1]])  # IoU of the first two: 0.818
    scores = torch.zeros(64, 3, 500)
    scores[-1, :, -1] = torch.tensor([0.9, 0.8, 0.7])
    boxes = pair.expand(64, 3, 4)

    for max_iou, expected in ((0.8, 2), (0.83, 3)):
        found = nms(boxes, scores, max_iou=max_iou, min_score=0.1, candidates=100, keep=10, together=together)
        assert len(found[-1][1]) == expected


@pytest.mark.parametrize("together", [False, True])
def test_other_classes_and_other_images_suppress_nothing(together: bool):
    same = torch.tensor([0.0, 0, 10, 10]).expand(2, 3, 4)
    half = torch.full((2, 3, 2), 0.5)
    found = nms(same, half, max_iou=0.5, min_score=0.1, candidates=100, keep=100, together=together)
    assert [sorted(labels.tolist()) for _, _, labels in found] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("together", [False, True])
def test_an_image_without_candidates_has_no_detections(together: bool):
    boxes, scores = random_boxes(2, 10), torch.zeros(2, 10, 3)
    scores[1, 4, 2] = 0.7
    settings = {"max_iou": 0.5, "min_score": 0.1, "candidates": 100, "keep": 100}
    nothing = nms(boxes, torch.zeros_like(scores), **settings, together=together)
    empty, one = nms(boxes, scores, **settings, together=together)
    assert [len(labels) for _, _, labels in nothing] == [0, 0]
    assert [len(x) for x in empty] == [0, 0, 0] and empty[0].shape == (0, 4)
    assert (one[0].tolist(), one[2].tolist()) == ([boxes[1, 4].tolist()], [2])


@pytest.mark.parametrize("max_iou", [0.1, 0.6, 1.0])
def test_suppression_inside_a_graph_keeps_what_eager_suppression_keeps(max_iou: float):
    generator = torch.Generator().manual_seed(3)
    low = 60 * torch.rand(2, 40, 2, generator=generator)
    boxes = torch.cat([low, low + 10 + 40 * torch.rand(2, 40, 2, generator=generator)], dim=-1)
    scores = torch.rand(2, 40, 3, generator=generator)
    scores[1] *= 0.02  # few pass the threshold there
    settings = {"max_iou": max_iou, "min_score": 0.015, "candidates": 60, "keep": 30}

    class InGraph(torch.nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return nms_in_graph(boxes, scores, **settings)

    found = torch.export.export(InGraph(), (boxes, scores), strict=False).module()(boxes, scores)
    assert [list(x.shape) for x in found] == [[2, 30, 4], [2, 30], [2, 30]]
    for of_image, (xyxy, score, label) in zip(zip(*found, strict=True), nms(boxes, scores, **settings), strict=True):
        count = len(score)
        for value, expected, empty in zip(of_image, (xyxy, score, label), (0, 0, -1), strict=True):
            torch.testing.assert_close(value[:count], expected)
            assert (value[count:] == empty).all()
