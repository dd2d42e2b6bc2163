"""Single-task networks that people train instead of a joint one: torchvision's FCOS, and two FPNs of smp."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS, fcos_resnet50_fpn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from visionmtl.benchmark.measure import Work
from visionmtl.benchmark.workload import Workload, backward_and_step
from visionmtl.datasets.coco import COCO80
from visionmtl.io.cityscapes import CITYSCAPES19
from visionmtl.structures import IGNORE, Batch

PEERS = ("torchvision FCOS", "smp FPN, segmentation", "smp FPN, depth")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def peers(workload: Workload, batch: Batch, compiled: bool = False) -> dict[str, Callable[[], Work]]:
    """By name, what builds a whole training step of each: copy to the device, forward, loss, backward, AdamW.

    batch: that of the joint net. In the peers' favour there is no clipping, no moving average, no colour jitter, and no
    resizing by torchvision. compiled: without the detector, whose varying number of targets breaks the graph every few
    operations.
    """
    makers: dict[str, Callable[[], Work]] = {} if compiled else {PEERS[0]: partial(_fcos, workload, batch)}
    for name, task in zip(PEERS[1:], ("segmentation", "depth"), strict=True):
        makers[name] = partial(_smp_fpn, workload, batch, task, compiled)
    return makers


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
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(i), features) for i, features in enumerate(self.body(x))))
        return maps


def _fcos(workload: Workload, batch: Batch) -> Work:
    low, high = sorted(workload.size)
    settings: dict[str, Any] = {
        "min_size": low, "max_size": high, "num_classes": len(COCO80.classes), "_skip_resize": True,
    }  # fmt: skip
    net: nn.Module
    if workload.encoder == "resnet50":
        net = fcos_resnet50_fpn(weights=None, weights_backbone=None, **settings)
    else:
        net = FCOS(_Pyramid(workload.encoder), **settings)
    truth = batch.targets["detection"]
    targets = [
        {key: truth[key][image, :count] for key in ("boxes", "labels")}
        for image, count in enumerate(truth["valid"].sum(dim=1).tolist())
    ]
    step, device, autocast = backward_and_step(net, workload.on), workload.on, workload.autocast()

    def work() -> None:
        on_device = [{key: x.to(device, non_blocking=True) for key, x in target.items()} for target in targets]
        images = batch.image.to(device, non_blocking=True) / 255
        with autocast():
            parts: dict[str, Tensor] = net(list(images), on_device)
        step(torch.stack(list(parts.values())).sum())

    return work


def _smp_fpn(workload: Workload, batch: Batch, task: str, compiled: bool) -> Work:
    known = workload.encoder in smp.encoders.get_encoder_names()
    encoder = workload.encoder if known else f"tu-{workload.encoder}"
    num_outputs = len(CITYSCAPES19.classes) if task == "segmentation" else 1
    net = smp.FPN(encoder, encoder_weights=None, classes=num_outputs)
    target = batch.targets[task]["classes" if task == "segmentation" else "depth_m"]
    step, device, autocast = backward_and_step(net, workload.on), workload.on, workload.autocast()
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        images = ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        with autocast():
            raw = net(images)
        if task == "segmentation":
            return F.cross_entropy(raw.float(), labels.long(), ignore_index=IGNORE)
        valid = labels > 0  # mean absolute error of log depth where it was measured
        error = (raw[:, 0].float() - torch.where(valid, labels, 1.0).log()).abs()
        return torch.where(valid, error, 0.0).sum() / valid.sum().clamp(min=1)

    run = torch.compile(loss) if compiled else loss
    return lambda: step(run(batch.image.to(device, non_blocking=True), target.to(device, non_blocking=True)))
