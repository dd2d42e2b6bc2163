"""Losses and output forms of dense maps: segmentation, depth, normals; missing labels teach nothing.

A loss is a sum over labelled items, divided by how many there are in the whole optimiser step. `total` is that number:
summed over ranks and micro-batches and divided by the number of ranks, because gradients are averaged over ranks.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmtl.ops.ranks import joint_sum, num_ranks
from visionmtl.structures import ImageMeta


def mean_over_labelled(values: Tensor, counts: Tensor, total: Tensor) -> Tensor:
    """Sum of `values` where `counts`, divided by `total`; 0 with zero gradient where nothing counts."""
    return torch.where(counts, values, 0.0).sum() / total


def cross_entropy(
    logits: Tensor,
    classes: Tensor,
    ignore: int,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    smooth_over: Tensor | None = None,
) -> Tensor:
    """`F.cross_entropy(..., reduction="none")` of logits [B, K, H, W], smoothed over the classes of each image.

    smooth_over: bool [B, K], the classes of an image among which label_smoothing is divided; None: all
    """
    if smooth_over is None or not label_smoothing:
        return F.cross_entropy(
            logits, classes, weights, ignore_index=ignore, reduction="none", label_smoothing=label_smoothing
        )
    of_true = F.cross_entropy(logits, classes, weights, ignore_index=ignore, reduction="none")
    shares = smoothing_shares(smooth_over, weights, label_smoothing)[..., None, None]
    smooth = -(logits.log_softmax(dim=1) * shares).sum(dim=1)
    return (1 - label_smoothing) * of_true + torch.where(classes != ignore, smooth, 0.0)


def smoothing_shares(smooth_over: Tensor, weights: Tensor | None, label_smoothing: float) -> Tensor:
    """float32 [B, K]: what label smoothing gives each class of an image, times its weight.

    Arguments as of `cross_entropy`.
    """
    shares = smooth_over * (label_smoothing / smooth_over.sum(dim=1, keepdim=True).clamp(min=1))
    return shares if weights is None else shares * weights


def hardest(values: Tensor, counts: Tensor, share: float, total: Tensor) -> Tensor:
    """Mean of the hardest `share` of the counted values (online hard example mining, arXiv:1604.03540).

    values: >= 0; total: number of counted values in the whole step / `num_ranks`. At least one is kept where one is
    counted. Each rank and each micro-batch looks among its own values, so that k of them are not exactly one large
    batch.
    """
    flat = torch.where(counts, values, -1.0).flatten()
    top = flat.topk(math.ceil(share * flat.numel())).values  # as many as could be kept, so that the shape is fixed
    kept = torch.arange(len(top), device=top.device) < (share * counts.sum().double()).ceil()
    kept_total = (share * total.double() * num_ranks()).ceil() / num_ranks()
    return mean_over_labelled(top, kept & (top >= 0), kept_total.to(values.dtype))


def dice(logits: Tensor, classes: Tensor, counts: Tensor, total: Tensor) -> Tensor:
    """Soft Dice loss over all counted pixels of all ranks (Milletari et al. 2016, arXiv:1606.04797, sec. 3).

    Arguments as of `lovasz_softmax`; 0 when nothing counts on any rank. The denominator sums shares, not their
    squares, a class that is absent adds 0, and the mean is over all classes: that is the form of
    segmentation_models_pytorch (0.6). A ratio of sums is no sum: each of several micro-batches gives its own loss,
    weighted by its share of the step's pixels.
    """
    shares = torch.where(counts[:, None], logits.softmax(dim=1), 0.0).flatten(2)
    of_class = torch.arange(logits.shape[1], device=logits.device)[:, None]
    wanted = ((classes.flatten(1)[:, None] == of_class) & counts.flatten(1)[:, None]).to(shares.dtype)  # [B, K, N]
    sums = torch.stack([(shares * wanted).sum((0, 2)), (shares + wanted).sum((0, 2)), wanted.sum((0, 2))])
    overlap, both, here = joint_sum(sums)
    present = here > 0
    loss = torch.where(present, 1 - 2 * overlap / both.clamp(min=1e-7), 0.0).mean()
    return loss * (here.sum() / (total * num_ranks()))


def lovasz_softmax(logits: Tensor, classes: Tensor, counts: Tensor, total: Tensor) -> Tensor:
    """Lovasz-Softmax over all counted pixels, mean over the classes present (arXiv:1705.08790, eq. 11 and alg. 1).

    It ranks pixels, so that the loss of two ranks or micro-batches is not that of their common batch: each gives its
    own, weighted by its share of the step's pixels.

    logits: [B, K, H, W]; classes: int64 [B, H, W], anything where not counted; counts: bool [B, H, W]
    total: counted pixels of the step
    Fixed shapes: a pixel that does not count has error 0, so it adds nothing wherever it is sorted to.
    """
    shares = logits.softmax(dim=1).transpose(0, 1).flatten(1)  # [K, N]
    known = counts.flatten()
    of_class = torch.arange(len(shares), device=logits.device)[:, None]
    wanted = ((classes.flatten() == of_class) & known).to(shares.dtype)  # [K, N]
    errors, order = torch.where(known, (wanted - shares).abs(), 0.0).sort(dim=1, descending=True)

    wanted = wanted.gather(1, order)
    size = wanted.sum(dim=1, keepdim=True)
    jaccard = 1 - (size - wanted.cumsum(dim=1)) / (size + (1 - wanted).cumsum(dim=1))
    steps = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], dim=1)
    present = size.squeeze(1) > 0
    mean = torch.where(present, (errors * steps).sum(dim=1), 0.0).sum() / present.sum().clamp(min=1)
    return mean * (known.sum() / total)


def scale_invariant_log(
    log_pred: Tensor, log_true: Tensor, valid: Tensor, variance_focus: float, total: Tensor
) -> Tensor:
    """Scale-invariant log error, centred, under a root (Eigen et al. 2014, arXiv:1406.2283, eq. 4).

    Under a root as in BTS (Lee et al. 2019, arXiv:1907.10326, eq. 5). Deviations from it: of each image, then the mean
    over images, where BTS takes the pixels of a batch together; and without its factor of 10.

    log_pred, log_true: float32 [B, H, W], natural log of metres; log_true must be finite everywhere
    valid: bool [B, H, W]
    variance_focus: lambda; 1 would leave the scale untaught. Computed as variance + (1 - lambda) * mean^2, which does
    not cancel the way mean(e^2) - lambda * mean(e)^2 does.
    total: images with valid pixels in the step

    Returns the mean over images with valid pixels; exactly 0 with zero gradient when there are none.
    """
    error = torch.where(valid, log_pred - log_true, 0.0).flatten(1)
    weight = valid.flatten(1)
    pixels = weight.sum(dim=1).clamp(min=1)
    mean = error.sum(dim=1) / pixels
    variance = torch.where(weight, (error - mean[:, None]).square(), 0.0).sum(dim=1) / pixels
    # 1e-6: the root has an infinite gradient at 0
    per_image = (variance + (1 - variance_focus) * mean.square() + 1e-6).sqrt()
    return mean_over_labelled(per_image, weight.any(dim=1), total)


def neighbours(valid: Tensor, num_scales: int) -> list[tuple[Tensor, Tensor]]:
    """Where two neighbours in a row, and in a column, are both valid: bool maps by scale.

    Scale k has every 2^k-th pixel.

    valid: bool [B, H, W]
    """
    maps = [valid[:, :: 2**k, :: 2**k] for k in range(num_scales)]
    return [(seen[:, :, 1:] & seen[:, :, :-1], seen[:, 1:] & seen[:, :-1]) for seen in maps]


def gradient_matching(log_pred: Tensor, log_true: Tensor, valid: Tensor, totals: Sequence[Tensor]) -> Tensor:
    """Multi-scale gradient term (MegaDepth, arXiv:1804.00607, eq. 4): L1 of the log error's differences.

    Other arguments as of `scale_invariant_log`. Scale k takes every 2^k-th pixel. Mean over scales.
    totals: by scale, in a row and then in a column: the pairs that `neighbours` finds in the step
    """
    error = torch.where(valid, log_pred - log_true, 0.0)
    num_scales = len(totals) // 2
    loss = log_pred.new_zeros(())
    for k, (in_row, in_column) in enumerate(neighbours(valid, num_scales)):
        at_scale = error[:, :: 2**k, :: 2**k]
        loss = loss + mean_over_labelled((at_scale[:, :, 1:] - at_scale[:, :, :-1]).abs(), in_row, totals[2 * k])
        loss = loss + mean_over_labelled((at_scale[:, 1:] - at_scale[:, :-1]).abs(), in_column, totals[2 * k + 1])
    return loss / num_scales


def cosine_distance(pred: Tensor, true: Tensor, valid: Tensor, total: Tensor) -> Tensor:
    """Mean of 1 - cos between vectors [B, 3, H, W]; `true` of unit length where valid, bool [B, H, W].

    total: valid pixels of the step
    """
    return mean_over_labelled(1 - (F.normalize(pred, dim=1, eps=1e-6) * true).sum(dim=1), valid, total)


def to_original(maps: Tensor, size: tuple[int, int], content: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """A map [1, C, h, w] that covers a padded input of `size` -> [1, C, H, W] over the original image.

    content: (H, W) px of the image inside the padded input; bilinear, align_corners=False.
    """
    full = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    inside = full[:, :, : content[0], : content[1]]
    if content == original:
        return inside
    return F.interpolate(inside, size=original, mode="bilinear", align_corners=False)


def each_to_original(maps: Tensor, size: tuple[int, int], metas: Sequence[ImageMeta]) -> Iterator[Tensor]:
    """`to_original` image by image in float32: [C, H, W] of each, since their sizes may differ."""
    for i, meta in enumerate(metas):
        yield to_original(maps[i : i + 1].float(), size, meta.content_size, meta.size)[0]
