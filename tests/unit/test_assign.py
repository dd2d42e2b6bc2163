"""Assignment of boxes to cells: against plain loops in float64, and cases checkable by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from visionmtl.ops.assignment import Assignment, fcos, task_aligned
from visionmtl.ops.boxes import anchor_points

SHAPES = [(3, 8, 8), (4, 4, 4), (5, 2, 2)]
CENTRES, STRIDES = anchor_points(SHAPES, torch.zeros(()))
RANGES = [(0.0, 24.0), (24.0, 48.0), (48.0, math.inf)]
NUM_CLASSES = 3


def labels_of(boxes: list[list[float]], pad: int = 2) -> dict[str, Tensor]:
    """One image; behind its boxes lie invalid ones full of rubbish."""
    rubbish = [[math.nan] * 4, [-math.inf, 0, math.inf, 64]][:pad]
    return {
        "boxes": torch.tensor(boxes + rubbish)[None],
        "labels": torch.tensor([i % NUM_CLASSES for i in range(len(boxes))] + [0] * pad)[None],
        "valid": torch.tensor([True] * len(boxes) + [False] * pad)[None],
        "crowd": torch.zeros(1, len(boxes) + pad, dtype=torch.bool),
    }


def random_labels(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    middle, half = torch.rand(6, 2, generator=generator) * 64, torch.rand(6, 2, generator=generator) * 30 + 1
    return labels_of(torch.cat([middle - half, middle + half], dim=1).tolist())


def by_fcos(known: dict[str, Tensor]) -> Assignment:
    return fcos(SHAPES, RANGES, **known, radius=1.5)


def by_alignment(known: dict[str, Tensor], seed: int = 0) -> Assignment:
    scores, predicted = guesses(seed)
    return task_aligned(scores, predicted, SHAPES, **known, topk=4, alpha=1.0, beta=6.0)


def guesses(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    scores = torch.rand(1, len(CENTRES), NUM_CLASSES, generator=generator)
    reach = torch.rand(1, len(CENTRES), 4, generator=generator) * 3 * STRIDES[:, None] + 1
    return scores, torch.cat([CENTRES - reach[..., :2], CENTRES + reach[..., 2:]], dim=-1)


def plain_fcos(known: dict[str, Tensor]) -> list[tuple[int, float] | None]:
    """By cell: (box, centre-ness)."""
    boxes, found = known["boxes"][0].double().tolist(), []
    ranges = [RANGES[int(math.log2(stride)) - 3] for stride in STRIDES.tolist()]
    for (x, y), stride, (low, high) in zip(CENTRES.tolist(), STRIDES.tolist(), ranges, strict=True):
        best: tuple[float, int, float] | None = None
        for i, (x1, y1, x2, y2) in enumerate(boxes):
            if not known["valid"][0, i] or known["crowd"][0, i]:
                continue
            left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
            near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < 1.5 * stride
            if min(left, top, right, bottom) <= 0 or not near or not low <= max(left, top, right, bottom) < high:
                continue
            quality = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
            area = (x2 - x1) * (y2 - y1)
            if best is None or area < best[0]:
                best = area, i, quality
        found.append(best and best[1:])
    return found


def overlap(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def plain_alignment(known: dict[str, Tensor], scores: Tensor, predicted: Tensor, topk: int) -> list[Any]:
    """By cell: (box, quality)."""
    boxes, guessed = known["boxes"][0].double().tolist(), predicted[0].double().tolist()
    wanted: dict[int, list[tuple[float, int, float]]] = {}  # by cell: (IoU, box, t)
    for i, box in enumerate(boxes):
        if not known["valid"][0, i] or known["crowd"][0, i]:
            continue
        inside = [
            a
            for a, ((x, y), stride) in enumerate(zip(CENTRES.tolist(), STRIDES.tolist(), strict=True))
            if abs(x - (box[0] + box[2]) / 2) <= max((box[2] - box[0]) / 2, stride / 2)
            and abs(y - (box[1] + box[3]) / 2) <= max((box[3] - box[1]) / 2, stride / 2)
        ]
        ious = {a: overlap(box, guessed[a]) for a in inside}
        label = int(known["labels"][0, i])
        t = {a: float(scores[0, a, label]) * max(ious[a], 1e-4) ** 6 for a in inside}
        for a in sorted(inside, key=lambda a: -t[a])[:topk]:
            wanted.setdefault(a, []).append((ious[a], i, t[a]))

    owner = {a: max(offers) for a, offers in wanted.items()}
    found: list[Any] = [None] * len(guessed)
    for a, (_, i, t) in owner.items():
        mine = [(iou, other) for iou, box, other in owner.values() if box == i]
        found[a] = i, t / max(other for _, other in mine) * max(iou for iou, _ in mine)
    return found


def check(target: Assignment, known: dict[str, Tensor], expected: list[Any]) -> None:
    assert target.positive[0].tolist() == [one is not None for one in expected]
    assert any(expected), "the case must assign something"
    for a, one in enumerate(expected):
        if one is None:
            assert target.quality[0, a] == 0 and not target.boxes[0, a].any()
            continue
        assert target.boxes[0, a].tolist() == known["boxes"][0, one[0]].tolist()
        assert target.labels[0, a] == known["labels"][0, one[0]]
        assert target.quality[0, a].item() == pytest.approx(one[1], rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_fcos_assignment_equals_plain_loops(seed: int):
    known = random_labels(seed)
    check(by_fcos(known), known, plain_fcos(known))


@pytest.mark.parametrize("seed", range(5))
def test_task_aligned_assignment_equals_plain_loops(seed: int):
    known = random_labels(seed)
    check(by_alignment(known, seed), known, plain_alignment(known, *guesses(seed), topk=4))


def test_of_two_boxes_of_nearly_one_area_fcos_takes_the_smaller():
    """Areas 104 and 103: torchvision compares 1e8 - area in float32, where both are equal, and takes the first."""
    known = labels_of([[15.0, 15, 28, 23], [15, 15, 25.3, 25]])
    target = by_fcos(known)
    shared = int((torch.tensor([20.0, 20]) == CENTRES).all(dim=1).nonzero()[0])
    assert target.positive[0, shared] and target.labels[0, shared] == 1
    check(target, known, plain_fcos(known))


def test_a_box_between_all_cell_centres_still_gets_cells():
    thin = labels_of([[13.0, 2, 14, 60]])  # the columns of level 3 lie at 4, 12, 20
    assert by_alignment(thin).positive.sum() == 4
    assert not by_fcos(thin).positive.any(), "FCOS is kept as published"


@pytest.mark.parametrize("assign", [by_fcos, by_alignment])
def test_a_crowd_is_ignored_and_never_assigned(assign: Any):
    known = labels_of([[0.0, 0, 40, 40], [30, 30, 62, 62]])
    known["crowd"][0, 1] = True

    target = assign(known)

    covered = ((CENTRES >= 30) & (CENTRES <= 62)).all(dim=1)
    assert not (target.labels[0][target.positive[0]] == 1).any()
    assert (target.ignored[0] >= (covered & ~target.positive[0])).all() and target.ignored.sum() < len(CENTRES)
    assert not (target.ignored & target.positive).any()


@pytest.mark.parametrize("assign", [by_fcos, by_alignment])
def test_padding_is_inert_even_when_it_holds_rubbish(assign: Any):
    boxes = [[3.0, 5, 29, 31], [20, 8, 60, 50]]
    for ours, theirs in zip(
        fields(assign(labels_of(boxes, pad=2))), fields(assign(labels_of(boxes, pad=0))), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("assign", [by_fcos, by_alignment])
def test_an_image_without_boxes_is_background_everywhere(assign: Any):
    target = assign(labels_of([]))
    assert not target.positive.any() and not target.ignored.any() and not target.quality.any()


def test_a_cell_that_two_boxes_overlap_alike_goes_to_the_first():
    known = labels_of([[0.0, 0, 40, 40], [0, 0, 40, 40], [8, 8, 50, 50]])
    target = by_alignment(known)
    assert not (target.labels[0][target.positive[0]] == 1).any()
    assert (target.labels[0][target.positive[0]] == 0).any()


def test_maps_need_not_be_square():
    shapes = [(3, 4, 12), (4, 2, 6)]
    centres, strides = anchor_points(shapes, torch.zeros(()))
    box = [34.0, 3, 90, 29]
    generator = torch.Generator().manual_seed(0)
    reach = torch.rand(1, len(centres), 4, generator=generator) * 3 * strides[:, None]
    predicted = torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], dim=-1)
    within = ((centres >= torch.tensor(box[:2])) & (centres <= torch.tensor(box[2:]))).all(dim=1)

    known = labels_of([box])
    every = task_aligned(torch.ones(1, len(centres), 3), predicted, shapes, **known, topk=100, alpha=1.0, beta=0.0)
    assert torch.equal(every.positive[0], within)
    wide = fcos(shapes, [(0.0, math.inf), (0.0, math.inf)], **known, radius=100.0)
    assert torch.equal(wide.positive[0], within)

    known["crowd"][:] = True
    crowd = fcos(shapes, [(0.0, math.inf), (0.0, math.inf)], **known, radius=100.0)
    assert torch.equal(crowd.ignored[0], within)


class Pairs(TorchDispatchMode):
    """Counts the tensors of numbers that are made anew for all pairs of a box and a cell: what time goes with."""

    def __init__(self, num_pairs: int) -> None:
        super().__init__()
        self.num_pairs, self.made = num_pairs, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        anew = not any(result.alias_info for result in func._schema.returns)  # neither a view nor in place
        for one in out if isinstance(out, tuple) else (out,):
            self.made += anew and isinstance(one, Tensor) and one.dtype != torch.bool and one.numel() == self.num_pairs
        return out


@pytest.mark.parametrize(("assign", "most"), [(by_fcos, 1), (by_alignment, 8)])
def test_few_values_are_computed_for_every_pair_of_a_box_and_a_cell(assign: Any, most: int):
    known = labels_of([[3.0, 5, 29, 31]] * 30)
    with Pairs(32 * len(CENTRES)) as pairs:
        assign(known)
    assert 0 < pairs.made <= most


def fields(target: Assignment) -> list[Tensor]:
    return [target.positive, target.boxes, target.labels, target.quality, target.ignored]
