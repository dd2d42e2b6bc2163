"""One optimiser step of k micro-batches is the step of one batch of k times the size, also with partial labels."""

from collections.abc import Callable

import pytest
import scene_run
import torch
from contract import SIZE, sample
from torch import Tensor, nn
from toy_run import small_run, small_state, small_tasks

from visionmtl.balance.upgrad import UPGrad
from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.heads.base import Head
from visionmtl.modeling.heads.fcos import FCOS
from visionmtl.structures import Batch, Sample
from visionmtl.tasks.base import Task
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.normals import Normals
from visionmtl.tasks.segmentation import Segmentation

TOLERANCE = 1e-5  # of the gradient's length

BATCH = 4
LABELLED = {  # by name: the images with a label, of each task
    "all": lambda task, image: True,
    "one of four": lambda task, image: image == 1,
    "each task others": lambda task, image: (image + len(task)) % 3 != 0,
    "a task without": lambda task, image: task != "depth",
}


def batch_of(tasks: dict[str, Task], images: range, labelled: Callable[[str, int], bool]) -> Batch:
    samples = {image: sample(image, num_boxes=1 + 2 * image) for image in images}
    batch = Batch(
        image=torch.stack(
            [
                torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(image))
                for image in images
            ]
        ),
        targets={},
        labelled={name: torch.tensor([labelled(name, image) for image in images]) for name in tasks},
    )
    for name, task in tasks.items():
        known: list[Sample | None] = [samples[image] if labelled(name, image) else None for image in images]
        batch.targets[name] = task.collate(known, SIZE)
        batch.counts[name] = task.count(batch.targets[name], SIZE)
    return batch


def gradients(tasks: dict[str, Task], micro_batches: int, labelled: Callable[[str, int], bool]) -> dict[str, Tensor]:
    """Those of one step with plain SGD of rate 1, by parameter; BatchNorm takes its running statistics."""
    optim = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": None, "ema_decay": None}
    run = small_run(tasks, optim={**optim, "schedule": "constant"}, accumulate=micro_batches)
    trainer = small_state(run)
    trainer.net.train = lambda mode=True: nn.Module.train(trainer.net, False)  # type: ignore[method-assign]
    size = BATCH // micro_batches
    batches = [batch_of(tasks, range(i * size, (i + 1) * size), labelled) for i in range(micro_batches)]
    before = {name: value.detach().clone() for name, value in trainer.net.named_parameters()}
    trainer.train_step(batches)
    return {name: before[name] - value.detach() for name, value in trainer.net.named_parameters()}


@pytest.mark.parametrize("head", [Aligned(num_convs=1), Aligned(num_convs=1, bins=8), FCOS(num_convs=1)], ids=str)
@pytest.mark.parametrize("labelled", LABELLED.values(), ids=LABELLED)
def test_micro_batches_give_the_gradient_of_their_common_batch(head: Head, labelled: Callable[[str, int], bool]):
    tasks = small_tasks(head, normals=Normals(decoder=Depth().decoder))
    tasks["bins"] = Depth(decoder=tasks["depth"].decoder, head="bins")  # type: ignore[attr-defined]
    whole = gradients(tasks, 1, labelled)
    for micro_batches in (2, 4):
        parts = gradients(tasks, micro_batches, labelled)
        for prefix in ("trunk", *(f"decoders.{name}" for name in tasks)):
            one, other = (
                torch.cat([value.flatten() for name, value in of.items() if name.startswith(prefix)])
                for of in (whole, parts)
            )
            assert (one - other).norm() <= TOLERANCE * one.norm(), f"{prefix}, {micro_batches} micro-batches"


@pytest.mark.parametrize("changes", [{"class_weights": (1.0, 2.0, 3.0)}, {"label_smoothing": 0.1}], ids=str)
def test_so_do_weighted_and_smoothed_classes(changes: dict[str, object]):
    tasks: dict[str, Task] = {"classes": Segmentation.model_validate({"dropout": 0, **changes})}
    whole, parts = (gradients(tasks, n, LABELLED["one of four"]) for n in (1, 4))
    one, other = (torch.cat([value.flatten() for value in of.values()]) for of in (whole, parts))
    assert (one - other).norm() <= TOLERANCE * one.norm()


@pytest.mark.parametrize("changes", [{"region_loss": "dice"}, {"region_loss": "lovasz"}, {"hardest": 0.5}], ids=str)
def test_losses_that_rank_or_divide_sums_count_each_micro_batch_by_its_share_of_the_pixels(changes: dict[str, object]):
    """Their value over a batch is no sum over images, so equality is not to be had; unlabelled ones change nothing."""
    tasks: dict[str, Task] = {"classes": Segmentation.model_validate({"dropout": 0, **changes})}
    whole, parts = (gradients(tasks, n, LABELLED["one of four"]) for n in (1, 4))
    one, other = (torch.cat([value.flatten() for value in of.values()]) for of in (whole, parts))
    assert (one - other).norm() <= 1e-4 * one.norm(), "the one labelled image is the whole step, wherever it lies"


def test_the_weights_of_a_step_are_the_mean_over_the_micro_batches_that_teach_the_task():
    tasks = small_tasks()
    batches = [batch_of(tasks, range(i, i + 1), LABELLED["one of four"]) for i in range(4)]

    def weights(micro_batches: list[Batch]) -> dict[str, float]:
        trainer = small_state(small_run(tasks, UPGrad(), accumulate=len(micro_batches)))
        trainer.net.train = lambda mode=True: nn.Module.train(trainer.net, False)  # type: ignore[method-assign]
        return {task: weight.item() for task, weight in trainer.train_step(micro_batches).weights.items()}

    assert weights(batches) == pytest.approx(weights(batches[1:2]), rel=1e-3)


def test_what_detection_is_divided_by_is_counted_under_the_random_numbers_of_the_step(monkeypatch: pytest.MonkeyPatch):
    """Between two micro-batches segmentation's dropout draws in the step, and not in the pass that counts."""
    encoder = {"name": "test_resnet", "drop_path": 0.5}
    run = scene_run.run(names=("segmentation", "detection"), model={"encoder": encoder}, train={"accumulate": 2})
    trainer = scene_run.state(run)
    with torch.no_grad():
        for name, parameter in trainer.net.trunk.encoder.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.fill_(
                    1.0
                )  # timm starts residual branches at 0, of which dropping a path would change nothing
    counted: dict[bool, list[float]] = {True: [], False: []}
    assign = Aligned._assign

    def watched(self: Aligned, *arguments: Tensor) -> object:
        target = assign(self, *arguments)
        counted[torch.is_grad_enabled()].append(float(target[0].quality.sum()))
        return target

    monkeypatch.setattr(Aligned, "_assign", watched)
    trainer.train_step(scene_run.batches(run)[:2])

    assert len(counted[True]) == 2 and counted[True] == pytest.approx(counted[False], rel=1e-6)
