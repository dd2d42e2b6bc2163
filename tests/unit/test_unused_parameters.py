"""Parameters that no output depends on are frozen, and looking for them leaves no trace."""

from typing import Any

import pytest
import scene_run
import torch
from torch import Tensor, nn

from visionmtl.modeling.unused_parameters import freeze_unused_parameters
from visionmtl.run import Run

CPU = torch.device("cpu")


class Net(nn.Module):
    """Reads two of its three layers; one of them only while training."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(3, 2, 1)
        self.norm = nn.BatchNorm2d(2)
        self.aside = nn.Conv2d(2, 2, 1)
        self.training_only = nn.Conv2d(2, 2, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, image: Tensor) -> dict[str, list[Tensor]]:
        x = self.drop(self.norm(self.read(image.float())))
        self.aside(x)
        return {"task": [x, self.training_only(x)] if self.training else [x]}


def test_what_no_output_depends_on_is_frozen_and_named():
    net = Net()

    assert freeze_unused_parameters(net, (8, 8), CPU) == ["aside.weight", "aside.bias"]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["aside.weight", "aside.bias"]


def test_looking_changes_neither_statistics_nor_random_numbers_nor_the_mode():
    net = Net().eval()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    freeze_unused_parameters(net, (8, 8), CPU)

    assert torch.equal(torch.rand(2), expected)
    assert scene_run.differences(dict(net.named_buffers()), before) == []
    assert not net.training and all(p.grad is None for p in net.parameters())


def test_an_encoder_that_computes_more_than_is_read_trains_what_is_read():
    decoder = {"levels": [3]}  # HRNet computes all its maps to the end, whichever are read
    run = scene_run.run(
        names=("depth",), model={"encoder": {"name": "hrnet_w18_small"}}, tasks={"depth": {"decoder": decoder}}
    )
    state = scene_run.state(run)

    state.train_step(scene_run.batches(run)[:1])

    assert state.unused and state.unused[0].startswith("trunk.encoder.body")
    known = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    frozen, learning = ([p for p in state.net.parameters() if p.requires_grad == yes] for yes in (False, True))
    assert frozen and not known & {id(p) for p in frozen}
    assert all(state.optimizer.state[p] for p in learning), "each of them got a gradient"


def of(encoder: str = "test_resnet", norm: str = "batch", **train: Any) -> Run:
    decoder = {"type": "upernet", "levels": [2, 3, 4, 5], "channels": 16, "norm": norm}
    model = {"encoder": {"name": encoder}}
    return scene_run.run(names=("depth",), model=model, tasks={"depth": {"decoder": decoder}}, train=train)


def test_one_value_a_channel_is_an_error_that_names_the_norm_and_the_batch_size():
    with pytest.raises(
        ValueError, match=r"decoders.depth.\S+ has one value a channel .*train.batch_size .* norm: group"
    ):
        scene_run.state(of(batch_size=1))


@pytest.mark.parametrize("settings", [{"batch_size": 2}, {"batch_size": 1, "norm": "group"}])
def test_what_passes_the_check_trains(settings: Any):
    run = of(**settings)
    state = scene_run.state(run)
    state.train_step(scene_run.batches(run)[:1])
    assert state.finite.read().skipped == 0


def test_group_norm_of_one_channel_on_one_cell_is_an_error():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 2, 1), nn.GroupNorm(2, 2))
    net.forward = lambda image: {"task": nn.Sequential.forward(net, image.float())}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="2 has one value a group to normalise"):
        freeze_unused_parameters(net, (8, 8), CPU)


def test_a_size_that_the_encoder_cannot_take_is_an_error_before_the_first_step():
    with pytest.raises(
        ValueError, match=r"encoder efficientformer_l1 fails at 64x64 px: .*change data.size, or choose"
    ):
        scene_run.state(of("efficientformer_l1"))
    smp = {"type": "smp", "arch": "pan", "channels": 8, "levels": [2, 3, 4, 5]}
    sizes = {"size": (256, 256), "eval_size": (256, 128)}
    run = scene_run.run(names=("depth",), tasks={"depth": {"decoder": smp}}, data=sizes)
    with pytest.raises(ValueError, match=r"pan reads a map of 8x4 cells at level 5.*allowed are 8x8 and more"):
        scene_run.state(run)
