"""The whole three-task network trains a step with every family of encoders, and with every pyramid and decoder."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from contract import SPACE, check_prediction, found, sample, total
from torch import nn

from visionmtl.balance.base import Step
from visionmtl.balance.upgrad import UPGrad
from visionmtl.modeling.decoders.base import Decoder
from visionmtl.modeling.decoders.semantic_fpn import SemanticFPN
from visionmtl.modeling.encoder import Encoder
from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.pyramids.base import Pyramid
from visionmtl.modeling.pyramids.fpn import FPN
from visionmtl.modeling.pyramids.simple import Simple
from visionmtl.network import LossNet, Model, build_model
from visionmtl.ops.ranks import step_totals
from visionmtl.structures import ImageMeta
from visionmtl.tasks.base import Task
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.segmentation import Segmentation

SIZE = (64, 128)
ORIGINAL = (90, 180)
FAMILIES = {  # kinds of maps: plain, NHWC, many per stride, of one stride, of one input size
    "test_resnet": {},
    "test_nfnet": {},
    "test_mambaout": {},
    "hrnet_w18_small": {},
    "test_maxvit": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
    "vit_small_patch14_dinov2": {"depth": 2},
    "beit_base_patch16_224": {"depth": 1},
}
VITS = ("vit", "beit")


def first_weight(module: nn.Module) -> nn.Parameter:
    return next(m.weight for m in module.modules() if isinstance(m, nn.Conv2d))


def three_tasks(decoder: Decoder) -> dict[str, Task]:
    return {
        "detection": Detection(head=Aligned(levels=(3, 4, 5), num_convs=1)),
        "segmentation": Segmentation(decoder=decoder),
        "depth": Depth(decoder=decoder),
    }


def check_step(model: Model, tasks: Mapping[str, Task]) -> None:
    """A step under the method that needs most of the graph, with a label missing; then predictions."""
    torch.manual_seed(0)
    spaces = {name: None if task.field == "depth_m" else SPACE for name, task in tasks.items()}
    net = build_model(model, tasks, spaces, SIZE)
    samples: dict[str, list[Any]] = {name: [sample(0, size=SIZE), sample(1, size=SIZE)] for name in tasks}
    samples["depth"][1] = None
    targets = {name: task.collate(samples[name], SIZE) for name, task in tasks.items()}
    labelled = {name: torch.tensor([one is not None for one in samples[name]]) for name in tasks}
    image = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)

    totals = step_totals([{name: task.count(targets[name], SIZE) for name, task in tasks.items()}])
    parts, shared, leaves = LossNet(net, cut=True)(image, targets, labelled, totals)
    losses = {name: total(of_task) for name, of_task in parts.items()}
    UPGrad().build(dict.fromkeys(tasks, 1.0)).backward(Step(losses, shared, leaves))

    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    missing = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert all(name.startswith("trunk.encoder.") for name in missing), missing
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    assert first_weight(net.encoder).grad.any()  # type: ignore[union-attr]

    with torch.inference_mode():
        raw = net.eval()(image)
        for name, task in tasks.items():
            for prediction in task.predict(raw[name], [ImageMeta(ORIGINAL, SIZE)] * 2, SIZE):
                check_prediction(prediction, ORIGINAL)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_network_trains_a_step_with_this_family(name: str):
    pyramid = (Simple if name.removeprefix("test_").startswith(VITS) else FPN)(channels=16)
    encoder = Encoder(name=name, options=FAMILIES[name])
    check_step(Model(encoder=encoder, pyramid=pyramid), three_tasks(SemanticFPN(channels=16)))


@pytest.mark.parametrize("member", found(Pyramid))
def test_the_network_trains_a_step_with_this_pyramid(member: type[Pyramid]):
    encoder = Encoder(name="test_vit" if member is Simple else "test_resnet")
    check_step(Model(encoder=encoder, pyramid=member(channels=16)), three_tasks(SemanticFPN(channels=16)))


@pytest.mark.parametrize("member", found(Decoder))
def test_the_network_trains_a_step_with_this_decoder(member: type[Decoder]):
    model = Model(encoder=Encoder(name="test_resnet"), pyramid=FPN(channels=16))
    check_step(model, three_tasks(member(channels=16)))
