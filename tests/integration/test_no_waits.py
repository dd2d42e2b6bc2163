"""The training step never waits for the device: no operator in it needs a value, or copies one across, to go on."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import scene_run
import torch
from contract import found
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy_run import FIXED, HEAD, NARROW, small_batch, small_run, small_state, small_tasks

from visionmtl.balance.base import Balance, Balancer, Step
from visionmtl.balance.graddrop import GradDrop
from visionmtl.balance.progress import FAMO
from visionmtl.balance.uncertainty import Uncertainty
from visionmtl.balance.upgrad import UPGrad
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import Trainer, train
from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.heads.base import Head
from visionmtl.modeling.heads.fcos import FCOS
from visionmtl.ops import fused
from visionmtl.tasks.base import Task
from visionmtl.tasks.classification import Classification
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.normals import Normals
from visionmtl.tasks.segmentation import Segmentation

HEADS = [pytest.param(p.values[0](num_convs=1), id=p.id) for p in found(Head)]
HEADS += [pytest.param(Aligned(num_convs=1, bins=4), id="aligned with bins")]
METHODS = [pytest.param(p.values[0](), id=p.id) for p in found(Balance)]
UPGRAD = UPGrad(smoothing=0.5, loss_scale="initial")
KINDS: dict[str, Balance] = {
    "fixed": FIXED,
    "uncertainty": Uncertainty(),
    "losses": FAMO(),
    "gradients": UPGRAD,
    "gradients, heads": UPGRAD.model_copy(update={"heads": "weighted"}),
    "gradients on parameters": UPGRAD.model_copy(update={"level": "parameters"}),
    "maps": GradDrop(),
}
"""One of each way to run the backwards; what a method adds is arithmetic on a few numbers."""
OPTIONS = {
    "ohem": Segmentation(decoder=NARROW, hardest=0.3),
    "smoothing and weights": Segmentation(decoder=NARROW, label_smoothing=0.1, class_weights=(1, 2, 0.5)),
    "dice": Segmentation(decoder=NARROW, region_loss="dice"),
    "lovasz": Segmentation(decoder=NARROW, region_loss="lovasz", region_weight=0.5),
    "depth in bins": Depth(decoder=NARROW, head="bins", num_bins=8),
    "normals": Normals(decoder=NARROW),
    "boxes of a union": Detection(head=HEAD, classes="union"),
    "classes of a union": Segmentation(decoder=NARROW, label_smoothing=0.1, classes="union"),
    "image labels": Classification(label_smoothing=0.1, class_weights=(1, 2, 0.5), classes="union"),
    "many image labels": Classification(many=True, class_weights=(1, 2, 0.5), classes="union"),
}
every_option = pytest.mark.parametrize("task", [pytest.param(task, id=name) for name, task in OPTIONS.items()])
every_head = pytest.mark.parametrize("head", HEADS)
every_method = pytest.mark.parametrize("method", METHODS)
every_kind = pytest.mark.parametrize("method", [pytest.param(method, id=name) for name, method in KINDS.items()])

BY_INDEX = ("aten::index", "aten::index_put", "aten::_index_put_impl")
# prod: its backward asks whether a factor is zero, but not while a mode such as the one below looks on
BY_NAME = (
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::_linalg_check_errors", "aten::masked_scatter", "aten::prod",
)  # fmt: skip
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Waits(TorchDispatchMode):
    """Collects the operators, backwards included, for which the host of a GPU would stop until a value is there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.seen += 1
        name = func._schema.name.rstrip("_")
        if name in BY_INDEX:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            waits = bool(masks)
        elif name in ("aten::_to_copy", "aten::copy"):
            source, other = args[0] if name == "aten::_to_copy" else args[1], out
            asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            waits = source.device.type != other.device.type and not asynchronous
        else:
            waits = name in BY_NAME or bool(TAGS & set(func.tags))
        if waits:
            self.found.append(func.name())
        return out


def waits_of_a_step(tasks: dict[str, Task], method: Balance = FIXED, **settings: object) -> list[str]:
    """Operators that wait in the second step, which accumulates two batches."""
    state = small_state(small_run(tasks, method, accumulate=2, **settings))
    batches = [small_batch(tasks), small_batch(tasks, num_boxes=40)]
    state.train_step(batches)
    with Waits() as waits:
        state.train_step(batches)
    assert waits.seen > 300
    return waits.found


