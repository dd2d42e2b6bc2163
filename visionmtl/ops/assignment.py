"""Which cells learn which box, on padded targets, with fixed shapes: task-aligned (TOOD) and FCOS assignment.

Values for every pair of a box and a cell, [B, M, A], are what costs time here. So whether a cell lies in a box is
decided for columns and rows apart, and what comes after a choice is computed for the chosen pairs alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visionmtl.ops.boxes import anchor_points, box_area, pairwise_iou, to_distances

Shapes = Sequence[tuple[int, int, int]]
"""(level, h, w) of the maps whose cells, row by row, are the A cells."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What every cell shall predict."""

    positive: Tensor  # bool [B, A]
    boxes: Tensor  # float [B, A, 4]; 0 where not positive
    labels: Tensor  # int64 [B, A]; anything where not positive
    quality: Tensor  # float [B, A] in 0..1, the score wanted; 0 where not positive
    ignored: Tensor  # bool [B, A]: inside a crowd region and not positive; teaches nothing


def task_aligned(
    scores: Tensor,
    predicted: Tensor,
    shapes: Shapes,
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    crowd: Tensor,
    *,
    topk: int,
    alpha: float,
    beta: float,
) -> Assignment:
    """Task-aligned assignment (Feng et al. 2021, arXiv:2108.07755, sec. 3.3): top cells by t = s^alpha * u^beta.

    scores: float [B, A, K] in 0..1; predicted: float [B, A, 4]; neither needs a gradient: call it under `no_grad`
    boxes: float [B, M, 4]; labels: int64 [B, M]; valid, crowd: bool [B, M] (a crowd is never assigned)
    A cell wanted by several boxes goes to the one it overlaps most, ties to the first. The quality of the best cell of
    a box is its largest IoU, the others in proportion to t (eq. 4 and the text below it).
    """
    num_boxes, num_cells = boxes.shape[1], scores.shape[1]
    columns, rows = _inside(shapes, boxes)
    candidate = _both(shapes, columns & (valid & ~crowd)[..., None], rows)
    iou = pairwise_iou(boxes, predicted)  # [B, M, A]
    of_class = scores.transpose(1, 2).contiguous().gather(1, labels[..., None].expand(-1, -1, num_cells))
    aligned = of_class.clamp_(min=1e-8).pow_(alpha).mul_(iou.clamp(min=1e-4).pow_(beta))
    t, index = aligned.masked_fill_(~candidate, 0.0).topk(min(topk, num_cells), dim=2)  # [B, M, k]
    u = iou.gather(2, index)

    # of the boxes that want a cell the one of the largest IoU, then of the smallest number: [B, A], read at [B, M * k]
    wants, wanted = (t > 0).flatten(1), index.flatten(1)
    overlap = torch.where(wants, u.flatten(1), -1.0)
    largest = overlap.new_full((len(boxes), num_cells), -1.0).scatter_reduce(1, wanted, overlap, "amax")
    number = torch.arange(num_boxes, device=boxes.device).repeat_interleave(index.shape[2])
    offer = torch.where(wants & (overlap == largest.gather(1, wanted)), number, num_boxes)
    owner = wanted.new_full((len(boxes), num_cells), num_boxes).scatter_reduce(1, wanted, offer, "amin")

    gets = (owner.gather(1, wanted) == number).view_as(index)
    t, u = torch.where(gets, t, 0.0), torch.where(gets, u, 0.0)
    of_pair = t / t.amax(dim=2, keepdim=True).clamp(min=1e-30) * u.amax(dim=2, keepdim=True)
    quality = of_pair.new_zeros(len(boxes), num_cells).scatter_reduce(1, wanted, of_pair.flatten(1), "amax")
    crowded = _anywhere(shapes, columns, rows, valid & crowd)
    positive = owner < num_boxes
    return _collect(positive, torch.where(positive, owner, 0), boxes, labels, quality, crowded)


