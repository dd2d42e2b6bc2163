"""One member of every timm module trains a step through a pyramid and a decoder, or is refused by an error of ours."""

import pytest
import timm
import torch
from torch import Tensor, nn

from visionmtl.modeling.decoders.semantic_fpn import SemanticFPN
from visionmtl.modeling.encoder import Encoder
from visionmtl.modeling.pyramids.fpn import FPN
from visionmtl.modeling.pyramids.simple import Simple
from visionmtl.modeling.unused_parameters import freeze_unused_parameters

SIZE = (64, 128)  # not square, and the smallest that every stride divides
SMALLEST = """
    beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
    test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
    deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
    test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0
    fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224
    sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
    lcnetv2_small levit_128s lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224
    mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge
    nest_tiny nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002
    repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18
    sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small
    vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224
    volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
""".split()
ONE_BLOCK = ("beit_base_patch16_224", "cait_xxs24_224", "naflexvit_base_patch16_parfac_gap", "qwen3_vit_88m",
             "samvit_base_patch16_224")  # fmt: skip
SHALLOW = {  # large models made small
    **{name: {"depth": 1} for name in ONE_BLOCK},
    "deepseek_vit_412m": {"depth": 1, "embed_dim": 128},
    "gemma4_vit_167m": {"depth": 1, "embed_dim": 128},
    "hiera_tiny_224": {"embed_dim": 24},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192), "num_heads": (1, 2, 4, 8)},
    "swinv2_tiny_window16_256": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
}
REFUSED = {  # module -> what the error says
    **dict.fromkeys(("inception_resnet_v2", "inception_v3", "inception_v4"), "at 64x128 px: .*Kernel size"),
    **dict.fromkeys(("pit", "xception"), "does not keep its strides: from 64x128 px its map of level . is"),
    **dict.fromkeys(
        ("byoanet", "convit", "efficientformer"), "fails at 64x128 px: .*; allowed are sizes that this model"
    ),
    **dict.fromkeys(("mvitv2", "nest"), "cannot be built with .*for some a square data.size only"),
    **dict.fromkeys(("crossvit", "sequencer"), "has strides .*; allowed are powers of two, or one stride"),
}


def module_of(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


KNOWN = {module_of(name): name for name in SMALLEST if timm.is_model(name)}
MEMBERS = {module: KNOWN.get(module, timm.list_models(module=module)[0]) for module in timm.list_modules()}


class _Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = Encoder(name=name, options=SHALLOW.get(name, {})).build(SIZE)
        channels = self.encoder.channels
        if len(channels) == 1:
            levels = (2, 3, 4, 5)
            self.pyramid = Simple(channels=8).build(channels, levels)
        else:
            levels = tuple(range(max(2, min(channels)), 6))
            self.pyramid = FPN(channels=8).build(channels, levels)
        self.decoder = SemanticFPN(levels=levels, channels=8).build(8)

    def forward(self, image: Tensor) -> Tensor:
        answer: Tensor = self.decoder(self.pyramid(self.encoder(image / 255)))
        return answer


@pytest.mark.parametrize("module", MEMBERS)
@pytest.mark.slow
def test_a_member_of_this_module_trains_a_step_or_is_refused(module: str):
    torch.manual_seed(0)
    if module in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[module]):
            freeze_unused_parameters(_Net(MEMBERS[module]), SIZE, torch.device("cpu"))
        return

    net = _Net(MEMBERS[module]).train()
    freeze_unused_parameters(net, SIZE, torch.device("cpu"))
    answer = net(torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8))
    (answer - 1).square().mean().backward()

    assert answer.shape == (2, 8, SIZE[0] // 4, SIZE[1] // 4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    assert next(p for p in net.encoder.parameters() if p.requires_grad).grad.any()
    assert net.encoder.origin == "random"
    assert all(0 <= x <= 1 for x in net.encoder.mean)
    assert all(0 < x <= 1 for x in net.encoder.std)


@pytest.mark.parametrize("name", ["convit_tiny", "nest_tiny"])
def test_a_model_for_squares_takes_squares(name: str):
    encoder = Encoder(name=name).build((64, 64))
    assert encoder(torch.zeros(1, 3, 64, 64))[encoder.levels[-1]].shape[-2:] == (4, 4)


def test_an_encoder_that_rounds_a_map_is_refused_where_it_does():
    encoder = Encoder(name="inception_v3").build()
    with pytest.raises(ValueError, match=r"inception_v3 does not keep its strides: from 160x96 px .* level 2 is 36x20"):
        encoder(torch.zeros(1, 3, 160, 96))
