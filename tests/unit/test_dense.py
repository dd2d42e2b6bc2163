"""Losses of dense maps: each against an independent implementation in float64, and without labels."""

import math
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.distributed as dist
from torch import Tensor

from visionmtl.ops import losses as dense
from visionmtl.ops import ranks
from visionmtl.structures import IGNORE

SHAPE = (3, 17, 13)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def mask(seed: int) -> Tensor:
    """Two thirds are known; nothing of the last image."""
    known = noise(seed) > -0.4
    known[-1] = False
    return known


def classes(known: Tensor, num_classes: int = 4) -> Tensor:
    drawn = torch.randint(num_classes, known.shape, generator=torch.Generator().manual_seed(5))
    return torch.where(known, drawn, IGNORE)


def plain_silog(pred: np.ndarray, true: np.ndarray, valid: np.ndarray, focus: float) -> float:
    values = []
    for p, t, v in zip(pred, true, valid, strict=True):
        if v.any():
            error = p[v] - t[v]
            values.append(math.sqrt(np.mean(error**2) - focus * np.mean(error) ** 2 + 1e-6))
    return float(np.mean(values))


def plain_gradient(pred: np.ndarray, true: np.ndarray, valid: np.ndarray, num_scales: int) -> float:
    total = 0.0
    for k in range(num_scales):
        e, v = ((x)[:, :: 2**k, :: 2**k] for x in (pred - true, valid))
        for a, b, seen in (
            (e[:, :, 1:], e[:, :, :-1], v[:, :, 1:] & v[:, :, :-1]),
            (e[:, 1:], e[:, :-1], v[:, 1:] & v[:, :-1]),
        ):
            total += np.abs(a - b)[seen].mean() if seen.any() else 0.0
    return total / num_scales


def plain_cosine(pred: np.ndarray, true: np.ndarray, valid: np.ndarray) -> float:
    cosines = (pred * true).sum(1) / np.linalg.norm(pred, axis=1) / np.linalg.norm(true, axis=1)
    return float((1 - cosines)[valid].mean())


def pixels(known: Tensor) -> Tensor:
    return known.sum().float().clamp(min=1e-6)


def images(known: Tensor) -> Tensor:
    return pixels(known.flatten(1).any(dim=1))


def pairs(known: Tensor, num_scales: int) -> list[Tensor]:
    return [pixels(mask) for masks in dense.neighbours(known, num_scales) for mask in masks]


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


VECTORS = noise(3, 3, 3, 17, 13), unit(noise(4, 3, 3, 17, 13))
LOSSES: dict[str, tuple[Any, Any]] = {  # ours of (prediction, mask) and the plain one
    "mean": (
        lambda p, v: dense.mean_over_labelled(p.square(), v, pixels(v)),
        lambda p, v: float((p**2)[v].mean()),
    ),
    "silog": (
        lambda p, v: dense.scale_invariant_log(p, noise(1), v, 0.85, images(v)),
        lambda p, v: plain_silog(p, noise(1).double().numpy(), v, 0.85),
    ),
    "gradient": (
        lambda p, v: dense.gradient_matching(p, noise(1), v, pairs(v, 5)),
        lambda p, v: plain_gradient(p, noise(1).double().numpy(), v, 5),
    ),
    "cosine": (
        lambda p, v: dense.cosine_distance(p[:, None] * VECTORS[0], VECTORS[1], v, pixels(v)),
        lambda p, v: plain_cosine(p[:, None] * VECTORS[0].double().numpy(), VECTORS[1].double().numpy(), v),
    ),
    "hardest": (
        lambda p, v: dense.hardest(p.square(), v, 0.25, pixels(v)),
        lambda p, v: float(np.sort((p**2)[v])[::-1][: math.ceil(0.25 * v.sum())].mean()),
    ),
    "lovasz": (
        lambda p, v: dense.lovasz_softmax(p[:, None] * noise(6, 3, 4, 17, 13), classes(v), v, pixels(v)),
        lambda p, v: float(
            smp.losses.LovaszLoss("multiclass", ignore_index=IGNORE)(
                torch.from_numpy(p[:, None]).float() * noise(6, 3, 4, 17, 13), classes(torch.from_numpy(v))
            )
        ),
    ),
}
every_loss = pytest.mark.parametrize("ours", [pair[0] for pair in LOSSES.values()], ids=list(LOSSES))


@pytest.mark.parametrize(("ours", "plain"), LOSSES.values(), ids=list(LOSSES))
def test_a_loss_equals_its_plain_form_in_float64(ours: Any, plain: Any):
    prediction, known = noise(0), mask(2)
    assert ours(prediction, known).item() == pytest.approx(plain(prediction.double().numpy(), known.numpy()), rel=1e-5)


