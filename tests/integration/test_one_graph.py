"""The whole loss computation compiles to one graph without breaks, and every further graph is announced."""

from typing import Any

import pytest
import torch
from contract import found
from torch._dynamo.utils import counters
from toy_run import FIXED, NARROW, losses_of, small_batch, small_net, small_run, small_state, small_tasks

from visionmtl.balance.base import Balance
from visionmtl.balance.upgrad import UPGrad
from visionmtl.engine.compile import Graphs, compile_losses
from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.heads.base import Head
from visionmtl.network import LossNet
from visionmtl.ops.ranks import step_totals
from visionmtl.run import Train
from visionmtl.tasks.base import Task
from visionmtl.tasks.classification import Classification
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.normals import Normals
from visionmtl.tasks.segmentation import Segmentation

CPU = torch.device("cpu")
SGD = {"name": "sgd", "lr": 0.01}  # AdamW would turn the rounding of a gradient near 0 into a full step
LEVELS = (3, 4)  # what the compiler sees of five levels is more of the same, and takes its time
HEADS = [pytest.param(p.values[0](num_convs=1, levels=LEVELS), id=p.id) for p in found(Head)]
HEADS += [pytest.param(Aligned(num_convs=1, levels=LEVELS, bins=4), id="aligned with bins")]
SMALL = small_tasks(Aligned(num_convs=1, levels=LEVELS))
LOSSES: dict[str, Task] = {
    "ohem": Segmentation(decoder=NARROW, hardest=0.3),
    "smoothing": Segmentation(decoder=NARROW, label_smoothing=0.1, class_weights=(1, 2, 0.5)),
    "dice": Segmentation(decoder=NARROW, region_loss="dice"),
    "lovasz": Segmentation(decoder=NARROW, region_loss="lovasz"),
    "bins": Depth(decoder=NARROW, head="bins", num_bins=8),
    "normals": Normals(decoder=NARROW),
    "union": Segmentation(decoder=NARROW, label_smoothing=0.1, classes="union", dropout=0),
    "union of boxes": Detection(head=Aligned(num_convs=1, levels=LEVELS), classes="union"),
    "image labels": Classification(level=4, classes="union"),
    "many image labels": Classification(level=4, many=True),
}


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(loss_net: LossNet, backend: str = "eager", keeps_graph: bool = False) -> LossNet:
    """As for a GPU, except that the graphs are run as they are: to make kernels of them takes minutes."""
    compile_losses(loss_net, Train(compile=True), CPU, backend, keeps_graph)
    return loss_net


def check_one_graph(tasks: dict[str, Task]) -> None:
    """Dropout is off and the same net evaluated twice, so the losses must be the same."""
    net, batch = small_net(tasks).eval(), small_batch(tasks)
    plain = losses_of(LossNet(net, cut=False), batch)
    torch.stack([part for parts in plain.values() for part in parts.values()]).sum().backward()
    wanted = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()

    ours = losses_of(compiled(LossNet(net, cut=False)), batch)
    torch.stack([part for parts in ours.values() for part in parts.values()]).sum().backward()

    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close({n: p.grad for n, p in net.named_parameters()}, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_with_its_loss_is_one_graph(head: Head):
    check_one_graph({"boxes": Detection(head=head)})


@pytest.mark.slow
def test_all_tasks_and_their_other_losses_together_are_one_graph():
    check_one_graph(small_tasks() | LOSSES)


@pytest.mark.slow
def test_only_another_padding_of_boxes_makes_another_graph_and_the_log_says_so():
    tasks = {"boxes": SMALL["boxes"]}
    loss_net, graphs = compiled(LossNet(small_net(tasks), cut=False)), Graphs()
    lines = []
    for num_boxes in (1, 30, 33, 2, 64, 100):
        batch = small_batch(tasks, num_boxes)
        losses_of(loss_net, batch)
        lines.append(graphs.report(batch.targets))

    assert [line is None for line in lines] == [False, True, False, True, True, False]
    assert graphs.count == 3
    first, _, second, *_ = lines
    assert first and first.startswith("compiled  1 graph in ") and " for the next start; what that saves" in first
    assert second and "1 graph more in" in second
    assert second.endswith("because boxes/boxes is 3x64x4 instead of 3x32x4; 2 graphs now")


@pytest.mark.slow
def test_a_method_that_compares_gradients_has_a_graph_for_the_trunk_and_one_for_each_task():
    tasks = SMALL
    net, batch = small_net(tasks), small_batch(tasks)
    _, shared, leaves = compiled(LossNet(net, cut=True))(
        batch.image, batch.targets, batch.labelled, step_totals([batch.counts])
    )
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1 + len(tasks), {})
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves) and not any(m.is_leaf for m in shared)


@pytest.mark.parametrize(
    "method",
    [FIXED, UPGrad(), UPGrad(heads="weighted"), UPGrad(level="parameters")],
    ids=["fixed", "upgrad", "upgrad, heads", "upgrad, parameters"],
)
@pytest.mark.slow
def test_compiled_steps_move_the_weights_as_plain_ones_do(method: Balance, monkeypatch: Any, caplog: Any):
    caplog.set_level("INFO", "visionmtl")
    monkeypatch.setattr(
        "visionmtl.engine.trainer.compile_losses",
        lambda net, train, device, keeps_graph: compiled(net, "aot_eager", keeps_graph),
    )
    tasks = {name: SMALL[name] for name in ("classes", "depth")}
    batch = small_batch(tasks)
    states = [small_state(small_run(tasks, method, SGD, compile=choice)) for choice in (False, True)]
    for state in states:
        for _ in range(3):
            state.train_step([batch])

    plain, ours = (state.net.state_dict() for state in states)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
    assert len([record for record in caplog.records if record.message.startswith("compiled")]) == 1


def without_tasks() -> LossNet:
    net = torch.nn.Identity()
    net.tasks = {}
    return LossNet(net, cut=False)  # type: ignore[arg-type]


def test_a_graph_that_is_run_backward_twice_is_not_recorded():
    net = without_tasks()
    with pytest.raises(ValueError, match=r"one graph backward several times.*set train.compile=true"):
        compile_losses(net, Train(compile="cuda_graph"), torch.device("cuda"), keeps_graph=True)


def test_cuda_graphs_need_a_cuda_device_and_one_batch_a_step():
    net = without_tasks()
    with pytest.raises(ValueError, match=r"device cpu; only CUDA devices .* set train.compile=true"):
        compile_losses(net, Train(compile="cuda_graph"), CPU)
    with pytest.raises(ValueError, match=r"accumulate 2; .* 1 is allowed; .* raise batch_size"):
        compile_losses(net, Train(compile="cuda_graph", accumulate=2), torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("how", [True, "cuda_graph"])
def test_on_a_gpu_compiled_steps_move_the_weights_as_plain_ones_do(how: bool | str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which eager and compiled convolutions round apart
    # five levels would end in a map of one cell, which fp32 convolutions of torch 2.11 cannot compile: see docs/log.md
    tasks, batch = SMALL, small_batch(SMALL)
    states = [small_state(small_run(tasks, optim=SGD, compile=choice), "cuda") for choice in (False, how)]
    for state in states:
        for _ in range(6):
            state.train_step([batch])
    plain, ours = (state.net.state_dict() for state in states)
    torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-3)
