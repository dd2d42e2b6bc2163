"""Every pyramid on disk gives equal channels at every wanted level, and says so when it cannot."""

import pytest
import torch

from visionmtl.modeling.pyramids.base import Pyramid, fitting_width
from visionmtl.modeling.pyramids.bifpn import BiFPN
from visionmtl.modeling.pyramids.fpn import FPN
from visionmtl.modeling.pyramids.pafpn import PAFPN
from visionmtl.modeling.pyramids.simple import Simple

CHANNELS = {1: 4, 2: 6, 3: 8, 4: 10, 5: 12}
MEMBERS = sorted(Pyramid.members())


def drawn(channels: dict[int, int], size: tuple[int, int] = (128, 256)) -> dict[int, torch.Tensor]:
    torch.manual_seed(0)
    return {k: torch.randn(2, c, size[0] >> k, size[1] >> k) for k, c in channels.items()}


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("levels", [(2, 3, 4, 5), (3, 4, 5, 6, 7), (2, 3, 4, 5, 6, 7), (3, 4)])
@pytest.mark.parametrize("member", MEMBERS)
def test_pyramid_gives_every_level_and_teaches_every_weight(member: str, levels, separable: bool, norm: str):
    channels = {4: 12} if member == "simple" else CHANNELS
    pyramid = Pyramid.find(member)(channels=8, norm=norm, separable=separable).build(channels, levels)

    answer = pyramid(drawn(channels))
    sum((m - 1).square().mean() for m in answer.values()).backward()

    assert pyramid.out_channels == 8 and tuple(answer) == levels
    assert {k: tuple(m.shape) for k, m in answer.items()} == {k: (2, 8, 128 >> k, 256 >> k) for k in levels}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pyramid.parameters())


@pytest.mark.parametrize(
    ("channels", "width"),
    [
        ({1: 64, 2: 256, 3: 512, 4: 1024, 5: 2048}, 256),  # ResNet-50
        ({2: 64, 3: 128, 4: 256, 5: 512}, 256),  # ResNet-18
        ({1: 16, 2: 24, 3: 40, 4: 112, 5: 960}, 128),  # MobileNetV3-Large: the last map is no measure
        ({1: 16, 2: 24, 3: 32, 4: 96}, 96),  # MobileNetV2 where nobody reads level 5
        ({2: 24, 3: 40}, 64),  # no map of stride 16
        ({5: 70}, 96),  # nor anything finer
    ],
)
def test_a_pyramid_is_no_wider_than_its_encoder_at_stride_16(channels: dict[int, int], width: int):
    assert fitting_width(channels) == width


@pytest.mark.parametrize("member", [m for m in MEMBERS if Pyramid.find(m)().channels is None])
def test_the_width_that_nobody_sets_comes_from_the_encoder(member: str):
    channels = {4: 40} if member == "simple" else {3: 20, 4: 40, 5: 80}
    pyramid = Pyramid.find(member)().build(channels, (3, 4, 5))

    assert pyramid.out_channels == 64
    assert {m.shape[1] for m in pyramid(drawn(channels)).values()} == {64}


@pytest.mark.parametrize("member", MEMBERS)
def test_levels_beyond_32_are_rounded_up_where_the_image_is_no_multiple(member: str):
    channels = {4: 12} if member == "simple" else CHANNELS
    pyramid = Pyramid.find(member)(channels=8).build(channels, (3, 4, 5, 6, 7))
    sizes = {level: tuple(m.shape[2:]) for level, m in pyramid(drawn(channels, (480, 672))).items()}
    assert sizes == {3: (60, 84), 4: (30, 42), 5: (15, 21), 6: (8, 11), 7: (4, 6)}


def test_fpn_adds_the_coarse_map_to_the_fine_one():
    pyramid = FPN(channels=1, smooth_from=3).build({3: 1, 4: 1}, (3, 4)).eval()
    for block in [*pyramid.lateral, *pyramid.smooth]:
        block[1] = torch.nn.Identity()
        torch.nn.init.zeros_(block[0].weight)
        block[0].weight.data[..., block[0].kernel_size[0] // 2, block[0].kernel_size[1] // 2] = 1

    answer = pyramid({3: torch.ones(1, 1, 2, 2), 4: torch.full((1, 1, 1, 1), 5.0)})

    assert answer[3].flatten().tolist() == [6.0] * 4 and answer[4].item() == 5


@pytest.mark.parametrize("kind", [FPN, PAFPN])
def test_a_fine_cell_feels_the_coarsest_map(kind: type[Pyramid]):
    pyramid = kind(channels=8, norm="group").build(CHANNELS, (2, 3, 4, 5))
    maps = drawn(CHANNELS)
    maps[5].requires_grad_()

    pyramid(maps)[2].square().mean().backward()

    assert maps[5].grad.abs().sum() > 0


def test_bifpn_weights_start_equal_and_stay_normalised():
    pyramid = BiFPN(channels=8, num_layers=2).build(CHANNELS, (3, 4, 5))
    fuse = pyramid.layers[0].coarsest
    fuse.out = torch.nn.Identity()
    ones = torch.ones(1, 8, 2, 2)

    torch.testing.assert_close(fuse([ones, 3 * ones]), torch.nn.functional.silu(2 * ones), atol=1e-3, rtol=0)
    assert len(pyramid.layers) == 2


def test_wrong_company_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"level 4 only.*type: simple"):
        FPN().build({4: 384}, (2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"encoder gives levels \(1, 2, 3, 4, 5\).*type: fpn"):
        Simple().build(CHANNELS, (3, 4))
    with pytest.raises(ValueError, match="only coarser levels can be added"):
        PAFPN().build({3: 8, 4: 8}, (2, 3, 4))
    with pytest.raises(ValueError, match="a run without gaps"):
        FPN().build(CHANNELS, (2, 4))
    with pytest.raises(ValueError, match="allowed are two or more"):
        BiFPN().build(CHANNELS, (3,))


def test_an_encoder_that_ends_early_gets_coarser_levels():
    answer = FPN(channels=8).build({2: 4, 3: 4, 4: 4}, (3, 4, 5, 6))(drawn({2: 4, 3: 4, 4: 4}))

    assert answer[6].shape == (2, 8, 2, 4)


def test_fine_levels_are_smoothed_only_when_asked():
    def weights(**settings: int) -> int:
        return sum(p.numel() for p in FPN(channels=8, **settings).build(CHANNELS, (2, 3, 4)).parameters())

    one = 8 * 8 * 9 + 2 * 8  # a 3x3 convolution and its norm
    assert [weights(smooth_from=level) - weights() for level in (2, 3, 4, 5)] == [2 * one, one, 0, -one]
