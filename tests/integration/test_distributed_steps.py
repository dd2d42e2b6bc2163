"""Steps of two processes are those of one on all images: accumulated, synchronised, whatever each has labels for."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import processes
import pytest
import scene_run
import torch
from contract import found as on_disk
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from visionmtl.balance.base import Balance, GramianBalance, Step
from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.datasets import open_datasets
from visionmtl.engine import distributed
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.fsdp import full_weights
from visionmtl.engine.trainer import Trainer
from visionmtl.network import build_model
from visionmtl.ops.losses import dice, hardest, lovasz_softmax
from visionmtl.ops.ranks import step_totals
from visionmtl.run import Run
from visionmtl.structures import Batch

pytestmark = pytest.mark.slow

STEPS, ACCUMULATE = 3, 2
GROUP = {"norm": "group"}
UPGRAD = {"balance": {"type": "upgrad"}}
CASES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "uncertainty": {"balance": {"type": "uncertainty"}},
    "upgrad, weighted": {"balance": {"type": "upgrad", "heads": "weighted"}},
    "upgrad, parameters": {"balance": {"type": "upgrad", "level": "parameters"}},
    "famo": {"balance": {"type": "famo"}},
    "dice": {"tasks": {"segmentation": {"region_loss": "dice"}}},
    "frozen": {"model": {"encoder": {"name": "test_resnet", "norm": "frozen"}}},
    "batchnorm, upgrad": {"train": {"sync_batchnorm": True}} | UPGRAD,
    "sharded": {"train": {"distributed": {"shard": True}}},
    "sharded, weighted": {
        "balance": {"type": "upgrad", "heads": "weighted"},
        "train": {"distributed": {"shard": True}},
    },
}


def settings(case: str) -> Run:
    """Every BatchNorm synchronised or frozen, or none there."""
    norm = {"norm": "batch"} if "batchnorm" in case else GROUP
    parts = {
        "model": {"pyramid": norm},
        "tasks": {"segmentation": {"dropout": 0.0, "decoder": norm}, "depth": {"decoder": norm}},
        "data": {"train": [scene_run.scenes(24)]},
        "optim": {"name": "sgd", "lr": 0.02, "clip_norm": 10.0},
        "train": {"batch_size": 4, "accumulate": ACCUMULATE},
    }
    return scene_run.run(**scene_run.merged(parts, CASES[case]))


def common_batches(run: Run) -> list[Batch]:
    """Of the 4 images of each batch, the last two have no depth, and of the first two one has no boxes."""
    batches = scene_run.batches(run)
    for batch in batches:
        batch.labelled["depth"][2:] = False
        batch.targets["depth"]["depth_m"][2:] = 0
        batch.labelled["detection"][1] = False
        batch.targets["detection"]["valid"][1] = False
    return batches


def part(batch: Batch, share: slice) -> Batch:
    targets = {task: {name: value[share] for name, value in of.items()} for task, of in batch.targets.items()}
    labelled = {task: known[share] for task, known in batch.labelled.items()}
    size = tuple(batch.image.shape[2:])
    counts = {task: settings("fixed").tasks[task].count(of_task, size) for task, of_task in targets.items()}
    return Batch(batch.image[share], targets, labelled, counts)


def stepped(run: Run, ranks: Ranks, share: slice) -> tuple[Trainer, dict[str, Any]]:
    """The state after all steps, and what was seen on the way. A layer that nobody reads does no harm."""
    spaces = resolve_spaces(run.tasks, open_datasets(run.data.train))
    torch.manual_seed(run.seed)
    net = build_model(run.model, run.tasks, spaces, run.data.size)
    net.trunk.idle = nn.Linear(2, 2)
    state = Trainer(run, net, ranks)

    buckets: list[bool] = []

    def counted(_: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buckets.append(bucket.is_last())
        return allreduce_hook(None, bucket)

    if isinstance(state.loss_net, DistributedDataParallel):
        state.loss_net.register_comm_hook(None, counted)
    batches = [part(batch, share) for batch in common_batches(run)]
    seen: dict[str, Any] = {"buckets": buckets, "losses": [], "norms": [], "weights": []}
    together = run.train.accumulate
    for step in range(STEPS):
        output = state.train_step(batches[step * together : (step + 1) * together])
        losses, weights, norm = output.losses, output.weights, output.grad_norm
        seen["losses"].append({task: {k: distributed.mean(v) for k, v in of.items()} for task, of in losses.items()})
        seen["weights"].append(dict(weights))
        seen["norms"].append(norm)
    if isinstance(state.loss_net, DistributedDataParallel):
        seen["broadcasts"] = state.loss_net.will_sync_module_buffers()
    weights = full_weights(net, on_every_rank=True) if state.sharded else net.state_dict()
    return state, seen | {"net": {**weights, **state.balancer.state_dict()}}


def one_of_two(groups: Iterator[None], folder: Path) -> None:
    next(groups)
    with distributed.group("cpu", timeout_s=200) as ranks:
        mine = slice(2 * ranks.rank, 2 * ranks.rank + 2)
        for case in CASES:
            torch.save(stepped(settings(case), ranks, mine)[1], folder / f"{case}-{ranks.rank}.pt")
        tiny = {name: balanced(method, ranks, mine) for name, method in METHODS.items()}
        torch.save(tiny, folder / f"tiny-{ranks.rank}.pt")
        for known in (3, 2):
            torch.save({name: taught(name, known, mine) for name in REGIONS}, folder / f"{known}-{ranks.rank}.pt")


def _methods() -> dict[str, Balance]:
    """Every method on disk, and the other ways to run those that look at gradients."""
    methods = {param.id: param.values[0]() for param in on_disk(Balance)}
    upgrad, pcgrad = methods["upgrad"], methods["pcgrad"]
    for name, method in list(methods.items()):
        if isinstance(method, GramianBalance):
            methods[f"{name}, parameters"] = method.model_copy(update={"level": "parameters"})
    heads = {"heads": "weighted"}
    methods |= {"heads": upgrad.model_copy(update=heads), "pcgrad, heads": pcgrad.model_copy(update=heads)}
    methods["heads, parameters"] = upgrad.model_copy(update=heads | {"level": "parameters"})
    methods["smoothed, initial"] = upgrad.model_copy(update={"smoothing": 0.7, "loss_scale": "initial"})
    return methods


METHODS = _methods()
TASKS = {"a": 1.0, "b": 0.5, "c": 2.0}
LABELS = {"a": (1, 1, 1, 1), "b": (1, 0, 0, 0), "c": (0, 1, 1, 1)}  # of the 4 images of the first batch of a step


class Tiny(nn.Module):
    """A trunk of two maps and a decoder a task, with squared errors against noise, a mean over the labelled images."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut = cut
        self.trunk = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 3)])
        self.decoders = nn.ModuleDict({task: nn.Linear(7, 2) for task in TASKS})

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        shared = [layer(image).tanh() for layer in self.trunk]
        leaves = [m.detach().requires_grad_() for m in shared] if self.cut else shared
        read = torch.cat(leaves, dim=1)
        return shared, leaves, {task: decoder(read) for task, decoder in self.decoders.items()}


