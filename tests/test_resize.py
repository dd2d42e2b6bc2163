"""Upsampling without atomics equals the library's, in value and in gradient."""

import pytest
import torch
from torch.nn import functional as F

from visionmtl.ops.resize import average_bins, by_phases, resize, resize_small, upsample


def value_and_gradient(function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    weight = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize("factor", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("size", [(5, 7), (1, 2)])
@pytest.mark.parametrize("function", [by_phases, upsample])
def test_upsample_equals_interpolate(factor: int, size: tuple[int, int], function):
    x = torch.randn(2, 3, *size)

    ours = value_and_gradient(lambda x: function(x, factor), x)
    theirs = value_and_gradient(lambda x: F.interpolate(x, scale_factor=factor, mode="bilinear"), x)

    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5 * factor**2, rtol=1e-5)  # a sum of factor^2 terms


def test_phases_of_two_cells_by_two_are_quarters():
    x = torch.tensor([[[[0.0, 1.0]]]])

    assert by_phases(x, 2)[0, 0].tolist() == [[0.0, 0.25, 0.75, 1.0]] * 2


def test_half_precision_stays_half_and_near():
    x = torch.rand(1, 2, 4, 4)

    ours = by_phases(x.bfloat16(), 4)

    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), by_phases(x, 4), atol=0.02, rtol=0)  # three roundings of 2^-8


def test_factor_one_is_nothing_and_zero_an_error():
    x = torch.rand(1, 1, 2, 2)

    assert upsample(x, 1) is x
    with pytest.raises(ValueError, match="factor is 0"):
        upsample(x, 0)


def test_products_equal_pooling_and_interpolation():
    x = torch.randn(2, 3, 8, 11)

    for bins in (1, 2, 3, 6):
        ours = value_and_gradient(lambda x, n=bins: average_bins(x, n), x)
        torch.testing.assert_close(ours, value_and_gradient(lambda x, n=bins: F.adaptive_avg_pool2d(x, n), x))
    ours = value_and_gradient(lambda x: resize_small(x, (13, 25)), x)
    torch.testing.assert_close(ours, value_and_gradient(lambda x: resize(x, (13, 25)), x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run this file on a machine with one")
def test_the_gradient_on_a_gpu_is_reproducible():
    x = torch.randn(2, 8, 30, 40, device="cuda", requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (torch.autograd.grad(upsample(x, 4).square().sum(), x)[0] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)

    assert torch.equal(first, second)


def test_phases_keep_the_channels_last():
    x = torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = by_phases(x, 2)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert by_phases(x.detach().contiguous(), 2).is_contiguous()