def moved(module: nn.Module, device: torch.device | str) -> nn.Module:
    """As `nn.Module.to`, which would swap the tensors' insides; imagined ones have none."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else buffer.to(device)
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
    return module


def waits_on_an_imagined_gpu(tasks: dict[str, Task], method: Balance = FIXED) -> list[str]:
    """The same with tensors that only claim to lie on a GPU, so that copies between it and the host show up too.

    Autograd itself needs a real one; its operators are those of the other check, and here it answers with zeros.
    """
    collated = small_batch(tasks)  # on the host, as the loader does it
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(nn.Module, "to", moved):
        # the average looks at its weights once, when it is made; its update is part of the other check; and what no
        # output depends on is found once by a real forward and backward
        with patch("visionmtl.engine.trainer.freeze_unused_parameters", return_value=[]):
            state = small_state(small_run(tasks, method, optim={"ema_decay": None}, channels_last=False), "cuda")
        batch = collated.to(torch.device("cuda"))

        def backward(*args: Any, **kwargs: Any) -> None:
            for parameter in (*state.net.parameters(), *state.balancer.parameters()):
                parameter.grad = torch.zeros_like(parameter)

        def grad(loss: Tensor, inputs: list[Tensor], **kwargs: Any) -> list[Tensor]:
            return [torch.zeros_like(one) for one in inputs]

        autograd = {"backward": backward, "grad": grad}
        with patch.object(Tensor, "backward", backward), patch.multiple(torch.autograd, **autograd):
            state.train_step([batch])
            with Waits() as waits:
                state.train_step([batch])
    return waits.found


@every_head
def test_no_head_makes_the_host_wait(head: Head):
    assert waits_of_a_step(small_tasks(head)) == []


@every_kind
def test_no_way_of_balancing_makes_the_host_wait(method: Balance):
    assert waits_of_a_step(small_tasks(), method) == []


@every_option
def test_no_loss_makes_the_host_wait(task: Task):
    assert waits_of_a_step({"one": task}) == []


@every_head
def test_no_head_copies_between_host_and_device(head: Head):
    assert waits_on_an_imagined_gpu(small_tasks(head)) == []


@every_kind
def test_no_way_of_balancing_copies_between_host_and_device(method: Balance):
    assert waits_on_an_imagined_gpu(small_tasks(), method) == []


def waits_of_weights(method: Balance, device: str) -> list[str]:
    """Operators that wait in the second `backward` for two tasks on two maps, without a network."""
    balancer = moved(method.build({"a": 1.0, "b": 2.0}), device)
    assert isinstance(balancer, Balancer)
    with Waits() as waits:
        for _ in range(2):
            waits.found.clear()
            maps = [torch.ones(2, 4, size, size, device=device) for size in (6, 3)]
            leaves = [x.clone().requires_grad_() for x in maps]
            losses = {task: torch.stack([x.sigmoid().mean() for x in leaves]).sum() for task in ("a", "b")}
            labelled = {task: torch.ones((), dtype=torch.bool, device=device) for task in losses}
            shared = [x.requires_grad_() * 1 for x in maps]
            balancer.backward(Step(losses, shared, leaves, labelled=labelled))
    assert waits.seen > 20
    return waits.found


@every_method
def test_no_balancing_method_makes_the_host_wait(method: Balance):
    assert waits_of_weights(method, "cpu") == []


@every_method
def test_no_balancing_method_copies_between_host_and_device(method: Balance):
    def backward(loss: Any, *args: Any, **kwargs: Any) -> None:
        pass

    autograd = {"backward": backward, "grad": lambda loss, inputs, **kwargs: [torch.zeros_like(x) for x in inputs]}
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        patch.object(Tensor, "backward", backward),
        patch.multiple(torch.autograd, **autograd),
    ):
        assert waits_of_weights(method, "cuda") == []


@every_option
def test_no_loss_copies_between_host_and_device(task: Task):
    assert waits_on_an_imagined_gpu({"one": task}) == []


def test_the_fused_cross_entropy_does_not_wait_inside(monkeypatch: pytest.MonkeyPatch):
    """For the checks above it is one operator."""
    monkeypatch.setattr(fused, "CACHED_ELEMENTS", 100)
    logits, classes = torch.zeros(2, 3, 8, 4), torch.zeros(2, 32, 16, dtype=torch.uint8)
    with Waits() as waits:
        fused.value_and_gradient(logits, classes, torch.ones(3), torch.full((1, 3), 0.1 / 3), 255, 0.1)
    assert waits.seen > 100 and waits.found == []


def test_the_loop_waits_for_nothing_between_the_steps_it_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loading, schedule, step, pace and prefetch together, for as long as nothing is logged."""
    right, at = Trainer.train_step, []

    def train_step(self: Trainer, *arguments: Any) -> Any:
        at.append(len(waits.found))
        return right(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    run = scene_run.run(tmp_path / "run", data={"train": [scene_run.scenes(12)]}, train={"log_every_steps": 3})
    with Waits() as waits:
        train(run, TrainOptions(max_steps=6))

    assert len(at) == 6
    assert waits.found[at[0] : at[2]] == [] == waits.found[at[3] : at[5]], "steps 1, 2, 4 and 5 with what lies between"
    assert waits.found[at[2] : at[3]], "step 3 is read for the log"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_precision_makes_the_host_wait(precision: str):
    """The fused optimiser itself skips a step that the loss scale made infinite."""
    assert waits_of_a_step(small_tasks(FCOS(num_convs=1)), precision=precision) == []


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: bool((x > 0).any()),
        lambda x: torch.linalg.solve(torch.eye(3), x),
        lambda x: x.index_put_((x > 0,), x.new_zeros(())),
        lambda x: torch.nn.functional.one_hot(x.long()),
        lambda x: x.prod(dim=0),
    ],
)
def test_the_check_sees_what_waits(operation: Any):
    with Waits() as waits:
        operation(torch.arange(3.0))
    assert waits.found


def test_the_check_sees_copies_to_and_from_a_gpu():
    with FakeTensorMode(), Waits() as waits:
        there = torch.tensor([1.0, 2.0], device="cuda")
        assert len(waits.found) == 1
        there.cpu()
        there.to("cuda", torch.int64)
        torch.ones(3).to("cuda", non_blocking=True)
    assert len(waits.found) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(
    ("head", "method"), [(p.values[0], FIXED) for p in HEADS] + [(HEAD, p.values[0]) for p in METHODS]
)
def test_on_a_gpu_the_driver_sees_no_wait_either(head: Head, method: Balance):
    tasks = small_tasks(head, normals=Normals(decoder=NARROW))
    state = small_state(small_run(tasks, method), "cuda")
    batch = small_batch(tasks)

    batch = batch.pin_memory()
    for _ in range(3):
        state.train_step([batch.to(torch.device("cuda"))])
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.train_step([batch.to(torch.device("cuda"))])
    finally:
        torch.cuda.set_sync_debug_mode("default")
