"""A run small enough for a test, with its batches: every part of a real step, on images of kit.SIZE."""

from collections.abc import Mapping, Sequence

import torch
from kit import SIZE, SPACE, sample
from torch import Tensor

from visionmtl.balance.base import Balance
from visionmtl.balance.fixed import Fixed
from visionmtl.data.loader import Data
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.trainer import Trainer
from visionmtl.modeling.decoders.semantic_fpn import SemanticFPN
from visionmtl.modeling.encoder import Encoder
from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.heads.base import Head
from visionmtl.modeling.pyramids.fpn import FPN
from visionmtl.network import LossNet, Model, MultiTaskNet, build_model
from visionmtl.ops.ranks import step_totals
from visionmtl.run import Optim, Run, Train
from visionmtl.structures import Batch, Sample
from visionmtl.tasks.base import Task
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.segmentation import Segmentation

NARROW = SemanticFPN(channels=16)
HEAD = Aligned(num_convs=1)
FIXED = Fixed()
MODEL = Model(encoder=Encoder(name="test_resnet"), pyramid=FPN(channels=32))


def small_tasks(head: Head = HEAD, **more: Task) -> dict[str, Task]:
    """Detection, segmentation and depth, each as small as it goes."""
    return {
        "boxes": Detection(head=head),
        "classes": Segmentation(decoder=NARROW, dropout=0),
        "depth": Depth(decoder=NARROW),
        **more,
    }


def small_run(
    tasks: Mapping[str, Task], balance: Balance = FIXED, optim: Mapping[str, object] | None = None, **settings: object
) -> Run:
    """optim: changes to the optimiser; settings: of the loop."""
    data = Data.model_validate({"train": [{"type": "scenes"}], "val": [{"type": "scenes"}], "size": SIZE})
    return Run(
        model=MODEL,
        tasks=dict(tasks),
        balance=balance,
        data=data,
        optim=Optim.model_validate({"clip_norm": 1.0, "ema_decay": 0.9, **(optim or {})}),
        train=Train.model_validate({"precision": "fp32", **settings}),
    )


def small_net(tasks: Mapping[str, Task]) -> MultiTaskNet:
    """The same weights at each call."""
    torch.manual_seed(0)
    return build_model(MODEL, tasks, dict.fromkeys(tasks, SPACE), SIZE)


def small_state(run: Run, device: str = "cpu") -> Trainer:
    """The run before its first step."""
    return Trainer(run, small_net(run.tasks).to(device), Ranks(0, 1, torch.device(device)))


def small_batch(tasks: Mapping[str, Task], num_boxes: int = 3) -> Batch:
    """Two labelled images and one without any label."""
    samples: Sequence[Sample | None] = [sample(0, num_boxes=num_boxes), sample(1, num_boxes=num_boxes), None]
    targets = {name: task.collate(samples, SIZE) for name, task in tasks.items()}
    return Batch(
        image=torch.randint(0, 256, (3, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        targets=targets,
        counts={name: task.count(targets[name], SIZE) for name, task in tasks.items()},
        labelled={name: torch.tensor([one is not None for one in samples]) for name in tasks},
        color=torch.eye(3, 4).repeat(3, 1, 1),
    )


def losses_of(loss_net: LossNet | torch.nn.Module, batch: Batch) -> dict[str, dict[str, Tensor]]:
    """By task and part; what `Trainer.train_step` asks for first."""
    parts, _, _ = loss_net(batch.image, batch.targets, batch.labelled, step_totals([batch.counts]))
    found: dict[str, dict[str, Tensor]] = parts
    return found
