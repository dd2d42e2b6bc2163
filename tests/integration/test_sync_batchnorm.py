"""BatchNorm over processes: two with unequal batches compute, learn and remember what one does with all images."""

from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import scene_run
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from visionmtl.engine import distributed
from visionmtl.modeling.layers import FrozenBatchNorm
from visionmtl.modeling.sync_batchnorm import SyncBatchNorm, synchronise
from visionmtl.ops.ranks import joint_sum, num_ranks, sum_over_ranks

SHARES = (slice(0, 1), slice(1, 4))
"""Of 4 images, one process has 1 and the other 3."""


GROUP = {
    "model": {"pyramid": {"norm": "group"}},
    "tasks": {"segmentation": {"decoder": {"norm": "group"}}, "depth": {"decoder": {"norm": "group"}}},
}


class Small(nn.Module):
    """Every kind of BatchNorm that is replaced, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.BatchNorm2d(3, momentum=None)
        self.with_activation = BatchNormAct2d(3, act_layer=nn.SiLU)
        self.asked_for = nn.SyncBatchNorm(3, affine=False)
        self.frozen = FrozenBatchNorm(3)
        self.mix = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.mix(self.asked_for(self.with_activation(self.plain(x)))))


def images() -> Tensor:
    return torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(1)) * 3 + 100  # E[x^2] - E[x]^2 would show


def passed(net: nn.Module, x: Tensor, divisor: float) -> dict[str, Tensor]:
    """Output, gradients and statistics after two passes."""
    x.requires_grad_()
    for _ in range(2):
        out = net(x)
    (out.square().sin().sum() / divisor).backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad, **dict(net.named_buffers())}
    return found | {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def one_of_two(groups: Iterator[None], folder: Path) -> None:
    next(groups)
    with distributed.group("cpu", timeout_s=200) as ranks:
        for compiled in (False, True):
            net = Small()
            synchronise(net, everywhere=True, with_torch=False)
            run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
            found = passed(run, images()[SHARES[ranks.rank]].clone(), divisor=1)
            for name, _ in net.named_parameters():
                key = f"_orig_mod.{name}" if compiled else name
                if key in found:
                    found[key] = sum_over_ranks(found[key])
            found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
            torch.save(found, folder / f"{ranks.rank}-{compiled}.pt")

        part = torch.tensor([1.0 + ranks.rank, 3.0], requires_grad=True)
        whole = joint_sum(part)
        whole.prod().backward()
        torch.save([whole.detach(), part.grad, num_ranks()], folder / f"joint-{ranks.rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("norms")
    processes.run(2, one_of_two, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_two_processes_normalise_as_one_does_over_all_images(two: Path, compiled: bool):
    alone = passed(Small(), images(), divisor=1)
    for rank, share in enumerate(SHARES):
        found = torch.load(two / f"{rank}-{compiled}.pt")

        assert found.keys() == alone.keys()
        for name, value in alone.items():
            expected = value[share] if name in ("out", "x") else value
            # values near 100 have a spacing of 1e-5; statistics are sums of 140 of them
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_a_sum_for_a_joint_loss_teaches_each_process_its_own_part(two: Path):
    for rank in (0, 1):
        whole, gradient, ranks = torch.load(two / f"joint-{rank}.pt")

        assert whole.tolist() == [3, 6] and ranks == 2
        assert gradient.tolist() == [2 * 6, 2 * 3], "the mean over two processes is the gradient of the product"


def test_alone_nothing_changes():
    net = Small()
    expected = passed(net, images(), 1)
    again = Small()
    synchronise(again, everywhere=True, with_torch=False)

    assert scene_run.differences(passed(again, images(), 1), expected) == []


def test_parameters_and_names_stay_and_what_is_frozen_is_left_alone():
    net = Small()
    before = dict(net.named_parameters())
    keys = list(net.state_dict())
    net.with_activation.eval()  # as in a frozen stage

    synchronise(net, everywhere=True, with_torch=False)

    assert isinstance(net.plain, SyncBatchNorm) and isinstance(net.asked_for, SyncBatchNorm)
    assert not isinstance(net.with_activation, SyncBatchNorm) and not isinstance(net.frozen, SyncBatchNorm)
    assert sorted(net.state_dict()) == sorted(keys)
    assert all(p is before[name] for name, p in net.named_parameters())


def test_what_was_asked_for_one_by_one_keeps_the_activation_that_timm_put_behind_it():
    net = nn.Sequential(convert_sync_batchnorm(BatchNormAct2d(3, act_layer=nn.SiLU)), nn.BatchNorm2d(3))

    synchronise(net, everywhere=False, with_torch=False)

    assert isinstance(net[0], SyncBatchNorm) and isinstance(net[0].act, nn.SiLU)
    assert type(net[1]) is nn.BatchNorm2d


def test_on_cuda_it_is_the_one_of_torch():
    net = Small()
    synchronise(net, everywhere=True, with_torch=True)

    assert all(isinstance(one, nn.SyncBatchNorm) for one in (net.plain, net.with_activation, net.asked_for))
    assert isinstance(net.with_activation.act, nn.SiLU) and not isinstance(net.frozen, nn.SyncBatchNorm)


def test_a_network_without_batchnorm_cannot_be_synchronised():
    run = scene_run.run(train={"sync_batchnorm": True}, **GROUP)

    with pytest.raises(ValueError, match=r"sync_batchnorm is set, but this network has no BatchNorm .*; remove"):
        scene_run.state(run)
