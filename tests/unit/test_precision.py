"""What a device computes in."""

import copy

import pytest
import torch
from torch import nn

from visionmtl.modeling.layers import keep_convolutions_fast
from visionmtl.ops.precision import autocast, chosen_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("has_amx", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_half_precision_where_the_processor_has_units_for_it(monkeypatch, has_amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    a = torch.ones(2, 2)
    with autocast(CPU, "auto"):
        assert (a @ a).dtype == dtype


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("has_amx", [True, False])
def test_a_precision_that_is_named_is_kept(monkeypatch, name, has_amx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert chosen_precision(CPU, name) == name


@pytest.mark.parametrize(("supported", "name"), [(True, "bf16"), (False, "fp32")])
def test_auto_asks_the_gpu_whether_it_computes_in_bf16_itself(monkeypatch, supported, name):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or supported)
    assert chosen_precision(torch.device("cuda"), "auto") == name
    assert asked == [{"including_emulation": False}]


def depthwise(kernel: int, stride: int) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, kernel, stride, kernel // 2, groups=8, bias=False))
    return net.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 1), (5, 2)])
def test_depthwise_convolutions_that_are_slow_in_bf16_train_in_float32(kernel, stride):
    net, plain = depthwise(kernel, stride), depthwise(kernel, stride)
    keep_convolutions_fast(net)
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(copy.deepcopy(net)[0], type(net[0]))
    x = torch.randn(2, 8, 9, 9).bfloat16()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with autocast(CPU, "bf16"):
        y = net(ours)
    want = plain(theirs.float())  # all of it in float32
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want.bfloat16())
    y.float().square().sum().backward()
    want.bfloat16().float().square().sum().backward()
    torch.testing.assert_close(net[0].weight.grad, plain[0].weight.grad)
    torch.testing.assert_close(ours.grad, theirs.grad)

    with autocast(CPU, "bf16"), torch.no_grad():  # forward alone is fast in bf16
        assert torch.equal(net(x), plain(x))
    with torch.no_grad():
        assert torch.equal(net(x.float()), plain(x.float()))


def test_other_convolutions_stay_what_they_are():
    others = [nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, dilation=2)]
    net = nn.Sequential(depthwise(3, 1), *others, nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"))
    before = [type(module) for module in net.modules()]
    keep_convolutions_fast(net)
    assert [type(module) for module in net.modules()] == before


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size", "is_product"),
    [
        (1, 1, 0, (2, 2), True),
        (1, 1, 0, (32, 33), False),
        (1, 2, 0, (2, 1), True),
        (3, 1, 1, (2, 3), True),
        (3, 2, 1, (3, 2), True),
        ((3, 1), (2, 1), (0, 1), (5, 1), True),
        (3, 1, 1, (9, 9), False),
    ],
)
def test_a_convolution_of_many_weights_and_few_pixels_is_a_matrix_product(
    monkeypatch, bias, kernel, stride, padding, size, is_product
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(128, 256, kernel, stride, padding, bias=bias)).to(memory_format=torch.channels_last)
    net = copy.deepcopy(plain)
    keep_convolutions_fast(net)
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(copy.deepcopy(net)[0], type(net[0]))
    x = torch.randn(1, 128, *size).to(memory_format=torch.channels_last)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    y, want = net(ours), plain(theirs)

    assert (y.grad_fn.name() != "ConvolutionBackward0") == is_product
    torch.testing.assert_close(y, want)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net[0].weight.grad, plain[0].weight.grad, rtol=1e-4, atol=1e-4)
    with autocast(CPU, "bf16"):
        assert net(x).dtype == torch.bfloat16
    torch.testing.assert_close(net(x.contiguous()), want)
    with torch.no_grad():
        torch.testing.assert_close(net(x), want)


def test_an_input_that_a_convolution_has_no_pixel_for_is_torchs_error():
    net = nn.Sequential(nn.Conv2d(128, 256, 5)).to(memory_format=torch.channels_last)
    keep_convolutions_fast(net)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        net(torch.ones(1, 128, 3, 3).to(memory_format=torch.channels_last))