def balanced(method: Balance, ranks: Ranks, share: slice) -> dict[str, Tensor]:
    """The weights of a tiny network after STEPS steps of two batches of 4 images, of which this process sees a share.

    The second batch has no label of c. What is done around the balancer is what `Trainer` does.
    """
    torch.manual_seed(5)
    balancer = method.build(TASKS)
    net = Tiny(balancer.needs_cut)
    averaged_later = balancer.needs_parameters or balancer.rescales_decoder_gradients
    replica = distributed.replicate(net, ranks, averaged_later=averaged_later)
    optimizer = torch.optim.SGD([*net.parameters(), *balancer.parameters()], lr=0.01)
    noise = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = [torch.randn(4, 5, generator=noise)[share] for _ in range(2)]
        targets = [{task: 3 * torch.randn(4, 2, generator=noise)[share] for task in TASKS} for _ in range(2)]
        second = {"a": LABELS["a"], "b": LABELS["a"], "c": (0, 0, 0, 0)}
        masks = [{t: torch.tensor(of[t])[share].float() for t in TASKS} for of in (LABELS, second)]
        totals = step_totals([{t: {"images": mask.sum()} for t, mask in of.items()} for of in masks])
        for number, (image, target, mask) in enumerate(zip(images, targets, masks, strict=True)):
            last = number == 1
            wait = isinstance(replica, DistributedDataParallel) and not last
            with replica.no_sync() if wait else nullcontext():
                shared, leaves, raw = replica(image)
                losses = {
                    t: ((raw[t] - target[t]).square().mean(dim=1) * mask[t]).sum() / totals[t]["images"] for t in TASKS
                }
                labelled = dict.fromkeys(TASKS, torch.tensor(True))
                maps = (shared, leaves) if net.cut else ([], [])
                of_trunk = list(net.trunk.parameters())
                balancer.backward(
                    Step(losses, *maps, 1.0, labelled, 0.5, last, of_trunk, parameters=list(net.parameters()))
                )
        distributed.average_gradients(balancer.parameters())
        if averaged_later:
            distributed.average_gradients(net.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in {**net.state_dict(), **balancer.state_dict()}.items()}


