"""Cross-entropy of upsampled logits: equal to the plain way in value and gradient, in a fraction of its memory."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from visionmtl.ops import fused
from visionmtl.ops.fused import upsampled_cross_entropy
from visionmtl.ops.losses import dice
from visionmtl.structures import IGNORE
from visionmtl.tasks.segmentation import Segmentation

WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])


def plain(
    logits: Tensor, classes: Tensor, *, ignore: int, weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """What is imitated."""
    full = F.interpolate(logits, classes.shape[1:], mode="bilinear")
    return F.cross_entropy(
        full, classes.long(), weights, ignore_index=ignore, label_smoothing=label_smoothing, reduction="none"
    ).sum()


def case(size: tuple[int, int], factor: int, batch: int = 2, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    full = (batch, size[0] * factor, size[1] * factor)
    classes = torch.randint(0, num_classes, full, dtype=torch.uint8, generator=random)
    classes[torch.rand(full, generator=random) < 0.2] = IGNORE
    return 4 * torch.randn(batch, num_classes, *size, generator=random), classes


def with_gradient(function: Callable[..., Tensor], logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    logits = logits.clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(logits, *args, **options)
    (gradient,) = torch.autograd.grad(3 * value, logits)
    return value.detach(), gradient


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("factor", [1, 3, 4])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weights": WEIGHTS}, {"weights": WEIGHTS, "label_smoothing": 0.2}]
)
def test_it_equals_the_plain_way_however_it_is_cut(rows: int, factor: int, options: Any, monkeypatch: Any):
    logits, classes = case((7, 4), factor)
    monkeypatch.setattr(fused, "CACHED_ELEMENTS", logits[:, :, :rows].numel() * factor**2)
    monkeypatch.setattr(fused, "MAX_COLUMNS", rows)

    ours = with_gradient(upsampled_cross_entropy, logits, classes, ignore=IGNORE, **options)
    theirs = with_gradient(plain, logits, classes, ignore=IGNORE, **options)

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1)])
def test_maps_of_a_cell_or_two_are_no_exception(size: tuple[int, int]):
    logits, classes = case(size, 4)
    ours = with_gradient(upsampled_cross_entropy, logits, classes, ignore=IGNORE)
    torch.testing.assert_close(ours, with_gradient(plain, logits, classes, ignore=IGNORE))


def test_memory_format_and_extreme_logits_do_not_matter():
    logits, classes = case((6, 4), 4)
    logits = (1e4 * logits).contiguous(memory_format=torch.channels_last)

    ours = with_gradient(upsampled_cross_entropy, logits, classes, ignore=IGNORE)

    assert ours[1].isfinite().all() and ours[1].is_contiguous(memory_format=torch.channels_last)
    exact = with_gradient(plain, logits.double(), classes, ignore=IGNORE)
    # logits of 4e4 are rounded by 4e-3, so that torch's own gradient in float32 is off by 9e-5, too
    torch.testing.assert_close(ours, exact, check_dtype=False, rtol=1e-6, atol=1e-4)


def test_autocast_does_not_round_the_logits():
    logits, classes = case((6, 4), 4)

    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradient(upsampled_cross_entropy, logits, classes, ignore=IGNORE)

    torch.testing.assert_close(ours, with_gradient(upsampled_cross_entropy, logits, classes, ignore=IGNORE))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"weights": WEIGHTS, "label_smoothing": 0.2}])
def test_on_a_gpu_the_kernels_equal_the_plain_way(factor: int, options: Any):
    logits, classes = (x.cuda() for x in case((7, 130), factor))
    options = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}

    ours = with_gradient(upsampled_cross_entropy, logits, classes, ignore=IGNORE, **options)
    theirs = with_gradient(plain, logits, classes, ignore=IGNORE, **options)

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


INTERPRETED = """
from visionmtl.ops import fused_kernel
from visionmtl.ops.losses import smoothing_shares
from test_fused import *
fused_kernel.BLOCK = 16
logits, classes = case((2, 3), 4, batch=1)
smoothed = smoothing_shares(torch.ones(1, 5, dtype=torch.bool), WEIGHTS, 0.2)
ours = fused_kernel.value_and_gradient(logits, classes, WEIGHTS, smoothed, IGNORE, 0.2)
value, gradient = with_gradient(plain, logits, classes, ignore=IGNORE, weights=WEIGHTS, label_smoothing=0.2)
torch.testing.assert_close(ours, (value, gradient / 3), rtol=1e-5, atol=1e-5)

