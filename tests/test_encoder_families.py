"""Every family of timm encoders trains a step through a pyramid and a decoder, at exact sizes."""

import pytest
import torch
from torch import nn

from visionmtl.modeling.decoders.semantic_fpn import SemanticFPN
from visionmtl.modeling.encoder import Encoder
from visionmtl.modeling.pyramids.fpn import FPN
from visionmtl.modeling.pyramids.simple import Simple

FAMILIES = {
    "test_resnet": {},
    "resnext26ts": {},
    "test_efficientnet": {},
    "mobilenetv3_small_050": {},
    "regnetx_002": {},
    "test_convnext": {},
    "test_nfnet": {},
    "test_mambaout": {},  # NHWC
    "vgg11": {},
    "dla34": {},
    "hrnet_w18_small": {},
    "pvt_v2_b0": {},
    "test_maxvit": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
    "swinv2_tiny_window8_256": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
    "swinv2_cr_tiny_224": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
    "test_vit": {},
    "vit_tiny_patch16_224": {"depth": 2},
    "vit_small_patch14_dinov2": {"depth": 2},
    "vit_small_patch16_dinov3": {"depth": 2},
    "beit_base_patch16_224": {"depth": 1},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_trains_a_step_at_exact_sizes(name: str):
    torch.manual_seed(0)
    size = (64, 128)
    encoder = Encoder(name=name, options=FAMILIES[name]).build(size)
    pyramid = (Simple if len(encoder.channels) == 1 else FPN)(channels=8).build(encoder.channels, (2, 3, 4, 5, 6))
    decoder = SemanticFPN(channels=8).build(8)

    maps = encoder(torch.randn(2, 3, *size))
    levels = pyramid(maps)
    answer = decoder(levels)
    ((answer - 1) ** 2).mean().backward()

    assert {k: m.shape[1:] for k, m in maps.items()} == {
        k: (encoder.channels[k], size[0] >> k, size[1] >> k) for k in encoder.levels
    }
    assert {k: m.shape[1:] for k, m in levels.items()} == {k: (8, size[0] >> k, size[1] >> k) for k in range(2, 7)}
    assert answer.shape == (2, 8, 16, 32)
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and first_weight(encoder).grad.abs().sum() > 0
    assert encoder.origin == "random" and all(0 < x < 1 for x in encoder.mean + encoder.std)


def first_weight(module: nn.Module) -> nn.Parameter:
    return next(m.weight for m in module.modules() if isinstance(m, nn.Conv2d))
