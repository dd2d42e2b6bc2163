"""Upsampling and cross-entropy in one operation that never holds the logits at full resolution."""

import itertools
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from visionmtl.ops.losses import smoothing_shares
from visionmtl.ops.resize import upsampling_weights

CHUNK_ELEMENTS = 2**22
"""Logits upsampled at a time (16 MB in float32), in whole rows of cells; a map up to this size is done in one go."""
MAX_CHUNKS = 8
"""Larger maps are cut into this many: by then the memory is small, and more would only be more kernels to launch."""
CACHED_ELEMENTS = 2**20
"""The same on a CPU, however large the map: what its cache holds (4 MB) is taken up again by the next operation."""
MAX_COLUMNS = 64
"""Cells of a piece in width on a CPU: interpolating by products costs the square of it."""


def upsampled_cross_entropy(
    logits: Tensor,
    classes: Tensor,
    *,
    ignore: int,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    smooth_over: Tensor | None = None,
) -> Tensor:
    """Sum over pixels of `F.cross_entropy(upsample(logits, factor), classes, weights, ...)`, in less memory.

    logits: float32 [B, K, h, w]; classes: uint8 or int64 [B, h * factor, w * factor], `ignore` = adds nothing
    weights: float32 [K], a factor for each true class; not divided out again
    smooth_over: bool [B, K], the classes of an image among which label_smoothing is divided; None: all

    The gradient is found along with the value, and only its small form, that of the logits, is kept for the backward.
    For the compiler this is one opaque operator: were it taken apart, nothing would stop it from keeping all pixels.
    """
    if logits.device.type == "cuda":  # the kernels read planes
        logits = logits.contiguous()
    smoothed = None
    if label_smoothing:
        if smooth_over is None:
            smooth_over = torch.ones_like(logits[:1, :, 0, 0], dtype=torch.bool)
        smoothed = smoothing_shares(smooth_over, weights, label_smoothing)
    total: Tensor = torch.ops.visionmtl.upsampled_cross_entropy(
        logits, classes, weights, smoothed, ignore, label_smoothing
    )[0]
    return total


def value_and_gradient(
    logits: Tensor,
    classes: Tensor,
    weights: Tensor | None,
    smoothed: Tensor | None,
    ignore: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """The sum and its gradient on `logits`: on a GPU by two kernels, else a few rows at a time.

    smoothed: with label smoothing, float32 [B, K], or [1, K] for all images: see `losses.smoothing_shares`
    """
    batch, num_classes, height, width = logits.shape
    factor = classes.shape[1] // height
    if classes.shape != (batch, height * factor, width * factor):
        raise ValueError(
            f"logits are {height}x{width} cells and classes {classes.shape[1]}x{classes.shape[2]} px; "
            "the second must be a whole multiple of the first, the same both ways; use plain cross-entropy"
        )
    if logits.device.type == "cuda" and find_spec("triton"):  # part of torch, but on Windows
        from visionmtl.ops import fused_kernel

        return fused_kernel.value_and_gradient(logits, classes, weights, smoothed, ignore, label_smoothing)
    elements = num_classes * classes.numel()
    if logits.device.type == "cpu":
        across = -(-width // MAX_COLUMNS)
        down = -(-elements // (CACHED_ELEMENTS * max(across, 1)))
    else:
        across, down = 1, min(-(-elements // CHUNK_ELEMENTS), MAX_CHUNKS)
    planes = logits.contiguous()  # log-softmax is several times as slow over classes that lie beside each other
    of_rows, of_columns = (upsampling_weights(side, factor, logits) for side in (height, width))
    total, gradient = logits.new_zeros(()), torch.zeros_like(logits)
    for vertical, horizontal in itertools.product(_pieces(height, down), _pieces(width, across)):
        # one cell more on either side to interpolate from
        (y, pixels_y), (x, pixels_x) = ((_grown(cells), _times(cells, factor)) for cells in (vertical, horizontal))
        rows, columns = of_rows[y, pixels_y], of_columns[x, pixels_x]
        part = rows.mT @ (planes[:, :, y, x] @ columns)
        value, of_part = _cross_entropy(
            part, classes[:, pixels_y, pixels_x], weights, smoothed, ignore, label_smoothing
        )
        total += value
        gradient[:, :, y, x] += rows @ of_part @ columns.mT
    return total, gradient


def _pieces(length: int, number: int) -> Iterator[slice]:
    """At most so many pieces of 0 ... length - 1, of one length but the last."""
    step = max(-(-length // max(number, 1)), 1)
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


def _grown(cells: slice) -> slice:
    return slice(max(cells.start - 1, 0), cells.stop + 1)


def _times(cells: slice, factor: int) -> slice:
    return slice(cells.start * factor, cells.stop * factor)


def _cross_entropy(
    logits: Tensor,
    classes: Tensor,
    weights: Tensor | None,
    smoothed: Tensor | None,
    ignore: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Sum over pixels and its gradient on logits [B, K, H, W], which takes the place of the log-softmax."""
    known = classes != ignore
    true = torch.where(known, classes, 0).long()[:, None]  # [B, 1, H, W]
    known = known[:, None].to(logits.dtype)
    of_true = (1 - label_smoothing) * (known if weights is None else known * weights[true])

    logs = logits.log_softmax(dim=1)
    value = -(logs.gather(1, true) * of_true).sum()
    of_each = None if smoothed is None else smoothed[..., None, None]
    if of_each is not None:
        value -= ((logs * of_each).sum(dim=1, keepdim=True) * known).sum()

    gradient = logs.exp_().mul_(of_true if of_each is None else of_true + known * of_each.sum(dim=1, keepdim=True))
    gradient.scatter_(1, true, gradient.gather(1, true) - of_true)  # no atomics: one class a pixel
    if of_each is not None:
        gradient.addcmul_(known, of_each, value=-1)
    return value, gradient


_SCHEMA = (
    "(Tensor logits, Tensor classes, Tensor? weights, Tensor? smoothed, int ignore, float label_smoothing)"
    " -> (Tensor, Tensor)"
)


@torch.library.custom_op("visionmtl::upsampled_cross_entropy", mutates_args=(), schema=_SCHEMA)
def _operator(
    logits: Tensor,
    classes: Tensor,
    weights: Tensor | None,
    smoothed: Tensor | None,
    ignore: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(logits.device.type, enabled=False):  # products of float32 would be rounded to bfloat16
        return value_and_gradient(logits, classes, weights, smoothed, ignore, label_smoothing)


@_operator.register_fake
def _shapes(
    logits: Tensor,
    classes: Tensor,
    weights: Tensor | None,
    smoothed: Tensor | None,
    ignore: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(()), torch.empty_like(logits)


def _keep_gradient(ctx: torch.autograd.function.FunctionCtx, inputs: object, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _backward(
    ctx: torch.autograd.function.BackwardCFunction, of_total: Tensor, of_gradient: Tensor
) -> tuple[Tensor | None, ...]:
    return ctx.saved_tensors[0] * of_total, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_keep_gradient)
