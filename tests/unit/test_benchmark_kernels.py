"""Kernels that a compiler would make of small graphs, with bytes and operations counted by hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional as F

from visionmtl.benchmark.kernels import CONVOLUTION, DEPTHWISE, POINTWISE, REDUCTION, Kernel, kernels_of


def kernels(function: Callable[..., Any], *inputs: Tensor, backward: bool = False) -> list[Kernel]:
    """Of the forward, or of the backward of the sum."""
    graphs: list[Any] = []

    def keep(module: Any, _inputs: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    out = torch.compile(function, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)(*inputs)
    if backward:
        out.sum().backward()
    return kernels_of(graphs[-1], {})


def test_pointwise_operators_between_products_are_one_kernel():
    x, weight = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
    first, second = kernels(lambda x, w: (F.conv2d(x, w, padding=1).relu() * 2 + 1).sigmoid(), x, weight)

    assert (first.kind, first.flops) == (CONVOLUTION, 2 * (2 * 4 * 8 * 8) * (3 * 3 * 3))
    assert first.bytes_moved() == 4 * (x.numel() + weight.numel() + 2 * 4 * 8 * 8)
    assert second.kind == POINTWISE and second.bytes_moved() == 2 * 4 * (2 * 4 * 8 * 8)


def test_a_reduction_and_what_reads_the_same_values_share_one_reading():
    x = torch.rand(64, 32)
    one, *others = kernels(lambda x: (x.exp().sum(dim=1), x * 2), x)
    assert not others and one.kind == REDUCTION
    assert one.bytes_moved() == 4 * (x.numel() + 64 + x.numel())


def test_what_needs_a_whole_reduction_comes_after_it_and_reads_again():
    x = torch.rand(64, 32)
    first, second = kernels(lambda x: x - x.sum(), x)
    assert first.bytes_moved() == 4 * (x.numel() + 1)
    assert second.bytes_moved() == 4 * (x.numel() + 1 + x.numel())


def test_a_part_is_read_as_a_part_and_a_repetition_once():
    x, row = torch.rand(100, 8), torch.rand(8)
    (one,) = kernels(lambda x, row: x[:10] + row, x, row)
    assert one.bytes_moved() == 4 * (80 + 8 + 80)


def test_kernels_with_another_between_them_stay_apart():
    x, weight = torch.rand(8, 8), torch.rand(8, 8)
    found = kernels(lambda x, w: (y := x + 1) + (y @ w).relu(), x, weight)
    assert [kernel.kind for kernel in found] == [POINTWISE, "matrix products", POINTWISE]


def test_the_backward_of_a_convolution_is_two_kernels():
    x, weight = torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(4, 3, 3, 3, requires_grad=True)
    found = [k for k in kernels(lambda x, w: F.conv2d(x, w, padding=1), x, weight, backward=True) if k.flops]
    forward = 2 * (2 * 4 * 8 * 8) * (3 * 3 * 3)
    assert [kernel.flops for kernel in found] == [forward, forward]
    gradient = 2 * 4 * 8 * 8
    sizes = [4 * (gradient + weight.numel() + x.numel()), 4 * (gradient + x.numel() + weight.numel())]
    assert [kernel.bytes_moved() for kernel in found] == sizes


def test_depthwise_convolutions_are_told_apart():
    x, weight = torch.rand(1, 4, 8, 8), torch.rand(4, 1, 3, 3)
    (one,) = kernels(lambda x, w: F.conv2d(x, w, groups=4), x, weight)
    assert one.kind == DEPTHWISE and one.flops == 2 * (4 * 6 * 6) * 9
