"""Every way of sharing on disk trains under several balancings, over ranks too, resumes, exports and compiles."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import processes
import pytest
import scene_run
import torch
from contract import found
from torch._dynamo.utils import counters

from visionmtl.balance.base import Balance, GramianBalance
from visionmtl.engine import distributed
from visionmtl.engine.compile import compile_losses
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.trainer import Trainer
from visionmtl.modeling.sharing.base import Sharing
from visionmtl.network import LossNet
from visionmtl.ops.ranks import step_totals
from visionmtl.run import Run, Train
from visionmtl.structures import Batch

WAYS = [case.id for case in found(Sharing)]
every_way = pytest.mark.parametrize("way", WAYS)
SUBSETS = [names for count in (3, 2, 1) for names in combinations(scene_run.TASKS, count)]
TWO_DENSE, TWO_KINDS = ("segmentation", "depth"), ("detection", "depth")
BALANCES = ("fixed", "uncertainty", "upgrad", "nash", "famo")
SMALL: dict[str, dict[str, Any]] = {"pad_net": {"channels": 8}, "mti_net": {"channels": 64}, "lora": {"rank": 2}}
GROUP = {"norm": "group"}


def settings(way: str, names: tuple[str, ...] = SUBSETS[0], balance: str = "fixed", **changes: Any) -> Run:
    sharing = {"type": way, **SMALL.get(way, {})}
    if way == "branching" and names == ("detection",):
        sharing["at"] = "pyramid"  # there is no dense decoder to share
    model = {"encoder": {"name": "test_resnet"}, "sharing": sharing}
    plain = {"model": model, "balance": {"type": balance}, "optim": {"lr": 1e-3, "clip_norm": 1.0}}
    return scene_run.run(names=names, **scene_run.merged(plain, changes))


@pytest.fixture(scope="module")
def batches() -> dict[tuple[str, ...], list[Batch]]:
    """Of each subset of tasks; of the second image no task has a label."""
    whole = scene_run.batches(settings("hard"))[:3]
    for task, labelled in whole[1].labelled.items():
        labelled[1] = False
        if task == "depth":
            whole[1].targets[task]["depth_m"][1] = 0
    return {tasks: [_of_tasks(batch, tasks) for batch in whole] for tasks in SUBSETS}


def _of_tasks(batch: Batch, tasks: Sequence[str]) -> Batch:
    by_task = [{task: of[task] for task in tasks} for of in (batch.targets, batch.labelled, batch.counts)]
    targets, labelled, counts = by_task
    return replace(batch, targets=targets, labelled=labelled, counts=counts)


@pytest.mark.parametrize(
    "tasks", [pytest.param(of, marks=() if len(of) == 3 else pytest.mark.slow, id=" ".join(of)) for of in SUBSETS]
)
@every_way
def test_three_steps_of_every_balancing_are_finite_and_move_every_part(way: str, tasks: tuple[str, ...], batches: Any):
    network = scene_run.untrained(settings(way, tasks))
    for balance in BALANCES:
        trainer = Trainer(settings(way, tasks, balance), copy.deepcopy(network), scene_run.ALONE)
        before = {name: p.clone() for name, p in trainer.net.named_parameters() if p.requires_grad}
        for batch in batches[tasks]:
            output = trainer.train_step([batch])
            assert output.grad_norm.isfinite() and output.grad_norm > 0
            assert all(value.isfinite() for parts in output.losses.values() for value in parts.values())
        assert not trainer.finite.read().skipped
        still = [name for name, p in trainer.net.named_parameters() if name in before and torch.equal(p, before[name])]
        assert not still, balance


@pytest.mark.parametrize(
    "tasks", [pytest.param(of, marks=() if of == TWO_KINDS else pytest.mark.slow, id=" ".join(of)) for of in SUBSETS]
)
@every_way
def test_the_network_exports_and_predicts_the_same(way: str, tasks: tuple[str, ...], batches: Any):
    net = scene_run.state(settings(way, tasks)).net.eval()
    image = batches[tasks][0].image
    with torch.no_grad():
        plain = net(image)
        program = torch.export.export(net, (image,))
        torch.testing.assert_close(program.module()(image), plain)
    assert plain.keys() == set(tasks)
    assert not [node for node in program.graph.nodes if "initial" in str(node.meta.get("nn_module_stack", ""))]


@every_way
def test_a_resumed_run_takes_the_same_step_to_the_bit(way: str, batches: Any):
    first, second, _ = batches[TWO_DENSE]
    trainer = scene_run.state(settings(way, TWO_DENSE))
    trainer.train_step([first])
    resumed = scene_run.state(settings(way, TWO_DENSE))
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()), Path("a checkpoint"))
    for one in (trainer, resumed):
        one.train_step([second])
    assert scene_run.differences(trainer.state_dict(), resumed.state_dict()) == []


@every_way
@pytest.mark.slow
def test_the_losses_are_one_graph(way: str, batches: Any):
    torch._dynamo.reset()
    counters.clear()
    batch = batches[TWO_DENSE][0]
    net = scene_run.state(settings(way, TWO_DENSE)).net.eval()
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
    runs = [settings(way, TWO_DENSE, "upgrad", train={"compile": choice}, **sgd) for choice in (False, True)]
    plain, ours = (scene_run.state(run) for run in runs)
    for batch in batches[TWO_DENSE][:2]:
        for trainer in (plain, ours):
            trainer.train_step([batch])
    torch.testing.assert_close(ours.net.state_dict(), plain.net.state_dict(), rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


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
    with scene_run.float64():
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


@pytest.mark.slow
def test_two_processes_share_as_one_on_all_images(tmp_path: Path):
    check_two_are_one(OVER_RANKS, 1, tmp_path)


@pytest.mark.slow  # `test_distributed_steps` asks the same of a network of three layers
def test_two_processes_balance_as_one_on_all_images_in_accumulated_steps(tmp_path: Path):
    check_two_are_one([("hard", balance) for balance in (*METHODS.values(), *ON_PARAMETERS)], 2, tmp_path)


def test_parameters_that_tasks_share_are_found_whatever_the_channels():
    encoder = {"name": "test_convnext", "in_chans": 4, "mean": [0.5] * 4, "std": [0.2] * 4}
    run = scene_run.run(model={"encoder": encoder}, balance={"type": "pcgrad", "level": "parameters"})

    assert Trainer(run, scene_run.untrained(run), scene_run.ALONE).shared_parameters


@pytest.mark.parametrize("sharing", [{"type": "mtan"}, {"type": "branching", "at": "pyramid"}], ids=lambda x: x["type"])
@pytest.mark.parametrize("balance", ["pcgrad", "graddrop"])
def test_shared_maps_of_frozen_stages_hold_up_no_step(sharing: dict, balance: str):
    model = {"sharing": sharing, "encoder": {"name": "test_convnext", "freeze_stages": 1}}
    tasks = {name: {"decoder": {"levels": [2, 3]}} for name in ("segmentation", "depth")}
    run = scene_run.run(names=tuple(tasks), model=model, balance={"type": balance}, tasks=tasks)
    trainer = scene_run.state(run)
    before = copy.deepcopy(trainer.net.state_dict())

    trainer.train_step(scene_run.batches(run)[:1])

    moved = {name for name, value in trainer.net.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("trunk.encoder") for name in moved)


def test_balancing_on_maps_that_nothing_learns_is_an_error():
    model = {"sharing": {"type": "branching", "at": "pyramid"}, "freeze": ["trunk.encoder"]}
    run = scene_run.run(names=("segmentation", "depth"), model=model, balance={"type": "pcgrad"})
    with pytest.raises(ValueError, match="all that makes these is frozen, so it would have no effect"):
        scene_run.state(run)


def test_balance_levels_that_no_shared_map_has_are_told_before_the_first_step():
    levels = {"type": "upgrad", "levels": [4]}
    scene_run.state(scene_run.run(names=TWO_DENSE, balance=levels))

    with pytest.raises(ValueError, match=r"balance.levels has \[5\].*of levels \[3, 4\].*remove balance.levels"):
        scene_run.state(scene_run.run(names=TWO_DENSE, balance=levels | {"levels": [3, 5]}))


@pytest.mark.parametrize("way", ["pad_net", "mti_net"])
def test_fcos_makes_initial_predictions_on_the_levels_that_they_have(way: str):
    sharing = {"type": way, "channels": 8, **({"level": 3} if way == "pad_net" else {})}
    head = {"type": "fcos", "levels": [3, 4, 5], "num_convs": 1}
    run = scene_run.run(model={"sharing": sharing}, tasks={"detection": {"head": head}})

    losses = scene_run.state(run).train_step(scene_run.batches(run)[:1]).losses["detection"]

    assert all(value.isfinite() for value in losses.values()) and any("initial" in name for name in losses)