@every_loss
def test_nothing_labelled_teaches_exactly_nothing(ours: Any):
    prediction = noise(0).requires_grad_()
    loss = ours(prediction, torch.zeros(SHAPE, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and loss.shape == ()
    assert (prediction.grad == 0).all()


@every_loss
def test_gradients_are_finite_and_stay_within_the_labels(ours: Any):
    prediction, known = noise(0).requires_grad_(), mask(2)
    ours(prediction, known).backward()
    assert prediction.grad.isfinite().all() and prediction.grad.any()
    assert not prediction.grad[~known].any()


@every_loss
def test_the_gradient_is_that_of_finite_differences(ours: Any):
    known = mask(2)[:1, :6, :5]
    known = torch.nn.functional.pad(known, (0, 8, 0, 11, 0, 2))
    prediction, way = noise(0).double().requires_grad_(), noise(8).double()
    (slope,) = torch.autograd.grad(ours(prediction, known), prediction)
    with torch.no_grad():
        difference = (ours(prediction + 1e-6 * way, known) - ours(prediction - 1e-6 * way, known)) / 2e-6
    assert (slope * way).sum().item() == pytest.approx(difference.item(), rel=1e-4)


def test_a_scale_factor_costs_only_what_the_variance_focus_leaves_of_it():
    true, known = noise(1), mask(2)
    for focus, cost in ((0.0, 1.0), (0.75, 0.5), (0.96, 0.2)):
        loss = dense.scale_invariant_log(true + math.log(2), true, known, focus, images(known))
        assert loss.item() == pytest.approx(cost * math.log(2), rel=1e-4)


def test_a_large_common_error_does_not_cancel_the_small_differences():
    """mean(e^2) - lambda mean(e)^2 in float32 would lose differences of 0.001 beside 100."""
    small, known = noise(1) * 0.001, mask(2)
    loss = dense.scale_invariant_log(small + 100, torch.zeros(SHAPE), known, 1.0, images(known))
    plain = plain_silog(small.double().numpy(), np.zeros(SHAPE), known.numpy(), 1.0)
    assert loss.item() == pytest.approx(plain, rel=0.01)


def test_the_hardest_share_is_one_of_what_is_labelled():
    values, known = torch.arange(8.0)[None, None], torch.ones(1, 1, 8, dtype=torch.bool)
    assert dense.hardest(values, known, 0.25, pixels(known)) == 6.5
    with_unlabelled = torch.cat([values, values + 100], dim=2), torch.cat([known, ~known], dim=2)
    assert dense.hardest(*with_unlabelled, 0.25, pixels(known)) == 6.5
    assert dense.hardest(values, values == 3, 0.25, pixels(values == 3)) == 3, "one at least"


def test_a_map_of_the_padded_input_is_cut_to_its_content_and_resized():
    ramp = torch.arange(8.0).repeat_interleave(2).expand(1, 1, 8, 16) + 0.0
    out = dense.to_original(ramp, (8, 16), content=(4, 8), original=(4, 8))
    assert torch.equal(out, ramp[:, :, :4, :8])
    larger = dense.to_original(ramp, (8, 16), content=(4, 8), original=(12, 24))
    assert larger.shape == (1, 1, 12, 24) and larger.max() == 3, "what lies in the padding does not leak in"


def test_a_loss_over_two_ranks_is_the_mean_over_all_labelled_items(monkeypatch: pytest.MonkeyPatch):
    values, known = noise(0).square(), mask(2)
    whole = dense.mean_over_labelled(values, known, known.sum())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def of_rank(mine: slice, other: slice) -> Tensor:
        monkeypatch.setattr(dist, "all_reduce", lambda value: value.add_(known[other].sum()))
        total = ranks.step_totals([{"task": {"pixels": known[mine].sum().float()}}])["task"]["pixels"]
        return dense.mean_over_labelled(values[mine], known[mine], total)

    first, rest = slice(0, 1), slice(1, None)
    torch.testing.assert_close((of_rank(first, rest) + of_rank(rest, first)) / 2, whole)


def test_totals_add_micro_batches_and_ranks_and_are_never_zero(monkeypatch: pytest.MonkeyPatch):
    counts = [{"a": {"n": torch.tensor(3.0), "m": torch.tensor(0.0)}, "b": {"n": torch.tensor(1.0)}}] * 2
    totals = ranks.step_totals(counts)
    assert (totals["a"]["n"], totals["b"]["n"]) == (6, 2) and 0 < totals["a"]["m"] < 1e-5
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_reduce", lambda value: value.mul_(4))
    assert ranks.step_totals(counts)["a"]["n"] * 4 == 24