def fcos(
    shapes: Shapes,
    ranges: Sequence[tuple[float, float]],
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    crowd: Tensor,
    *,
    radius: float,
) -> Assignment:
    """FCOS assignment (Tian et al. 2020, arXiv:2006.09214, sec. 3.1-3.2): size ranges a level, centre sampling.

    ranges: the smallest and largest of max(l, t, r, b) in pixels that each level handles
    radius: centre sampling radius in strides. A cell in several boxes goes to the smallest, ties to the first.
    The quality is the centre-ness (eq. 3).
    """
    near, far = [], []  # bool [B, M, L] by axis: what must hold for both; reach enough for the level, for either
    for axis in (0, 1):
        places, strides = _lines(shapes, axis, boxes)
        counts = [shape[2 - axis] for shape in shapes]
        low, high = (
            torch.cat([strides.new_full((n,), r[i]) for n, r in zip(counts, ranges, strict=True)]) for i in (0, 1)
        )
        first, last = boxes[..., axis, None], boxes[..., axis + 2, None]
        before, behind = places - first, last - places
        reach = torch.maximum(before, behind)
        central = (places - (first + last) / 2).abs() < radius * strides
        near.append((torch.minimum(before, behind) > 0) & central & (reach < high) & (valid & ~crowd)[..., None])
        far.append(near[-1] & (reach >= low))
    candidate = _both(shapes, far[0], near[1]) | _both(shapes, near[0], far[1])  # [B, M, A]

    smallest = torch.where(candidate, box_area(boxes)[..., None], torch.inf).argmin(dim=1)  # [B, A]
    positive = candidate.gather(1, smallest[:, None]).squeeze(1)
    distances = to_distances(_of_owner(boxes, smallest), anchor_points(shapes, boxes)[0])
    horizontal, vertical = distances[..., 0::2].clamp(min=1e-6), distances[..., 1::2].clamp(min=1e-6)
    centreness = (horizontal.amin(-1) / horizontal.amax(-1) * vertical.amin(-1) / vertical.amax(-1)).sqrt()
    columns, rows = _inside(shapes, boxes)
    crowded = _anywhere(shapes, columns, rows, valid & crowd)
    return _collect(positive, smallest, boxes, labels, centreness, crowded)


def _lines(shapes: Shapes, axis: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and strides of the columns (axis 0) or rows (1) of all levels, level by level: float [L] pixels."""
    counts = [(2**level, (width, height)[axis]) for level, height, width in shapes]
    places = [torch.arange(s / 2, s * n, s, device=like.device, dtype=torch.float32) for s, n in counts]
    strides = [torch.full((n,), float(s), device=like.device) for s, n in counts]
    return torch.cat(places), torch.cat(strides)


def _inside(shapes: Shapes, boxes: Tensor) -> list[Tensor]:
    """bool [B, M, L]: which columns, and which rows, have their centres in a box, it being at least one cell wide.

    Without that minimum a box thinner than a stride could lie between all centres, and no cell would learn it.
    """
    found = []
    for axis in (0, 1):
        places, strides = _lines(shapes, axis, boxes)
        first, last = boxes[..., axis, None], boxes[..., axis + 2, None]
        found.append((places - (first + last) / 2).abs() <= torch.maximum((last - first) / 2, strides / 2))
    return found


def _by_level(shapes: Shapes, columns: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """[B, M, w] and [B, M, h] of each level."""
    return zip(columns.split([w for _, _, w in shapes], 2), rows.split([h for _, h, _ in shapes], 2), strict=True)


def _both(shapes: Shapes, columns: Tensor, rows: Tensor) -> Tensor:
    """bool [B, M, A]: the cells for whose column and row it holds."""
    return torch.cat([(r[..., None] & c[:, :, None]).flatten(2) for c, r in _by_level(shapes, columns, rows)], dim=2)


def _anywhere(shapes: Shapes, columns: Tensor, rows: Tensor, boxes: Tensor) -> Tensor:
    """bool [B, A]: the cells for whose column and row it holds in one of some boxes, bool [B, M]; a product counts."""
    pairs = _by_level(shapes, columns.float(), (rows & boxes[..., None]).float())
    return torch.cat([(r.transpose(1, 2) @ c).flatten(1) for c, r in pairs], dim=1) > 0


def _collect(
    positive: Tensor, owner: Tensor, boxes: Tensor, labels: Tensor, quality: Tensor, crowded: Tensor
) -> Assignment:
    """positive, crowded: bool [B, A]; owner: int64 [B, A], anything where not positive; quality: float [B, A]."""
    return Assignment(
        positive=positive,
        # replaced, not masked later: an unlabelled image's NaN would poison the gradient
        boxes=torch.where(positive[..., None], _of_owner(boxes, owner), 0.0),
        labels=labels.gather(1, owner),
        quality=torch.where(positive, quality, 0.0),
        ignored=crowded & ~positive,
    )


def _of_owner(boxes: Tensor, owner: Tensor) -> Tensor:
    """[B, M, 4] and int64 [B, A] -> [B, A, 4]."""
    return boxes.gather(1, owner[..., None].expand(-1, -1, 4))
