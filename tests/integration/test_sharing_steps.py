"""Every way of sharing on disk trains under several balancings, over ranks too, resumes, exports and compiles."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import processes
import pytest
import scene_run
import torch
from contract import found
from torch import Tensor
from torch._dynamo.utils import counters

from visionmtl.balance.base import Balance, GramianBalance
from visionmtl.engine import distributed
from visionmtl.engine.compile import compile_losses
from visionmtl.engine.distributed import Ranks
from visionmtl.modeling.sharing.base import Sharing
from visionmtl.network import LossNet
from visionmtl.ops.ranks import step_totals
from visionmtl.run import Run, Train
from visionmtl.structures import Batch

WAYS = [case.id for case in found(Sharing)]
every_way = pytest.mark.parametrize("way", WAYS)
SUBSETS = [("detection", "segmentation", "depth"), ("segmentation", "depth"), ("detection", "depth"), ("depth",)]
OF_BALANCE = {"fixed": SUBSETS[1:2], "uncertainty": SUBSETS[2:3], "upgrad": [SUBSETS[0], SUBSETS[3]]}
SMALL: dict[str, dict[str, Any]] = {"pad_net": {"channels": 8}, "mti_net": {"channels": 64}, "lora": {"rank": 2}}
GROUP = {"norm": "group"}


def settings(way: str, names: tuple[str, ...] = SUBSETS[0], balance: str = "fixed", **changes: Any) -> Run:
    sharing = {"type": way, **SMALL.get(way, {})}
    model = {"encoder": {"name": "test_resnet"}, "sharing": sharing}
    plain = {"model": model, "balance": {"type": balance}, "optim": {"lr": 1e-3, "clip_norm": 1.0}}
    return scene_run.run(names=names, **scene_run.merged(plain, changes))


@pytest.fixture(scope="module")
def batches() -> dict[tuple[str, ...], list[Batch]]:
    """Of each subset of tasks; of the second image no task has a label."""
    of_subset = {tasks: scene_run.batches(settings("hard", tasks))[:3] for tasks in SUBSETS}
    for known in of_subset.values():
        for task, labelled in known[1].labelled.items():
            labelled[1] = False
            if task == "depth":
                known[1].targets[task]["depth_m"][1] = 0
    return of_subset


@pytest.mark.parametrize("balance", OF_BALANCE)
@every_way
def test_three_steps_are_finite_and_move_every_part(way: str, balance: str, batches: Any):
    for tasks in OF_BALANCE[balance]:
        trainer = scene_run.state(settings(way, tasks, balance))
        before = {name: p.clone() for name, p in trainer.net.named_parameters() if p.requires_grad}
        for batch in batches[tasks]:
            output = trainer.train_step([batch])
            assert output.grad_norm.isfinite() and output.grad_norm > 0
            assert all(value.isfinite() for parts in output.losses.values() for value in parts.values())
        assert not trainer.num_not_finite
        still = [name for name, p in trainer.net.named_parameters() if name in before and torch.equal(p, before[name])]
        assert not still


@every_way
def test_the_network_exports_and_predicts_the_same(way: str, batches: Any):
    net = scene_run.state(settings(way, SUBSETS[2])).net.eval()
    image = batches[SUBSETS[2]][0].image
    with torch.no_grad():
        plain = net(image)
        program = torch.export.export(net, (image,))
        exported = program.module()(image)
    torch.testing.assert_close(exported["depth"], plain["depth"])
    torch.testing.assert_close(exported["detection"]["logits"], plain["detection"]["logits"])
    assert not [node for node in program.graph.nodes if "initial" in str(node.meta.get("nn_module_stack", ""))]


@every_way
def test_a_resumed_run_takes_the_same_step_to_the_bit(way: str, batches: Any):
    first, second, _ = batches[SUBSETS[1]]
    trainer = scene_run.state(settings(way, SUBSETS[1]))
    trainer.train_step([first])
    resumed = scene_run.state(settings(way, SUBSETS[1]))
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()), Path("a checkpoint"))
    for one in (trainer, resumed):
        one.train_step([second])
    assert scene_run.differences(trainer.state_dict(), resumed.state_dict()) == []


@every_way
@pytest.mark.slow
def test_the_losses_are_one_graph(way: str, batches: Any):
    torch._dynamo.reset()
    counters.clear()
    batch = batches[SUBSETS[1]][0]
    net = scene_run.state(settings(way, SUBSETS[1])).net.eval()
    arguments = (batch.image, batch.targets, batch.labelled, step_totals([batch.counts]))
    plain = LossNet(net, cut=False)(*arguments)[0]
    loss_net = LossNet(net, cut=False)
    compile_losses(loss_net, Train(compile=True), torch.device("cpu"), "eager")
    torch.testing.assert_close(loss_net(*arguments)[0], plain, rtol=1e-5, atol=1e-6)
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["pad_net", "cross_stitch"])
@pytest.mark.slow
def test_compiled_steps_whose_graph_serves_several_backwards_are_plain_ones(way: str, batches: Any, monkeypatch: Any):
    def compiled(loss_net: LossNet, settings: Train, device: torch.device, keeps_graph: bool) -> None:
        compile_losses(loss_net, settings, device, "aot_eager", keeps_graph)

    monkeypatch.setattr("visionmtl.engine.trainer.compile_losses", compiled)
    torch._dynamo.reset()
    sgd = {"optim": {"name": "sgd", "lr": 0.01}, "tasks": {"segmentation": {"dropout": 0.0}}}
    runs = [settings(way, SUBSETS[1], "upgrad", train={"compile": choice}, **sgd) for choice in (False, True)]
    plain, ours = (scene_run.state(run) for run in runs)
    for batch in batches[SUBSETS[1]][:2]:
        for trainer in (plain, ours):
            trainer.train_step([batch])
    torch.testing.assert_close(ours.net.state_dict(), plain.net.state_dict(), rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@contextmanager
def float64() -> Iterator[None]:
    """Networks, losses and gradients in float64, where sums in another order agree to 1e-15.

    In float32 the same comparison ends up to 3e-5 apart after three steps, whatever the balancing: convolutions and
    losses of two images and of four are summed in another order, and the network feeds that back.
    """

    def upcast(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value.to(torch.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", upcast)  # losses take raw outputs as float32 at least
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def rank_run(way: str, balance: Balance, accumulate: int) -> Run:
    """Without BatchNorm, which would see the images of one process; batches of 4, three steps an epoch."""
    run = settings(
        way,
        model={"pyramid": GROUP, "encoder": {"norm": "frozen"}, "sharing": GROUP if way in WITH_NORM else {}},
        tasks={"segmentation": {"decoder": GROUP, "dropout": 0.0}, "depth": {"decoder": GROUP}},
        optim={"name": "sgd", "lr": 0.02, "clip_norm": 10.0},
        data={"train": [scene_run.scenes(12 * accumulate)]}, train={"batch_size": 4, "accumulate": accumulate},
    )  # fmt: skip
    return run.model_copy(update={"balance": balance})


@cache
def uneven_batches(accumulate: int) -> list[Batch]:
    """The second process has no depth, and of its first image the first one has no boxes."""
    batches = scene_run.batches(rank_run("hard", FIXED, accumulate))
    for batch in batches:
        batch.labelled["depth"][2:] = False
        batch.targets["depth"]["depth_m"][2:] = 0
        batch.labelled["detection"][1] = False
        batch.targets["detection"]["valid"][1] = False
    return batches


def two_or_one(way: str, balance: Balance, accumulate: int, ranks: Ranks, share: slice) -> dict[str, Any]:
    """The weights after three steps on the images in `share` of each batch of 4."""
    run = rank_run(way, balance, accumulate)
    parts = []
    for batch in uneven_batches(accumulate):
        targets = {task: {name: value[share] for name, value in of.items()} for task, of in batch.targets.items()}
        counts = {name: task.count(targets[name], run.data.size) for name, task in run.tasks.items()}
        labelled = {task: known[share] for task, known in batch.labelled.items()}
        parts.append(Batch(batch.image[share], targets, labelled, counts))
    with float64():
        trainer = scene_run.state(run, ranks)
        for first in range(0, len(parts), accumulate):
            trainer.train_step(parts[first : first + accumulate])
    return {**trainer.net.state_dict(), **trainer.balancer.state_dict()}


WITH_NORM = ("nddr", "mtan", "pad_net", "mti_net")
METHODS = {case.id: case.values[0]() for case in found(Balance)}
FIXED = METHODS["fixed"]
OVER_RANKS = [(way, METHODS["upgrad"]) for way in WAYS] + [("pad_net", FIXED), ("lora", FIXED)]
ON_PARAMETERS = [
    one.model_copy(update={"level": "parameters"}) for one in METHODS.values() if isinstance(one, GramianBalance)
]


def one_of_two(groups: Iterator[None], folder: Path, cases: Sequence[tuple[str, Balance]], accumulate: int) -> None:
    next(groups)
    with distributed.group("cpu", timeout_s=200) as ranks:
        mine = slice(2 * ranks.rank, 2 * ranks.rank + 2)
        for number, (way, balance) in enumerate(cases):
            torch.save(two_or_one(way, balance, accumulate, ranks, mine), folder / f"{number}-{ranks.rank}.pt")


def check_two_are_one(cases: Sequence[tuple[str, Balance]], accumulate: int, folder: Path) -> None:
    """To 1e-5 of each tensor's largest entry."""
    processes.run(2, one_of_two, folder, cases, accumulate)
    for number, (way, balance) in enumerate(cases):
        one = two_or_one(way, balance, accumulate, scene_run.ALONE, slice(0, 4))
        first, second = (torch.load(folder / f"{number}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert scene_run.differences(first, second) == [], (way, balance)
        for name, value in one.items():
            apart = (first[name].double() - value.double()).abs().max()
            assert apart <= 1e-5 * value.double().nan_to_num().abs().max(), (way, balance, name, float(apart))


def test_two_processes_share_as_one_on_all_images(tmp_path: Path):
    check_two_are_one(OVER_RANKS, 1, tmp_path)


@pytest.mark.slow  # `test_distributed_steps` asks the same of a network of three layers
def test_two_processes_balance_as_one_on_all_images_in_accumulated_steps(tmp_path: Path):
    check_two_are_one([("hard", balance) for balance in (*METHODS.values(), *ON_PARAMETERS)], 2, tmp_path)
