"""Box geometry: cells, distances, overlaps, suppression on padded tensors; boxes are xyxy pixels, x2 y2 exclusive."""

from collections.abc import Sequence

import torch
from torch import Tensor


def anchor_points(shapes: Sequence[tuple[int, int, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Centres [A, 2] (x, y pixels) and strides [A] of all cells of levels given as (level, h, w)."""
    centres, strides = [], []
    for level, height, width in shapes:
        stride = 2**level
        y = (torch.arange(height, device=like.device, dtype=torch.float32) + 0.5) * stride
        x = (torch.arange(width, device=like.device, dtype=torch.float32) + 0.5) * stride
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centres.append(torch.stack([grid_x, grid_y], dim=-1).flatten(0, 1))
        strides.append(torch.full((height * width,), float(stride), device=like.device))
    return torch.cat(centres), torch.cat(strides)


def from_distances(distances: Tensor, centres: Tensor) -> Tensor:
    """Distances left, top, right, bottom in pixels [..., A, 4] around centres [A, 2] -> xyxy [..., A, 4]."""
    return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)


def to_distances(boxes: Tensor, centres: Tensor) -> Tensor:
    """xyxy [..., A, 4] -> distances left, top, right, bottom [..., A, 4]; negative where the centre lies outside."""
    return torch.cat([centres - boxes[..., :2], boxes[..., 2:] - centres], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """[..., 4] -> [...], 0 for boxes of negative size."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair: [B, M, 4], [B, A, 4] -> [B, M, A]; 0 where the union is empty."""
    # axis by axis, each contiguous, or the processor's vectors stay nearly empty; in place: fresh memory costs more
    # than the arithmetic
    one, other = a.unsqueeze(2).unbind(-1), b.transpose(1, 2).contiguous().unsqueeze(2).unbind(1)
    sides = []
    for i in (0, 1):
        end = torch.minimum(one[i + 2], other[i + 2])
        sides.append(end.sub_(torch.maximum(one[i], other[i])).clamp_(min=0))
    overlap = sides[0].mul_(sides[1])
    union = (box_area(a)[:, :, None] + box_area(b)[:, None, :]).sub_(overlap).clamp_(min=1e-6)
    return overlap.div_(union)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of pairs of boxes (Rezatofighi et al. 2019, arXiv:1902.09630, alg. 1): [..., 4] x 2 -> [...] in -1..1."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(dim=-1)
    union = (box_area(a) + box_area(b) - overlap).clamp(min=1e-6)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(dim=-1)
    hull = hull.clamp(min=1e-6)
    return overlap / union - (hull - union) / hull


def nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    max_iou: float,
    min_score: float,
    candidates: int,
    keep: int,
    together: bool | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per-class non-maximum suppression of a fixed number of candidates an image.

    boxes: float [B, A, 4]; scores: float [B, A, K]. Every (cell, class) pair is a candidate of its own, as COCO wants.
    together: all images in one go; None: on a GPU. A CPU compares every pair, and would compare B times as many.
    Returns for each image (boxes [D, 4], scores [D], labels [D]), best first, D <= keep.
    """
    batch, num_cells, num_classes = scores.shape
    candidates = min(candidates, num_cells * num_classes)
    top, index = scores.flatten(1).topk(candidates, dim=1)  # [B, k]
    labels = index % num_classes
    top_boxes = boxes.gather(1, (index // num_classes)[..., None].expand(-1, -1, 4))

    good = top > min_score
    if boxes.device.type != "cpu" if together is None else together:
        group = torch.arange(batch, device=boxes.device)[:, None] * num_classes + labels
        flat = top_boxes.flatten(0, 1), top.flatten(), group.flatten(), good.flatten()
        survives = _survivors(*flat, max_iou).view(batch, -1)
    else:
        each = zip(top_boxes, top, labels, good, strict=True)
        survives = torch.stack([_survivors(*of_image, max_iou) for of_image in each])

    return [
        (top_boxes[i][survives[i]][:keep], top[i][survives[i]][:keep], labels[i][survives[i]][:keep])
        for i in range(batch)
    ]


def _survivors(boxes: Tensor, scores: Tensor, group: Tensor, good: Tensor, max_iou: float) -> Tensor:
    """Bool [N]: the good ones that no better one of their group overlaps.

    boxes: float [N, 4]; scores: float [N]; group: int64 [N]; good: bool [N]
    """
    places = good.nonzero().squeeze(1)
    if not len(places):
        return good
    # double: every group is shifted to a place of its own, past what float32 can hold to a pixel where they are many
    exact = boxes[places].double()
    extent = exact.amax() - exact.amin() + 1
    shifted = exact - exact.amin() + (group[places] * extent)[:, None]
    from torchvision.ops import nms  # seconds to import, and training alone does not need it

    kept = nms(shifted, scores[places].double(), max_iou)
    return torch.zeros_like(good).index_fill_(0, places[kept], True)
