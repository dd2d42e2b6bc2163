"""Every dense decoder on disk answers at a quarter of the input size and trains all of its weights."""

from typing import get_args

import pytest
import scene_run
import torch
from pydantic import ValidationError

from visionmtl.modeling.decoders.base import Decoder
from visionmtl.modeling.decoders.semantic_fpn import SemanticFPN
from visionmtl.modeling.decoders.smp import Smp
from visionmtl.modeling.decoders.top_down import TopDown
from visionmtl.modeling.decoders.upernet import UPerNet
from visionmtl.structures import LabelSpace
from visionmtl.tasks.segmentation import Segmentation

ARCHS = get_args(Smp.model_fields["arch"].annotation)
MEMBERS = sorted(set(Decoder.members()) - {"smp"})


def drawn(levels: tuple[int, ...], size: tuple[int, int] = (64, 128)) -> dict[int, torch.Tensor]:
    torch.manual_seed(0)
    return {k: torch.randn(2, 8, size[0] >> k, size[1] >> k) for k in levels}


def check(decoder: Decoder, maps: dict[int, torch.Tensor], size: tuple[int, int]) -> None:
    module = decoder.build(8)
    answer = module(maps)
    (answer - 1).square().mean().backward()

    assert answer.shape == (2, module.out_channels, size[0] // 4, size[1] // 4)
    assert module.out_channels == decoder.channels and decoder.stride_level == decoder.levels[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("levels", [(2, 3, 4, 5), (3, 4, 5), (2, 3), (3,)])
@pytest.mark.parametrize("member", MEMBERS)
def test_decoder_answers_at_a_quarter(member: str, levels: tuple[int, ...], separable: bool, norm: str):
    decoder = Decoder.find(member)(levels=levels, channels=16, separable=separable, norm=norm)

    check(decoder, drawn((2, 3, 4, 5)), (64, 128))


def test_pooled_context_lets_every_cell_see_the_whole_image():
    maps = drawn((2, 3, 4, 5))
    check(SemanticFPN(channels=16, context="pooled", levels=(2, 3, 4, 5)), maps, (64, 128))

    torch.manual_seed(0)
    module = SemanticFPN(channels=16, norm="frozen", context="pooled").build(8).eval()
    changed = {**maps, 5: maps[5].clone()}
    changed[5][:, :, :, -1] += 5  # the right edge
    with torch.no_grad():
        moved = (module(changed) - module(maps)).abs().amax(dim=(0, 1, 2))
        plain = SemanticFPN(channels=16, norm="frozen").build(8).eval()
        near = (plain(changed) - plain(maps)).abs().amax(dim=(0, 1, 2))
    assert moved[0] > 0 and near[0] == 0


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_smp_decoder_that_is_accepted_trains_at_every_size(arch: str, norm: str):
    """Sizes are multiples of 32, or of the coarsest stride where that is finer, as the network demands them."""
    accepted = 0
    for levels in [tuple(range(first, last + 1)) for first in range(1, 7) for last in range(first, 7)]:
        try:
            decoder = Smp(arch=arch, levels=levels, channels=32, norm=norm)
        except ValidationError:
            continue
        accepted += 1
        step = 2 ** min(5, levels[-1])
        for size in ((step, 2 * step), (3 * step, step), (96, 160), (256, 288)):
            maps = {k: torch.randn(2, 32, -(-size[0] // 2**k), -(-size[1] // 2**k)) for k in levels}
            module = decoder.build(32)
            if arch == "pan" and min(size) < 256:
                with pytest.raises(ValueError, match=r"halves three times; allowed are 8x8 and more; make data.size"):
                    module(maps)
                continue
            answer = module(maps)
            (answer - 1).square().mean().backward()
            assert answer.shape == (2, decoder.channels, size[0] // 4, size[1] // 4)
            assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    refused = (arch == "fpn" and norm == "group") or (arch == "pan" and norm == "group")
    assert (accepted == 0) == refused


def test_semantic_fpn_narrows_a_wider_pyramid_before_its_large_convolutions():
    def inputs(**settings: object) -> list[tuple[int, int]]:
        """(input channels, kernel) of the convolutions that read level 2."""
        branch = SemanticFPN(levels=(2, 3), channels=8, **settings).build(16).branches[0]
        return [(m.in_channels, m.kernel_size[0]) for m in branch.modules() if isinstance(m, torch.nn.Conv2d)]

    assert inputs() == [(16, 1), (8, 3)]
    assert inputs(reduce=False) == [(16, 3)]
    assert inputs(separable=True) == [(16, 3), (16, 1)], "whose pointwise one narrows already"


def test_semantic_fpn_sums_what_its_levels_say():
    module = SemanticFPN(levels=(2, 3), channels=1).build(1).eval()
    for branch in module.branches:
        branch[0] = torch.nn.Identity()

    answer = module({2: torch.ones(1, 1, 2, 2), 3: torch.full((1, 1, 1, 1), 5.0)})

    assert answer.flatten().tolist() == [6.0] * 4


def test_top_down_adds_a_convolution_of_what_it_has_summed_level_by_level():
    module = TopDown(levels=(2, 3), channels=1, norm="frozen").build(1).eval()
    for block, factor in zip(module.blocks, (10.0, 2.0), strict=True):  # finest first
        torch.nn.init.dirac_(block[0].weight)  # no neighbours
        block[0].weight.data.mul_(factor)
        block[1] = torch.nn.Identity()  # of the norm

    answer = module({2: torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 3: torch.full((1, 1, 1, 1), 5.0)})

    # coarse: 5 + 2 * 5 = 15; fine: x + 10 * x of 15 and its own
    assert answer.tolist() == [[[[176.0, 187.0], [198.0, 209.0]]]]


def test_top_down_narrows_a_wider_pyramid_by_1x1_convolutions():
    def kernels(in_channels: int) -> list[tuple[int, int, int]]:
        module = TopDown(levels=(2, 3), channels=8).build(in_channels)
        convolutions = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
        return [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convolutions]

    assert kernels(8) == [(8, 8, 3)] * 2
    assert kernels(16) == [(16, 8, 1)] * 2 + [(8, 8, 3)] * 2


def test_a_global_change_reaches_every_cell_of_upernet():
    module = UPerNet(channels=32).build(8).eval()  # BatchNorm in training would carry news everywhere by itself
    maps = {k: m.requires_grad_() for k, m in drawn((2, 3, 4, 5)).items()}

    module(maps)[:, :, 0, 0].sum().backward()  # the corner sees the whole coarsest map through the bin of 1 x 1

    assert (maps[5].grad.abs().sum(1) > 0).all() and not (maps[2].grad.abs().sum(1) > 0).all()


def test_levels_and_options_that_cannot_be_read_are_refused():
    with pytest.raises(ValidationError, match="a run without gaps from level 2"):
        SemanticFPN(levels=(1, 2, 3))
    with pytest.raises(ValidationError, match="a run without gaps"):
        UPerNet(levels=(2, 4))
    with pytest.raises(ValidationError, match=r"deeplabv3plus was asked to read levels \(2, 3, 4, 5\).*\(2, 3, 4\)"):
        Smp(arch="deeplabv3plus")
    with pytest.raises(ValidationError, match="separable: true"):
        Smp(separable=True)
    with pytest.raises(ValidationError, match="multiples of 32"):
        Smp(arch="fpn", channels=48)
    with pytest.raises(ValidationError, match="dpt reads the tokens of a plain ViT, not a pyramid; allowed are unet, "):
        Smp(arch="dpt")
    with pytest.raises(ValidationError, match=r"unetplusplus was asked to read levels \(2, 3, 4, 5, 6\)"):
        Smp(arch="unetplusplus", levels=(2, 3, 4, 5, 6))  # a map of level 6 may be rounded up, which it cannot undo
    with pytest.raises(ValidationError, match="fpn has norm: group, but GroupNorm, which norm does not replace"):
        Smp(arch="fpn", channels=64, norm="group")
    with pytest.raises(ValidationError, match="pan has norm: group, but normalises maps of one channel"):
        Smp(arch="pan", norm="group")
    for use_norm in ("layernorm", "inplace", {"type": "layernorm"}):
        with pytest.raises(ValidationError, match="allowed are batchnorm, instancenorm and identity; set norm instead"):
            Smp(options={"use_norm": use_norm})
    with pytest.raises(ValidationError, match=r"options \['n_blocks'\]; these follow from levels and channels"):
        Smp(options={"n_blocks": 3})
    with pytest.raises(ValueError, match="one of norm and options"):
        Smp(norm="group", options={"use_norm": "instancenorm"}).build(16)
    with pytest.raises(ValueError, match="set channels: 16"):
        Smp(arch="linknet").build(16)
    with pytest.raises(ValueError, match="does not take these options"):
        Smp(options={"attention_type": "none_such"}).build(16)
    with pytest.raises(ValueError, match="does not take these options"):
        Smp(options={"attention": "scse"}).build(16)


def test_smp_options_reach_their_decoder():
    plain, attentive = Smp(channels=16).build(16), Smp(channels=16, options={"attention_type": "scse"}).build(16)

    assert sum(p.numel() for p in attentive.parameters()) > sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("bins", [(), (0,), (-1,), (2, 2)])
def test_bins_that_cannot_be_pooled_are_refused(bins):
    with pytest.raises(ValidationError):
        UPerNet(bins=bins)


def test_inputs_fit_the_coarsest_level_of_a_dense_decoder():
    decoder = {"type": "semantic_fpn", "levels": [2, 3, 4, 5, 6], "channels": 16}
    run = scene_run.run(names=["segmentation"], tasks={"segmentation": {"decoder": decoder}})
    with pytest.raises(ValueError, match="multiple"):
        scene_run.untrained(run.model_copy(update={"data": run.data.model_copy(update={"size": (96, 96)})}))
    net = scene_run.untrained(run.model_copy(update={"data": run.data.model_copy(update={"size": (64, 128)})}))
    assert net(torch.zeros(2, 3, 64, 128))["segmentation"].shape[-2:] == (16, 32)


def test_a_map_of_one_class_teaches_nothing():
    with pytest.raises(ValueError, match="has one class, 'floor', which every pixel would be"):
        Segmentation().build(8, LabelSpace("one", ("floor",), ((0, 0, 0),)))
