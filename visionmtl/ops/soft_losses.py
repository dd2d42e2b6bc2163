"""Losses of dense maps against teachers' outputs, over everything that shows an image, labelled or not.

`total` is the area of image contents in the whole optimiser step, in units of the network's input: summed over ranks
and micro-batches and divided by the number of ranks, as for the losses against labels (see `ops.losses`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmtl.ops.resize import average_bins

GRID = 4
"""Cells a side to which shared maps are pooled before their distances are compared."""


def content_shares(image: Tensor) -> Tensor:
    """Height and width of each image inside its padding, as shares of the input's: float32 [B, 2] in 0..1.

    image: [B, C, H, W] of 0..255, the contents at the top left and 0 in all channels elsewhere. Where the last rows or
    columns of a photo are that black they count as padding too.
    """
    seen = (image != 0).any(dim=1)
    shares = []
    for other_axis in (2, 1):
        lines = seen.any(dim=other_axis)  # [B, H], then [B, W]
        numbers = torch.arange(1, lines.shape[1] + 1, device=image.device, dtype=torch.float32)
        shares.append((lines * numbers).amax(dim=1) / lines.shape[1])
    return torch.stack(shares, dim=1)


def area(content: Tensor) -> Tensor:
    """The area of all contents [B, 2] together, in units of the network's input; a scalar."""
    return (content[:, 0] * content[:, 1]).sum()


def content_weights(content: Tensor, height: int, width: int) -> Tensor:
    """The part of each cell of a map that shows the image, in 0..1: float32 [B, height, width].

    content: as `content_shares` gives it
    """
    rows, columns = (
        (content[:, axis, None] * length - torch.arange(length, device=content.device)).clamp(0, 1)
        for axis, length in enumerate((height, width))
    )
    return rows[:, :, None] * columns[:, None, :]


def mean_over_content(values: Tensor, content: Tensor, total: Tensor) -> Tensor:
    """Mean of a map [B, h, w] over image contents [B, 2]; total: see above."""
    weights = content_weights(content, *values.shape[1:])
    # replaced before the product: what a teacher says of padding may be infinite
    return (torch.where(weights > 0, values, 0.0) * weights).sum() / weights[0].numel() / total


def soft_cross_entropy(logits: Tensor, shares: Tensor, content: Tensor, total: Tensor, *, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teachers' classes, at a temperature (Hinton et al. 2015, arXiv:1503.02531).

    T^2 * mean of KL(shares || softmax(logits / T)); the factor keeps the gradient's scale (sec. 2 of the paper).
    logits: float32 [B, K, h, w]; shares: the teachers' softmax(logits / T), [B, K, h, w]
    """
    logs = (logits / temperature).log_softmax(dim=1)
    divergence = (torch.xlogy(shares, shares) - shares * logs).sum(dim=1)
    return temperature**2 * mean_over_content(divergence, content, total)


def log_distance(log_pred: Tensor, log_teacher: Tensor, content: Tensor, total: Tensor) -> Tensor:
    """Mean of |log_pred - log_teacher|, float32 [B, h, w] each: 0.1 is a depth that is a tenth off."""
    return mean_over_content((log_pred - log_teacher).abs(), content, total)


def log_distance_up_to_scale(log_pred: Tensor, log_teacher: Tensor, content: Tensor, total: Tensor) -> Tensor:
    """As `log_distance`, after the mean difference of each image is taken out: the teacher's scale teaches nothing.

    It is the spread around the mean of Eigen et al. 2014 (arXiv:1406.2283, eq. 3), with absolute values in place of
    squares.
    """
    difference = log_pred - log_teacher
    weights = content_weights(content, *difference.shape[1:])
    means = (difference * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-6)
    return mean_over_content((difference - means[:, None, None]).abs(), content, total)


def direction_distance(pred: Tensor, teacher: Tensor, content: Tensor, total: Tensor) -> Tensor:
    """Mean of 1 - cos between vectors [B, 3, h, w] of any length."""
    cosine = (F.normalize(pred, dim=1, eps=1e-6) * F.normalize(teacher, dim=1, eps=1e-6)).sum(dim=1)
    return mean_over_content(1 - cosine, content, total)


def distance_preservation(maps: Mapping[int, Tensor], teacher: Mapping[str, Tensor], total: Tensor) -> Tensor:
    """How much distances between features differ from a teacher's (Wang et al. 2025, arXiv:2511.11676, DWDP loss).

    Mean over pairs of (d_ij - d'_ij)^2 and over levels, where d is the squared Euclidean distance of two features in
    units of the teacher's mean distance. Deviations: features are cells of shared maps pooled to GRID x GRID, of all
    images of a micro-batch; all pairs count alike, since the paper's weights need one label an image; and the unit.
    maps: by level; teacher: by level as text; levels that the teacher does not have are left out
    total: pairs in the step, see `num_pairs`
    """
    losses = []
    for level, of_teacher in teacher.items():
        distances, wanted = (_distances(_pooled(x.float())) for x in (maps[int(level)], of_teacher))
        unit = wanted.mean().clamp(min=1e-12)
        losses.append(((distances - wanted) / unit).square().sum() / total)
    return torch.stack(losses).mean()


def num_pairs(batch_size: int, like: Tensor) -> Tensor:
    """Pairs of features that `distance_preservation` compares in one micro-batch, as a scalar on the device."""
    return like.new_full((), float((batch_size * GRID**2) ** 2), dtype=torch.float32)


def _pooled(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B * GRID^2, C]."""
    return average_bins(x, GRID).flatten(2).transpose(1, 2).flatten(0, 1)


def _distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances of rows: [N, C] -> [N, N]."""
    squares = x.square().sum(dim=1)
    return (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0)


def resize_like(maps: Tensor, like: Tensor) -> Tensor:
    """Maps [B, C, h, w] over the cells of another map, bilinear; for teachers' maps, which need no gradient."""
    if maps.shape[2:] == like.shape[2:]:
        return maps
    return F.interpolate(maps, size=like.shape[2:], mode="bilinear", align_corners=False)
