"""Box geometry: cells, distances, overlaps, suppression on padded tensors; boxes are xyxy pixels, x2 y2 exclusive."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

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
    # not `prod(dim=-1)`: on a GPU its backward asks the host whether a factor is zero
    width, height = (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).unbind(-1)
    )
    overlap = width * height
    union = (box_area(a) + box_area(b) - overlap).clamp(min=1e-6)
    width, height = (
        (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).unbind(-1)
    )
    hull = (width * height).clamp(min=1e-6)
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
    together: all images in one go; None: on a GPU. A CPU is faster one by one.
    Returns for each image (boxes [D, 4], scores [D], labels [D]) on the CPU, best first, D <= keep.
    """
    _, num_cells, num_classes = scores.shape
    candidates = min(candidates, num_cells * num_classes)
    top, index = scores.flatten(1).topk(candidates, dim=1)  # [B, k]
    labels = index % num_classes
    top_boxes = boxes.gather(1, (index // num_classes)[..., None].expand(-1, -1, 4))

    good = top > min_score
    if boxes.device.type != "cpu" if together is None else together:
        survives = _survivors_of_batch(top_boxes, labels, good, max_iou)
    else:
        each = zip(top_boxes, top, labels, good, strict=True)
        survives = torch.stack([_survivors(*of_image, max_iou) for of_image in each])

    best = (~survives).byte().argsort(dim=1, stable=True)[:, :keep]  # survivors first, in their order
    counts = survives.sum(dim=1).clamp(max=keep).tolist()
    kept = (
        top_boxes.gather(1, best[..., None].expand(-1, -1, 4)).cpu(),
        top.gather(1, best).cpu(),
        labels.gather(1, best).cpu(),
    )
    return [(b[:n], s[:n], k[:n]) for b, s, k, n in zip(*kept, counts, strict=True)]


def _survivors_of_batch(boxes: Tensor, labels: Tensor, good: Tensor, max_iou: float) -> Tensor:
    """Bool [B, N]: the good ones that no surviving better one of their class overlaps.

    boxes: float [B, N, 4], best first; labels: int64 [B, N]; good: bool [B, N]
    Starts with all good ones and takes away those that a survivor overlaps until nothing changes (Zheng et al. 2020,
    arXiv:2005.03572, cluster NMS). After n rounds the best n are right, and mostly a handful settles all: on one H200
    32 images of 1000 candidates took 43 ms one after the other.
    """
    overlaps = _overlaps(boxes, labels, good, max_iou)
    survives, before = good, None
    while before is None or not torch.equal(survives, before):
        before = survives
        survives = good & ~(overlaps & survives[:, :, None]).any(dim=1)
    return survives


def _overlaps(boxes: Tensor, labels: Tensor, good: Tensor, max_iou: float) -> Tensor:
    """Bool [B, N, N]: whether the good box of a row takes away that of a column, which comes behind it."""
    overlaps = (pairwise_iou(boxes, boxes) > max_iou) & (labels[:, :, None] == labels[:, None])
    return (overlaps & good[:, :, None]).triu(1)


def nms_in_graph(
    boxes: Tensor, scores: Tensor, *, max_iou: float, min_score: float, candidates: int, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`nms` with fixed shapes, for torch.export: boxes [B, D, 4], scores [B, D], labels int64 [B, D], best first.

    D = keep, or fewer where there are fewer candidates; empty places behind the boxes hold 0, 0 and -1.
    """
    _, num_cells, num_classes = scores.shape
    candidates = min(candidates, num_cells * num_classes)
    top, index = scores.flatten(1).topk(candidates, dim=1)
    labels = index % num_classes
    top_boxes = boxes.gather(1, (index // num_classes)[..., None].expand(-1, -1, 4))
    if _as_operator.get():
        of_class = labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None]
        survives = nms_mask(top_boxes, torch.where(of_class, top[:, None], 0.0), max_iou, min_score)
    else:
        survives = _survivors_by_loop(top_boxes, labels, top > min_score, max_iou)
    best, places = torch.where(survives, top, 0.0).topk(min(keep, candidates), dim=1)
    found = best > 0
    return (
        top_boxes.gather(1, places[..., None].expand(-1, -1, 4)) * found[..., None],
        best,
        torch.where(found, labels.gather(1, places), -1),
    )


def _survivors_by_loop(boxes: Tensor, labels: Tensor, good: Tensor, max_iou: float) -> Tensor:
    """As `_survivors_of_batch`, its rounds a loop inside the graph, so that as many are run as the boxes need."""
    from torch._higher_order_ops import while_loop  # for exports alone

    overlaps = _overlaps(boxes, labels, good, max_iou).float()

    def goes_on(survives: Tensor, changed: Tensor) -> Tensor:
        return changed.clone()

    def next_round(survives: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        remains = good & (survives.float()[:, None] @ overlaps)[:, 0].eq(0)
        return remains, (remains != survives).any()

    started = torch.ones((), dtype=torch.bool, device=boxes.device)
    survives: Tensor = while_loop(goes_on, next_round, (good.clone(), started))[0]
    return survives


_as_operator: ContextVar[bool] = ContextVar("suppression as an operator", default=False)


@contextmanager
def suppression_as_operator() -> Iterator[None]:
    """Graphs that are traced inside hold `nms_mask`, for formats with an operator of their own for it."""
    token = _as_operator.set(True)
    try:
        yield
    finally:
        _as_operator.reset(token)


@torch.library.custom_op("visionmtl::nms_mask", mutates_args=())
def nms_mask(boxes: Tensor, scores: Tensor, max_iou: float, min_score: float) -> Tensor:
    """Bool [B, N]: the boxes above min_score in one of the classes that no better one of that class takes away.

    boxes: float [B, N, 4], best first; scores: float [B, K, N], 0 but for each box's own class
    """
    top, labels = scores.max(dim=1)
    each = zip(boxes, top, labels, top > min_score, strict=True)
    return torch.stack([_survivors(*of_image, max_iou) for of_image in each])


@nms_mask.register_fake
def _(boxes: Tensor, scores: Tensor, max_iou: float, min_score: float) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


def _survivors(boxes: Tensor, scores: Tensor, labels: Tensor, good: Tensor, max_iou: float) -> Tensor:
    """Bool [N]: as `_survivors_of_batch` for one image by torchvision."""
    places = good.nonzero().squeeze(1)
    if not len(places):
        return good
    # double: every class is shifted to a place of its own, past what float32 can hold to a pixel where they are many
    exact = boxes[places].double()
    extent = exact.amax() - exact.amin() + 1
    shifted = exact - exact.amin() + (labels[places] * extent)[:, None]
    from torchvision.ops import nms  # seconds to import, and training alone does not need it

    kept = nms(shifted, scores[places].double(), max_iou)
    return torch.zeros_like(good).index_fill_(0, places[kept], True)
