"""Which cells learn which box, on padded targets, with fixed shapes: task-aligned (TOOD) and FCOS assignment."""

from dataclasses import dataclass

import torch
from torch import Tensor

from visionmtl.ops.boxes import box_area, pairwise_iou, to_distances


@dataclass(frozen=True, slots=True)
class Assignment:
    """What every cell shall predict."""

    positive: Tensor  # bool [B, A]
    boxes: Tensor  # float [B, A, 4]; 0 where not positive
    labels: Tensor  # int64 [B, A]; anything where not positive
    quality: Tensor  # float [B, A] in 0..1, the score wanted; 0 where not positive
    ignored: Tensor  # bool [B, A]: inside a crowd region and not positive; teaches nothing


def _inside(centres: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """bool [B, M, A]: the cell's centre lies in the box, a box being at least one cell wide and high.

    Without that minimum a box thinner than a stride could lie between all centres, and no cell would learn it.
    """
    half = (boxes[..., 2:] - boxes[..., :2])[:, :, None] / 2  # [B, M, 1, 2]
    x, y = _from_middle(centres, boxes)
    return (x <= torch.maximum(half[..., 0], strides / 2)) & (y <= torch.maximum(half[..., 1], strides / 2))


def _from_middle(centres: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """How far each cell's centre lies from each box's middle, in x and in y: [B, M, A] each.

    Here and below axis by axis: a last axis of two or four would leave the processor's vectors nearly empty.
    """
    middle = (boxes[..., :2] + boxes[..., 2:])[:, :, None] / 2
    return (centres[:, 0] - middle[..., 0]).abs(), (centres[:, 1] - middle[..., 1]).abs()


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


def task_aligned(
    scores: Tensor,
    predicted: Tensor,
    centres: Tensor,
    strides: Tensor,
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

    scores: float [B, A, K] in 0..1; predicted: float [B, A, 4]; centres [A, 2]; strides [A]
    boxes: float [B, M, 4]; labels: int64 [B, M]; valid, crowd: bool [B, M] (a crowd is never assigned)
    A cell wanted by several boxes goes to the one it overlaps most. The quality of the best cell of a box is its
    largest IoU, the others in proportion to t (eq. 4 and the text below it).
    """
    teaches = valid & ~crowd
    inside = _inside(centres, strides, boxes)
    candidate = inside & teaches[..., None]
    iou = pairwise_iou(boxes, predicted)
    of_class = scores.gather(2, labels[:, None, :].expand(-1, scores.shape[1], -1)).transpose(1, 2)  # [B, M, A]
    aligned = torch.where(candidate, of_class.clamp(min=1e-8).pow(alpha) * iou.clamp(min=1e-4).pow(beta), 0.0)

    top, index = aligned.topk(min(topk, aligned.shape[2]), dim=2)
    chosen = torch.zeros_like(candidate).scatter_(2, index, top > 0)
    best_box = torch.where(chosen, iou + 1e-6, -1.0).argmax(dim=1, keepdim=True)  # [B, 1, A]
    chosen &= torch.arange(boxes.shape[1], device=boxes.device)[:, None] == best_box

    t = torch.where(chosen, aligned, 0.0)
    u = torch.where(chosen, iou, 0.0)
    quality = t / t.amax(dim=2, keepdim=True).clamp(min=1e-30) * u.amax(dim=2, keepdim=True)
    crowded = (inside & (valid & crowd)[..., None]).any(dim=1)
    positive, quality = (of_all.gather(1, best_box).squeeze(1) for of_all in (chosen, quality))
    return _collect(positive, best_box.squeeze(1), boxes, labels, quality, crowded)


def fcos(
    centres: Tensor,
    strides: Tensor,
    ranges: Tensor,
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    crowd: Tensor,
    *,
    radius: float,
) -> Assignment:
    """FCOS assignment (Tian et al. 2020, arXiv:2006.09214, sec. 3.1-3.2): size ranges a level, centre sampling.

    ranges: float [A, 2], the smallest and largest of max(l, t, r, b) in pixels that a cell's level handles
    radius: centre sampling radius in strides. A cell in several boxes goes to the smallest, ties to the first.
    The quality is the centre-ness (eq. 3).
    """
    teaches = valid & ~crowd
    sides = boxes[:, :, None]  # [B, M, 1, 4]
    left, top = centres[:, 0] - sides[..., 0], centres[:, 1] - sides[..., 1]  # [B, M, A]
    right, bottom = sides[..., 2] - centres[:, 0], sides[..., 3] - centres[:, 1]
    in_box = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom)) > 0
    x, y = _from_middle(centres, boxes)
    near = torch.maximum(x, y) < radius * strides
    largest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
    fits = (largest >= ranges[:, 0]) & (largest < ranges[:, 1])
    candidate = in_box & near & fits & teaches[..., None]

    area = torch.where(candidate, box_area(boxes)[..., None], torch.inf)
    smallest = area.argmin(dim=1)  # [B, A]
    positive = candidate.gather(1, smallest[:, None]).squeeze(1)

    distances = to_distances(_of_owner(boxes, smallest), centres)
    horizontal, vertical = distances[..., 0::2].clamp(min=1e-6), distances[..., 1::2].clamp(min=1e-6)
    centreness = (horizontal.amin(-1) / horizontal.amax(-1) * vertical.amin(-1) / vertical.amax(-1)).sqrt()
    crowded = (_inside(centres, strides, boxes) & (valid & crowd)[..., None]).any(dim=1)
    return _collect(positive, smallest, boxes, labels, centreness, crowded)
