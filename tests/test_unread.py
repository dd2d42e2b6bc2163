"""Parameters that no output depends on are frozen, and looking for them leaves no trace."""

import re

import tiny
import torch
from torch import Tensor, nn

from visionmtl.modeling.unused_parameters import freeze_unused_parameters

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
    assert tiny.differences(dict(net.named_buffers()), before) == []
    assert not net.training and all(p.grad is None for p in net.parameters())


def test_an_encoder_that_computes_more_than_is_read_trains_what_is_read():
    decoder = {"levels": [3]}  # HRNet computes all its maps to the end, whichever are read
    run = tiny.run(
        names=("depth",), model={"encoder": {"name": "hrnet_w18_small"}}, tasks={"depth": {"decoder": decoder}}
    )
    state = tiny.state(run)
    (news,) = state.news

    state.advance(tiny.batches(run)[:1])

    assert re.fullmatch(r"frozen    \d+ parameters that no output depends on, from trunk.encoder.body\S+ on", news)
    known = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    frozen, learning = ([p for p in state.net.parameters() if p.requires_grad == yes] for yes in (False, True))
    assert frozen and not known & {id(p) for p in frozen}
    assert all(state.optimizer.state[p] for p in learning), "each of them got a gradient"
