"""Detection heads: the contract for each on disk, and their losses against the papers' formulas by hand."""

import math
from typing import Any

import pytest
import torch
from contract import CHANNELS, found, random_maps
from pydantic import ValidationError
from torch import Tensor, nn

from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.heads.base import Head, RawBoxes
from visionmtl.modeling.heads.fcos import FCOS
from visionmtl.ops import assignment as assign
from visionmtl.ops.boxes import anchor_points, generalised_iou, to_distances
from visionmtl.ops.ranks import step_totals

HEADS = [pytest.param(p.values[0](num_convs=1), id=p.id) for p in found(Head)]
HEADS += [pytest.param(Aligned(num_convs=0, bins=4), id="aligned with bins")]
every_head = pytest.mark.parametrize("head", HEADS)
BOX = [8.0, 8, 40, 40]


def targets(boxes: list[list[float]], images: int = 1) -> dict[str, Tensor]:
    """The same labels for each image, all of class 1, and the place of a box that is not there."""
    count = len(boxes) + 1
    return {
        "boxes": torch.tensor([*boxes, [0.0] * 4]).repeat(images, 1, 1),
        "labels": torch.ones(images, count, dtype=torch.int64),
        "valid": (torch.arange(count) < len(boxes)).repeat(images, 1),
        "crowd": torch.zeros(images, count, dtype=torch.bool),
        "labelled": torch.ones(images, dtype=torch.bool),
    }


def loss(head: Head, raw: RawBoxes, **known: Tensor) -> dict[str, Tensor]:
    """Of a step that is this batch alone, of images as large as the maps tell."""
    level, height, width = raw["shapes"][0]
    labels = {name: value for name, value in known.items() if name != "labelled"}
    counts = {"boxes": head.count(**labels, size=(height << level, width << level))}
    return head.loss(raw, **known, totals=step_totals([counts])["boxes"])


def built(head: Head) -> nn.Module:
    torch.manual_seed(0)
    return head.build(CHANNELS, 3)


def run(head: Head, images: int = 2) -> RawBoxes:
    return built(head)(random_maps(head.levels, images))


def blank_raw(head: Head, logit: float = -3.0, num_distances: int = 4) -> RawBoxes:
    """Level 3 of a 64 x 64 image, the same in each cell."""
    return {
        "logits": torch.full((1, 64, 3), logit, requires_grad=True),
        "distances": torch.zeros(1, 64, num_distances, requires_grad=True),
        "quality": torch.zeros(1, 64, requires_grad=True) if isinstance(head, FCOS) else None,
        "shapes": [(3, 8, 8)],
    }


@every_head
def test_a_head_answers_for_every_cell_of_every_level(head: Head):
    raw = run(head)
    boxes, scores = head.decode(raw)
    num_cells = sum(h * w for _, h, w in raw["shapes"])
    assert [level for level, _, _ in raw["shapes"]] == list(head.levels)
    assert (boxes.shape, scores.shape) == ((2, num_cells, 4), (2, num_cells, 3))
    assert (boxes.dtype, scores.dtype) == (torch.float32, torch.float32)
    assert (boxes[..., 2:] >= boxes[..., :2]).all() and (scores > 0).all() and (scores < 1).all()


@every_head
def test_a_fresh_head_calls_nearly_everything_background(head: Head):
    assert run(head)["logits"].sigmoid().mean().item() == pytest.approx(0.01, rel=0.1)


@every_head
def test_images_without_boxes_teach_background_and_nothing_about_boxes(head: Head):
    raw = run(head)
    parts = loss(head, raw, **targets([], images=2))
    sum(parts.values()).backward()  # type: ignore[union-attr]
    assert parts.pop("class") > 0 and all(part == 0 for part in parts.values())


@every_head
def test_crowds_and_padded_boxes_only_take_away_negatives(head: Head):
    raw = run(head)
    known = targets([BOX, [0.0, 30, 96, 64]], images=2)
    known["crowd"][:, 1] = True
    without = loss(head, raw, **targets([BOX], images=2))
    crowded = loss(head, raw, **known)
    assert crowded["class"] < without["class"] and torch.equal(crowded["box"], without["box"])

    known["valid"][:, 1] = False
    torch.testing.assert_close(loss(head, raw, **known), without)


