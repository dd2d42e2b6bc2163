"""Upsampling without atomics equals the library's, in value and in gradient."""

import pytest
import torch
from torch._decomp import core_aten_decompositions
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

from visionmtl.ops.resize import (
    _Upsample,
    average_bins,
    backward_by_products,
    double_nearest,
    resize,
    resize_small,
    upsample,
)


def value_and_gradient(function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    weight = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize("factor", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("size", [(5, 7), (1, 2)])
@pytest.mark.parametrize("function", [_Upsample.apply, upsample])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_upsample_equals_interpolate(factor: int, size: tuple[int, int], function, memory_format: torch.memory_format):
    x = torch.randn(2, 3, *size).contiguous(memory_format=memory_format)

    ours = value_and_gradient(lambda x: function(x, factor), x)
    theirs = value_and_gradient(lambda x: F.interpolate(x, scale_factor=factor, mode="bilinear"), x)

    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5 * factor**2, rtol=1e-5)  # a sum of factor^2 terms
    assert ours[1].stride() == theirs[1].stride()


def test_the_gradient_in_half_precision_stays_half_and_near():
    gradient = torch.rand(1, 2, 16, 16)

    ours = backward_by_products(gradient.bfloat16(), 4)

    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), backward_by_products(gradient, 4), rtol=0.02, atol=0)


def test_a_compiled_step_resizes_without_scattering(monkeypatch: pytest.MonkeyPatch):
    """What the compiler sees on a GPU has the values and gradients of the library's operators, and none of these."""
    x = torch.randn(2, 3, 5, 7)
    wanted = value_and_gradient(lambda x: F.interpolate(F.interpolate(x, scale_factor=2.0), scale_factor=2.0), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(value_and_gradient(lambda x: double_nearest(double_nearest(x)), x), wanted)

    seen = []

    def look(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    monkeypatch.undo()
    compiler = aot_autograd(fw_compiler=look, bw_compiler=look, decompositions=core_aten_decompositions())
    compiled = torch.compile(lambda x: _Upsample.apply(double_nearest(x), 4), backend=compiler, fullgraph=True)
    wanted = value_and_gradient(lambda x: upsample(double_nearest(x), 4), x)
    torch.testing.assert_close(value_and_gradient(compiled, x), wanted)
    assert seen and not any("index_put" in name or "scatter" in name for name in seen)


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
    first, second = (torch.autograd.grad(upsample(x, 4).square().sum(), x)[0] for _ in range(2))
    assert torch.equal(first, second)