logits, classes = case((2, 3), 4, num_classes=3)  # an image with classes 0 to 2, and one with 0 to 3
known = torch.tensor([[True, True, True, False], [True] * 4])
logits = torch.where(known[..., None, None], torch.cat([logits, logits[:, 1:2] + 1], dim=1), -1e30)
smoothed = smoothing_shares(known, WEIGHTS[:4], 0.2)
ours = fused_kernel.value_and_gradient(logits, classes, WEIGHTS[:4], smoothed, IGNORE, 0.2)
theirs = fused.value_and_gradient(logits, classes, WEIGHTS[:4], smoothed, IGNORE, 0.2)
each = [plain(logits[i:i+1, mask], classes[i:i+1], ignore=IGNORE, weights=WEIGHTS[:4][mask], label_smoothing=0.2)
        for i, mask in enumerate(known)]
torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
torch.testing.assert_close(ours[0], sum(each), rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
def test_the_kernels_interpreted_on_a_cpu_equal_the_plain_way():
    pytest.importorskip("triton")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}  # read when Triton is imported
    subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, check=True)


def test_where_nothing_is_known_value_and_gradient_are_exactly_zero():
    logits, classes = case((4, 4), 2)
    value, gradient = with_gradient(upsampled_cross_entropy, logits, torch.full_like(classes, IGNORE), ignore=IGNORE)
    assert value == 0 and not gradient.any()


def test_sizes_that_are_no_multiple_are_an_error():
    logits, classes = case((4, 4), 2)
    with pytest.raises(ValueError, match=r"4x4 cells and classes 8x7 px; .* whole multiple .* use plain"):
        upsampled_cross_entropy(logits, classes[:, :, :-1], ignore=IGNORE)


def test_torch_finds_the_operator_well_behaved():
    logits, classes = case((4, 3), 2)
    arguments = (logits.requires_grad_(), classes, WEIGHTS, WEIGHTS.expand(2, 5), IGNORE, 0.1)
    torch.library.opcheck(torch.ops.visionmtl.upsampled_cross_entropy.default, arguments)


def test_dice_is_that_of_segmentation_models_pytorch():
    losses = pytest.importorskip("segmentation_models_pytorch").losses
    logits, classes = case((6, 5), 1)
    classes[classes == 3] = 0  # a class that is absent
    counts = classes != IGNORE
    wanted = losses.DiceLoss(mode="multiclass", ignore_index=IGNORE)(logits, classes.long())
    torch.testing.assert_close(dice(logits, classes.long(), counts, counts.sum()), wanted)


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Most memory held at once beyond what was there before, as the allocator sees it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
)
def test_a_street_scene_takes_a_quarter_of_the_memory_at_most(device: str):
    logits = torch.randn(1, 19, 256, 512, device=device, requires_grad=True)
    classes = torch.randint(0, 19, (1, 1024, 2048), dtype=torch.uint8, device=device)
    labelled = torch.ones(1, dtype=torch.bool, device=device)
    full = 4 * 19 * classes.numel()

    def learn(task: Segmentation) -> None:
        totals = task.count({"classes": classes}, (1024, 2048))
        task.loss(logits, {"classes": classes}, labelled, totals)["cross_entropy"].backward()

    ours = peak_bytes(lambda: learn(Segmentation()), device)
    theirs = peak_bytes(lambda: plain(logits, classes, ignore=IGNORE).backward(), device)

    assert theirs > 2 * full, "the plain way holds the upsampled logits and their gradient at once"
    assert ours < theirs / 4, f"{ours / 2**20:.0f} MB against {theirs / 2**20:.0f} MB"
