"""Cross-entropy of upsampled logits in two Triton kernels, which read the small logits and write their gradient.

The upsampled logits exist in registers only. A pixel interpolates from four cells: in the first kernel for its
log-sum-exp and its loss, in the second for the gradient, which every cell gathers from the pixels that read it. There
are no atomics, so the numbers are the same each time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


def value_and_gradient(
    logits: Tensor,
    classes: Tensor,
    weights: Tensor | None,
    smoothed: Tensor | None,
    ignore: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """As `fused.value_and_gradient`, for contiguous float32 logits [B, K, h, w] and classes [B, h * f, w * f]."""
    batch, num_classes, height, width = logits.shape
    factor = classes.shape[1] // height
    classes = classes.contiguous()
    of_class = logits.new_ones(num_classes) if weights is None else weights.contiguous()
    log_sums = logits.new_empty(classes.shape)
    blocks = triton.cdiv(width * factor, BLOCK)
    values = logits.new_empty(batch * height * factor, blocks)
    gradient = torch.empty_like(logits)

    smoothed = logits.new_zeros(1, num_classes) if smoothed is None else smoothed.contiguous()
    settings = {"IGNORE": ignore, "SMOOTHING": label_smoothing, "K": num_classes, "F": factor, "BLOCK": BLOCK}
    settings["BY_IMAGE"] = len(smoothed) > 1
    tensors = logits, classes, of_class, smoothed, smoothed.sum(dim=1), log_sums
    _values[(batch * height * factor, blocks)](*tensors, values, height, width, **settings)
    _gradient[(num_classes, batch * height, triton.cdiv(width, BLOCK))](*tensors, gradient, height, width, **settings)
    return values.sum(), gradient


@triton.jit
def _values(
    logits, classes, of_class, smoothed, all_smoothed, log_sums, values, height, width,
    IGNORE: tl.constexpr, SMOOTHING: tl.constexpr, K: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    BY_IMAGE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of BLOCK pixels in one row of an image, and the sum of their losses."""
    row = tl.program_id(0).to(tl.int64)
    image, y = row // (height * F), row % (height * F)
    smoothed_row = image if BY_IMAGE else 0
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < width * F
    true = tl.load(classes + row * (width * F) + x, mask=inside, other=IGNORE).to(tl.int32)
    known = true != IGNORE

    down = tl.maximum((y.to(tl.float32) + 0.5) / F - 0.5, 0.0)
    right = tl.maximum((x.to(tl.float32) + 0.5) / F - 0.5, 0.0)
    top, left = down.to(tl.int32), right.to(tl.int32)
    down, right = down - top, right - left
    bottom, after = tl.minimum(top + 1, height - 1), tl.minimum(left + 1, width - 1)

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    of_true = tl.zeros([BLOCK], tl.float32)
    of_all = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        upper = logits + ((image * K + k) * height + top) * width
        lower = logits + ((image * K + k) * height + bottom) * width
        a, b = tl.load(upper + left, mask=inside, other=0.0), tl.load(upper + after, mask=inside, other=0.0)
        c, d = tl.load(lower + left, mask=inside, other=0.0), tl.load(lower + after, mask=inside, other=0.0)
        a, c = a + right * (b - a), c + right * (d - c)
        logit = a + down * (c - a)

        higher = tl.maximum(largest, logit)
        total = total * tl.exp(largest - higher) + tl.exp(logit - higher)
        largest = higher
        of_true = tl.where(true == k, logit, of_true)
        if SMOOTHING > 0:
            of_all += tl.load(smoothed + smoothed_row * K + k) * logit

    log_sum = largest + tl.log(total)
    tl.store(log_sums + row * (width * F) + x, log_sum, mask=inside)
    weight = (1 - SMOOTHING) * tl.load(of_class + true, mask=known, other=0.0)
    value = weight * (log_sum - of_true)
    if SMOOTHING > 0:
        value += tl.load(all_smoothed + smoothed_row) * log_sum - of_all
    tl.store(values + row * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(known, value, 0.0)))


@triton.jit
def _gradient(
    logits, classes, of_class, smoothed, all_smoothed, log_sums, gradient, height, width,
    IGNORE: tl.constexpr, SMOOTHING: tl.constexpr, K: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    BY_IMAGE: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK cells in one row of one class, from the 2 F x 2 F pixels around each."""
    k = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    image, i = row // height, row % height
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = j < width
    plane = logits + (image * K + k) * height * width
    before, own, after = tl.maximum(j - 1, 0), j, tl.minimum(j + 1, width - 1)
    smoothed_row = image if BY_IMAGE else 0
    smoothing = tl.load(smoothed + smoothed_row * K + k)
    of_smoothing = tl.load(all_smoothed + smoothed_row)

    found = tl.zeros([BLOCK], tl.float32)
    for ty in range(2 * F):
        y = i * F - F // 2 + ty
        if (y >= 0) & (y < height * F):
            down = (ty + 0.5 - F // 2) / F - 0.5  # of the pixel from the cell's centre, in cells
            place = tl.minimum(tl.maximum(i + down, 0.0), height - 1.0)
            near_y = tl.maximum(1 - tl.abs(place - i), 0.0)
            top = place.to(tl.int32)
            down = place - top
            upper, lower = plane + top * width, plane + tl.minimum(top + 1, height - 1) * width
            a, b = tl.load(upper + before, mask=inside, other=0.0), tl.load(lower + before, mask=inside, other=0.0)
            at_before = a + down * (b - a)
            a, b = tl.load(upper + own, mask=inside, other=0.0), tl.load(lower + own, mask=inside, other=0.0)
            at_own = a + down * (b - a)
            a, b = tl.load(upper + after, mask=inside, other=0.0), tl.load(lower + after, mask=inside, other=0.0)
            at_after = a + down * (b - a)

            pixels = (image * height * F + y) * (width * F)
            for tx in tl.static_range(2 * F):
                x = j * F - F // 2 + tx
                right = (tx + 0.5 - F // 2) / F - 0.5
                valid = inside & (x >= 0) & (x < width * F)
                true = tl.load(classes + pixels + x, mask=valid, other=IGNORE).to(tl.int32)
                log_sum = tl.load(log_sums + pixels + x, mask=valid, other=0.0)
                if 2 * (tx - F // 2) + 1 < F:  # left of the cell's centre
                    logit = at_own - right * (at_before - at_own)
                    near_x = tl.where(j == 0, 1.0, 1 + right)
                else:
                    logit = at_own + right * (at_after - at_own)
                    near_x = tl.where(j == width - 1, 1.0, 1 - right)
                known = true != IGNORE
                weight = (1 - SMOOTHING) * tl.load(of_class + true, mask=known, other=0.0)
                slope = (weight + of_smoothing) * tl.exp(logit - log_sum) - tl.where(true == k, weight, 0.0) - smoothing
                found += tl.where(known, near_y * tl.maximum(near_x, 0.0) * slope, 0.0)
    tl.store(gradient + (image * K + k) * height * width + i * width + j, found, mask=inside)
