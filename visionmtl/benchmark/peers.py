"""Single-task networks that people train instead of a joint one: torchvision's FCOS and RetinaNet, and FPNs of smp."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS, RetinaNet, fcos_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from visionmtl.benchmark.measure import Work
from visionmtl.benchmark.workload import SPACES, Workload
from visionmtl.structures import IGNORE, Sample

THREE = ("torchvision FCOS", "smp FPN, segmentation", "smp FPN, depth")
"""Those that a joint network is compared with together; RetinaNet is another choice for the first."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def peers(workload: Workload, samples: Sequence[Sample], compiled: bool = False) -> dict[str, Callable[[], Work]]:
    """By name, what builds a whole training step of each: copy to the device, forward, loss, backward, AdamW.

    The images and labels are those of the joint net. What a user might do without is left out in their favour: no
    clipping, no moving average, no colour jitter, and torchvision does not resize images that have the right size.
    compiled: without the detectors, whose targets of varying number make a graph of every few operations.
    """
    detectors: dict[str, Callable[[], Work]] = {
        "torchvision FCOS": partial(_detector, workload, samples, fcos_resnet50_fpn, FCOS),
        "torchvision RetinaNet": partial(_detector, workload, samples, retinanet_resnet50_fpn, RetinaNet),
    }
    return {
        **({} if compiled else detectors),
        "smp FPN, segmentation": partial(_dense, workload, samples, _segmentation_loss, "segmentation", compiled),
        "smp FPN, depth": partial(_dense, workload, samples, _depth_loss, "depth_m", compiled),
    }


class _Pyramid(nn.Module):
    """A timm encoder under torchvision's FPN, levels 3 to 7, as torchvision's one-stage detectors take it."""

    out_channels = 256

    def __init__(self, name: str) -> None:
        super().__init__()
        body: Any = timm.create_model(name, features_only=True, out_indices=(2, 3, 4))
        self.body: nn.Module = body
        channels = body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels, LastLevelP6P7(channels[-1], self.out_channels))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(i), one) for i, one in enumerate(self.body(x))))
        return maps


def _detector(
    workload: Workload, samples: Sequence[Sample], of_resnet50: Callable[..., nn.Module], of_any: type[nn.Module]
) -> Work:
    space, (low, high) = SPACES["detection"], sorted(workload.size)
    assert space is not None
    settings: dict[str, Any] = {"min_size": low, "max_size": high, "num_classes": len(space.classes)}
    if workload.encoder == "resnet50":
        net = of_resnet50(weights=None, weights_backbone=None, _skip_resize=True, **settings)
    else:
        net = of_any(_Pyramid(workload.encoder), _skip_resize=True, **settings)
    boxes = [sample.boxes for sample in samples if sample.boxes is not None]
    assert len(boxes) == len(samples)
    targets = [
        {
            name: workload.pinned(torch.from_numpy(values))
            for name, values in (("boxes", one.xyxy), ("labels", one.labels))
        }
        for one in boxes
    ]
    net, step, image = _trained(workload, net, samples)
    device, autocast = workload.on, workload.autocast()

    def work() -> None:
        there = [{key: one.to(device, non_blocking=True) for key, one in target.items()} for target in targets]
        images = image.to(device, non_blocking=True) / 255
        with autocast():
            parts: dict[str, Tensor] = net(list(images), there)
        step(torch.stack(list(parts.values())).sum())

    return work


def _dense(
    workload: Workload, samples: Sequence[Sample], loss: Callable[[Tensor, Tensor], Tensor], field: str, compiled: bool
) -> Work:
    space = SPACES["segmentation"]
    assert space is not None
    known = workload.encoder in smp.encoders.get_encoder_names()
    encoder = workload.encoder if known else f"tu-{workload.encoder}"
    net = smp.FPN(encoder, encoder_weights=None, classes=len(space.classes) if field == "segmentation" else 1)
    target = workload.pinned(torch.stack([torch.from_numpy(getattr(sample, field)) for sample in samples]))
    net, step, image = _trained(workload, net, samples)
    device, autocast = workload.on, workload.autocast()
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def losses(images: Tensor, labels: Tensor) -> Tensor:
        images = ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        with autocast():
            raw = net(images)
        return loss(raw.float(), labels)

    run = torch.compile(losses) if compiled else losses
    return lambda: step(run(image.to(device, non_blocking=True), target.to(device, non_blocking=True)))


def _trained(
    workload: Workload, net: nn.Module, samples: Sequence[Sample]
) -> tuple[nn.Module, Callable[[Tensor], None], Tensor]:
    """The net on the device in training mode, what a loss does to it, and the uint8 images."""
    net = net.to(workload.on).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    image = torch.stack([torch.from_numpy(sample.image.transpose(2, 0, 1).copy()) for sample in samples])
    return net, step, workload.pinned(image)


def _segmentation_loss(logits: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(logits, classes.long(), ignore_index=IGNORE)


def _depth_loss(log_depth: Tensor, depth_m: Tensor) -> Tensor:
    """Mean absolute error of log depth where it was measured."""
    valid = depth_m > 0
    error = (log_depth[:, 0] - torch.where(valid, depth_m, 1.0).log()).abs()
    return torch.where(valid, error, 0.0).sum() / valid.sum().clamp(min=1)