@every_head
def test_the_loss_is_finite_for_the_largest_outputs_and_so_is_its_gradient(head: Head):
    raw = run(head)
    raw["distances"] = raw["distances"] * 1e6
    raw["logits"] = raw["logits"] * 1e3
    for leaf in (leaves := [raw["distances"], raw["logits"]]):
        leaf.retain_grad()
    sum(loss(head, raw, **targets([BOX], images=2)).values()).backward()  # type: ignore[union-attr]
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@every_head
def test_it_overfits_one_box(head: Head):
    torch.manual_seed(0)
    module, maps = head.build(CHANNELS, 3), random_maps((3, 4, 5, 6, 7), 1)
    # slow and long enough that rounding does not decide: 0.93 and more from each of four seeds
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        sum(loss(head, module(maps), **targets([BOX])).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    boxes, scores = head.decode(module(maps))
    best = scores.flatten().argmax()
    assert best % 3 == 1
    assert generalised_iou(boxes[0, best // 3], torch.tensor(BOX)) > 0.8


def test_quality_focal_loss_is_that_of_the_paper():
    head = Aligned(levels=(3,))
    raw = blank_raw(head, logit=-1.0)
    known = targets([BOX])
    boxes, scores = head.decode(raw)
    labels = {k: v for k, v in known.items() if k != "labelled"}
    target = assign.task_aligned(scores, boxes, raw["shapes"], **labels, topk=13, alpha=1.0, beta=6.0)

    share = 1 / (1 + math.exp(1.0))
    total = 0.0
    for positive, quality in zip(target.positive[0].tolist(), target.quality[0].tolist(), strict=True):
        for label in range(3):
            y = quality if positive and label == 1 else 0.0
            total += -(abs(y - share) ** 2) * ((1 - y) * math.log(1 - share) + y * math.log(share))
    wanted = total / max(target.quality.sum().item(), 1)
    assert loss(head, raw, **known)["class"].item() == pytest.approx(wanted, rel=1e-5)


def test_one_poor_box_does_not_blow_up_the_negatives():
    head = Aligned(levels=(3,))
    poor = blank_raw(head)
    poor["distances"] = torch.full((1, 64, 4), -8.0)  # boxes of a hundredth of a pixel: IoU and quality near 0
    empty, one = (loss(head, poor, **targets(boxes))["class"].item() for boxes in ([], [BOX]))
    assert one == pytest.approx(empty, rel=0.01)


def test_distribution_focal_loss_shares_a_distance_between_two_bins():
    """Distances 1.25 strides each way: 0.75 of bin 1 and 0.25 of bin 2 (arXiv:2006.04388, eq. 6)."""
    head = Aligned(levels=(3,), bins=4, topk=1)
    raw = blank_raw(head, num_distances=20)
    torch.manual_seed(0)
    logs = torch.randn(5)
    raw["distances"] = logs.repeat(1, 64, 4)
    known = targets([[20.0 - 10, 20 - 10, 20 + 10, 20 + 10]])  # round the cell at 20, 20; the others lie less well
    raw["logits"] = raw["logits"].detach().clone()
    raw["logits"][0, 2 * 8 + 2, 1] = 3.0

    quality = float(generalised_iou(head.decode(raw)[0][0, 18], known["boxes"][0, 0]).clamp(min=0))
    log_shares = logs.log_softmax(0)
    wanted = 0.25 * -(0.75 * log_shares[1] + 0.25 * log_shares[2]) * quality / max(quality, 1)
    assert loss(head, raw, **known)["bins"].item() == pytest.approx(float(wanted), rel=1e-4)


def test_fcos_weighs_boxes_by_centreness_and_learns_it():
    head = FCOS(levels=(3,), radius=0.6)  # the cell at 20, 20 alone
    raw, known = blank_raw(head), targets([[14.0, 12, 30, 28]])
    raw["quality"] = torch.full((1, 64), 2.0)
    centreness = math.sqrt(6 / 10)

    parts = loss(head, raw, **known)

    box = torch.tensor([12.0, 12, 28, 28])  # relu(0 + 1) strides each way
    assert parts["box"].item() == pytest.approx(1 - generalised_iou(box, known["boxes"][0, 0]).item(), rel=1e-5)
    sure = 1 / (1 + math.exp(-2))
    entropy = -centreness * math.log(sure) - (1 - centreness) * math.log(1 - sure)
    assert parts["centreness"].item() == pytest.approx(entropy, rel=1e-5)
    p = 1 / (1 + math.exp(3))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p) + 191 * 0.75 * p**2 * -math.log(1 - p)
    assert parts["class"].item() == pytest.approx(focal, rel=1e-4)


@pytest.mark.parametrize("head", [Aligned(levels=(3,)), FCOS(levels=(3,))], ids=["aligned", "fcos"])
def test_a_perfect_box_costs_nothing(head: Any):
    raw, known = blank_raw(head), targets([BOX])
    centres, strides = anchor_points(raw["shapes"], raw["logits"])
    steps = to_distances(known["boxes"][:, :1], centres).clamp(min=1) / strides[:, None]
    raw["distances"] = steps - 1 if isinstance(head, FCOS) else steps.log() - 1.4
    assert loss(head, raw, **known)["box"].item() == pytest.approx(0, abs=1e-5)
    inside = (steps * strides[:, None] > 1).all(dim=-1)
    assert inside.sum() == 16
    torch.testing.assert_close(head.decode(raw)[0][inside], torch.tensor(BOX).expand(16, 4))


def test_fcos_leaves_no_size_out_where_levels_have_a_gap():
    assert FCOS(levels=(3, 5))._ranges() == [(0, 128), (128, math.inf)]
    assert FCOS()._ranges() == [(0, 64), (64, 128), (128, 256), (256, 512), (512, math.inf)]


def test_levels_of_a_head_begin_with_the_finest():
    with pytest.raises(ValidationError, match=r"the finest comes first; write \(3, 4, 5\)"):
        FCOS(levels=(5, 4, 3))
