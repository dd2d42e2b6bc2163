"""Layers that are computed otherwise than by torch or timm: the same numbers, the same names, whole copies."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from visionmtl.modeling.faster import quicken
from visionmtl.ops.precision import autocast

CPU = torch.device("cpu")


def gradients(net: nn.Module, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The maps of an encoder in training mode and the gradients of weights under a random weighing of all of them."""
    net.train()
    maps = net(image)
    torch.manual_seed(1)
    sum((each * torch.randn_like(each)).sum() for each in maps).backward()
    return [each.detach() for each in maps], [p.grad for p in net.parameters() if p.ndim > 1]


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_mobilenetv3_small_075", "resnet18"])
def test_an_encoder_computes_and_learns_the_same(name: str):
    torch.manual_seed(0)
    plain = timm.create_model(name, features_only=True).to(memory_format=torch.channels_last)
    net = copy.deepcopy(plain)
    quicken(net)
    quicken(net)  # once is enough
    assert {type(a) is type(b) for a, b in zip(net.modules(), plain.modules(), strict=True)} == {True, False}
    net = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert net.state_dict().keys() == plain.state_dict().keys()
    image = torch.randn(2, 3, 65, 96).to(memory_format=torch.channels_last)  # odd: padded by 1 and by 2

    ours, want = gradients(net, image), gradients(plain, image)

    torch.testing.assert_close(ours[0], want[0], rtol=1e-4, atol=1e-4)
    for one, other in zip(ours[1], want[1], strict=True):
        assert float((one - other).norm()) <= 1e-4 * float(other.norm())
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(image), plain.eval()(image), rtol=1e-4, atol=1e-4)


def test_relu6_keeps_its_result_alone_and_has_torchs_gradient():
    values = torch.tensor([-1.0, 0.0, 0.5, 6.0, 7.0, torch.nan])
    net, kept = nn.Sequential(nn.ReLU6(inplace=True)), []
    quicken(net)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        y = net(doubled := ours * 2)
    want = nn.functional.relu6(theirs * 2)

    assert torch.equal(y.nan_to_num(9), want.nan_to_num(9)) and y.data_ptr() == doubled.data_ptr() == kept[0]
    assert len(kept) == 1, "what a convolution behind it keeps as well"
    y.backward(torch.arange(1.0, 7.0))
    want.backward(torch.arange(1.0, 7.0))
    assert torch.equal(ours.grad, theirs.grad)


def depthwise(kernel: int, stride: int) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, kernel, stride, kernel // 2, groups=8, bias=False))
    return net.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 1), (5, 2)])
def test_depthwise_convolutions_that_are_slow_in_bf16_train_in_float32(kernel, stride):
    net, plain = depthwise(kernel, stride), depthwise(kernel, stride)
    quicken(net)
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
    quicken(net)
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
    quicken(net)
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


def in_bfloat16_and_float32(plain: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """The quickened copy, its input in bfloat16 autocast and that of `plain` in float32, and the result of each."""
    net = copy.deepcopy(plain)
    quicken(net)
    x = x.to(torch.bfloat16, memory_format=torch.channels_last)
    ours, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
    with autocast(CPU, "bf16"):
        y = net(ours)
    return net, ours, theirs, y, plain(theirs)


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "is_product"),
    [(1, 1, (8, 8), 1), (1, 1, (32, 33), 0), (1, 2, (3, 3), 1), (3, 1, (2, 3), 1), (3, 2, (32, 33), 0)],
)
def test_in_bfloat16_as_well_with_float32_gradients_of_the_weights(kernel, stride, size, is_product):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(128, 256, kernel, stride, kernel // 2)).to(memory_format=torch.channels_last)
    plain[0].weight.data = plain[0].weight.bfloat16().float()
    net, ours, theirs, y, want = in_bfloat16_and_float32(plain, torch.randn(1, 128, *size))

    assert (y.grad_fn.name() != "ConvolutionBackward0") == is_product
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.float(), want, rtol=2**-7, atol=2**-7)
    weighing = torch.randn_like(want).bfloat16()
    y.backward(weighing)
    want.backward(weighing.float())
    assert net[0].weight.grad.dtype == torch.float32
    for one, other in [(ours.grad, theirs.grad), (net[0].weight.grad, plain[0].weight.grad)]:
        assert float((one.float() - other).norm()) <= 0.01 * float(other.norm())


@pytest.mark.parametrize("size", [(9, 8), (7, 7)])
def test_tensorflows_padding_of_a_convolution_that_trains_in_float32(size):
    torch.manual_seed(0)
    plain = nn.Sequential(Conv2dSame(8, 8, 3, 2, groups=8)).to(memory_format=torch.channels_last)
    net, ours, theirs, y, want = in_bfloat16_and_float32(plain, torch.randn(2, 8, *size))

    assert torch.equal(y, want.bfloat16())
    y.float().square().sum().backward()
    want.bfloat16().float().square().sum().backward()
    assert ours.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.grad, theirs.grad.bfloat16())
    torch.testing.assert_close(net[0].weight.grad, plain[0].weight.grad)


def test_an_input_that_a_convolution_has_no_pixel_for_is_torchs_error():
    net = nn.Sequential(nn.Conv2d(128, 256, 5)).to(memory_format=torch.channels_last)
    quicken(net)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        net(torch.ones(1, 128, 3, 3).to(memory_format=torch.channels_last))