def cross_entropy_of_hardest(logits: Tensor, classes: Tensor, counts: Tensor, total: Tensor) -> Tensor:
    return hardest(functional.cross_entropy(logits, classes, reduction="none"), counts, 0.25, total)


REGIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "dice": dice,
    "lovasz": lovasz_softmax,
    "hardest": cross_entropy_of_hardest,
}


def taught(name: str, known: int, share: slice) -> tuple[Tensor, Tensor]:
    """A loss of logits of which the first `known` of 4 images have labels, and what it teaches the logits."""
    noise = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 3, 8, 8, generator=noise)[share].requires_grad_()
    classes = torch.randint(3, (4, 8, 8), generator=noise)[share]
    counts = (torch.arange(4) < known)[share, None, None].expand_as(classes)
    total = step_totals([{name: {"pixels": counts.sum().float()}}])[name]["pixels"]
    loss = REGIONS[name](logits, classes, counts, total)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    processes.run(2, one_of_two, folder)
    return folder


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, two: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process saw, and what each of two did."""
    _, alone = stepped(settings(request.param), scene_run.ALONE, slice(None))
    return alone, [torch.load(two / f"{request.param}-{rank}.pt") for rank in (0, 1)]


def test_two_processes_end_with_the_weights_and_statistics_of_one(both: Any):
    alone, of_two = both
    for found in of_two:
        apart = {name: float((value - found["net"][name]).abs().max()) for name, value in alone["net"].items()}
        assert max(apart.values()) < 1e-5, {name: far for name, far in apart.items() if far >= 1e-5}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_balance_as_one(two: Path, name: str):
    """Uneven labels and accumulated batches; equal to 1e-5 of the largest entry, weights and state alike."""
    alone = balanced(METHODS[name], scene_run.ALONE, slice(None))
    for rank in (0, 1):
        here = torch.load(two / f"tiny-{rank}.pt")[name]
        for key, value in alone.items():
            size = float(value.double().nan_to_num().abs().max())
            torch.testing.assert_close(here[key], value, rtol=0, atol=1e-5 * size, equal_nan=True)


def test_two_processes_log_what_one_does(both: Any):
    alone, of_two = both
    for found in of_two:
        for key in ("losses", "norms", "weights"):
            torch.testing.assert_close(found[key], alone[key], rtol=1e-3, atol=1e-6)


def test_gradients_are_exchanged_in_the_last_of_accumulated_batches_only(both: Any):
    for found in both[1]:
        if "broadcasts" not in found:
            continue  # sharded: that exchange has no hook to count it
        assert sum(found["buckets"]) == STEPS, "each exchange has one last bucket"
        assert not found["broadcasts"], "statistics are shared when they are read, not in each step"


@pytest.mark.parametrize("known", [3, 2])
def test_dice_of_two_processes_is_that_of_one(two: Path, known: int):
    """With two labelled images, the second process has none."""
    loss, gradient = taught("dice", known, slice(None))
    found = [torch.load(two / f"{known}-{rank}.pt")["dice"] for rank in (0, 1)]

    torch.testing.assert_close(torch.stack([one for one, _ in found]).mean(), loss)
    torch.testing.assert_close(torch.cat([of_one / 2 for _, of_one in found]), gradient)


@pytest.mark.parametrize("name", ["lovasz", "hardest"])
@pytest.mark.parametrize("known", [3, 2])
def test_what_ranks_pixels_does_so_in_each_process_that_has_labels(two: Path, name: str, known: int):
    """Not the loss of one process, since pixels of different processes are not compared."""
    alone = [taught(name, known, share) for share in (slice(0, 2), slice(2, 4))]
    found = [torch.load(two / f"{known}-{rank}.pt")[name] for rank in (0, 1)]

    counts = [2, known - 2]  # labelled images: each labelled pixel counts the same, wherever it lies
    expected = sum(count * loss for count, (loss, _) in zip(counts, alone, strict=True)) / sum(counts)
    torch.testing.assert_close(torch.stack([one for one, _ in found]).mean(), expected)
    for count, (_, here), (_, gradient) in zip(counts, found, alone, strict=True):
        torch.testing.assert_close(here / 2, gradient * count / sum(counts))
