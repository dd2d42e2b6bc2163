"""Steps of two processes are those of one on all images: accumulated, synchronised, whatever each has labels for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
from torch import nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from visionmtl import distributed
from visionmtl.config import Run
from visionmtl.datasets import open_sources
from visionmtl.distributed import Ranks
from visionmtl.model import build_model
from visionmtl.spaces import resolve_spaces
from visionmtl.state import RunState
from visionmtl.types import Batch

STEPS, ACCUMULATE = 3, 2
GROUP = {"norm": "group"}
UPGRAD = {"balance": {"type": "upgrad"}}
CASES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "uncertainty": {"balance": {"type": "uncertainty"}},
    "upgrad, weighted": {"balance": {"type": "upgrad", "heads": "weighted"}},
    "dice": {"tasks": {"segmentation": {"region_loss": "dice"}}},
    "batchnorm, upgrad": {"train": {"sync_batchnorm": True}} | UPGRAD,
    "static graph": {"train": {"accumulate": 1, "distributed": {"static_graph": True}}},
    "small buckets": {"train": {"distributed": {"bucket_mb": 0.02}}},
}


def settings(case: str) -> Run:
    """Every BatchNorm synchronised, or none there."""
    norm = {"norm": "batch"} if "batchnorm" in case else GROUP
    parts = {
        "model": {"pyramid": norm},
        "tasks": {"segmentation": {"dropout": 0.0, "decoder": norm}, "depth": {"decoder": norm}},
        "data": {"train": [tiny.scenes(24)]},
        "optim": {"name": "sgd", "lr": 0.02, "clip_norm": 10.0},
        "train": {"batch_size": 4, "accumulate": ACCUMULATE},
    }
    return tiny.run(**tiny.merged(parts, CASES[case]))


def common_batches(run: Run) -> list[Batch]:
    """Of the 4 images of each batch, the last two have no depth, and of the first two one has no boxes."""
    batches = tiny.batches(run)
    for batch in batches:
        batch.labelled["depth"][2:] = False
        batch.labelled["detection"][1] = False
    return batches


def part(batch: Batch, share: slice) -> Batch:
    targets = {task: {name: value[share] for name, value in of.items()} for task, of in batch.targets.items()}
    return Batch(batch.image[share], targets, {task: known[share] for task, known in batch.labelled.items()})


def stepped(run: Run, ranks: Ranks, share: slice) -> tuple[RunState, dict[str, Any]]:
    """The state after all steps, and what was seen on the way. A layer that nobody reads does no harm."""
    spaces = resolve_spaces(run.tasks, open_sources(run.data.train))
    torch.manual_seed(run.seed)
    net = build_model(run.model, run.tasks, spaces, run.data.size)
    net.trunk.idle = nn.Linear(2, 2)
    state = RunState(run, net, ranks)

    buckets: list[bool] = []

    def counted(_: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buckets.append(bucket.is_last())
        return allreduce_hook(None, bucket)

    if ranks.world > 1:
        state.loss_net.register_comm_hook(None, counted)  # type: ignore[operator]
    batches = [part(batch, share) for batch in common_batches(run)]
    seen: dict[str, Any] = {"buckets": buckets, "losses": [], "norms": [], "weights": []}
    together = run.train.accumulate
    for step in range(STEPS):
        losses, weights, norm = state.advance(batches[step * together : (step + 1) * together])
        seen["losses"].append({task: {k: distributed.mean(v) for k, v in of.items()} for task, of in losses.items()})
        seen["weights"].append(dict(weights))
        seen["norms"].append(norm)
    return state, seen | {"net": {**state.net.state_dict(), **state.balancer.state_dict()}}


def one_of_two(groups: Iterator[None], folder: Path) -> None:
    next(groups)
    with distributed.group("cpu", timeout_s=200) as ranks:
        mine = slice(2 * ranks.rank, 2 * ranks.rank + 2)
        for case in CASES:
            torch.save(stepped(settings(case), ranks, mine)[1], folder / f"{case}-{ranks.rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    processes.run(2, one_of_two, folder)
    return folder


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, two: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process saw, and what each of two did."""
    _, alone = stepped(settings(request.param), tiny.ALONE, slice(None))
    return alone, [torch.load(two / f"{request.param}-{rank}.pt") for rank in (0, 1)]


def test_two_processes_end_with_the_weights_and_statistics_of_one(both: Any):
    alone, of_two = both
    for found in of_two:
        apart = {name: float((value - found["net"][name]).abs().max()) for name, value in alone["net"].items()}
        assert max(apart.values()) < 1e-5, {name: far for name, far in apart.items() if far >= 1e-5}


def test_two_processes_log_what_one_does(both: Any):
    alone, of_two = both
    for found in of_two:
        for key in ("losses", "norms", "weights"):
            torch.testing.assert_close(found[key], alone[key], rtol=1e-3, atol=1e-6)


def test_gradients_are_exchanged_in_the_last_of_accumulated_batches_only(both: Any):
    for found in both[1]:
        assert sum(found["buckets"]) == STEPS, "each exchange has one last bucket"


def test_a_smaller_bucket_makes_more_of_them(two: Path):
    usual, small = (len(torch.load(two / f"{case}-0.pt")["buckets"]) for case in ("fixed", "small buckets"))

    assert usual < small


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (UPGRAD, "one backward a task; .*; set it to false, or choose balance=fixed"),
        ({"train": {"accumulate": 2}}, "train.accumulate is 2; .*; set it to false, or choose train.accumulate=1"),
    ],
)
def test_a_step_of_several_backwards_cannot_promise_a_static_graph(changes: dict[str, Any], message: str):
    run = tiny.run(**tiny.merged({"train": {"distributed": {"static_graph": True}}}, changes))

    with pytest.raises(ValueError, match=message):
        tiny.state(run)
