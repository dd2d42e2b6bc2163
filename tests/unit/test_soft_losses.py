"""What tasks learn from teachers, on numbers that can be checked by hand."""

import math

import pytest
import torch
from contract import CHANNELS, SIZE, SPACE, decoder, found, random_maps

from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.heads.fcos import FCOS
from visionmtl.ops.soft_losses import (
    area,
    content_shares,
    content_weights,
    direction_distance,
    distance_preservation,
    log_distance,
    log_distance_up_to_scale,
    num_pairs,
    soft_cross_entropy,
)
from visionmtl.tasks.base import SoftLoss, Task
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.normals import Normals
from visionmtl.tasks.segmentation import Segmentation

WHOLE = torch.ones(1, 2)  # the contents fill the input
ONE = torch.ones(())
PLAIN = SoftLoss()


def test_contents_end_where_the_padding_begins():
    image = torch.zeros(2, 3, 8, 10, dtype=torch.uint8)
    image[0, 1, :6, :5] = 9
    image[1, 2, 3, 7] = 1  # a photo that is black but for one pixel
    assert content_shares(image).tolist() == [[0.75, 0.5], [0.5, pytest.approx(0.8)]]
    assert content_shares(torch.zeros(1, 3, 4, 4)).tolist() == [[0, 0]]


def test_cells_at_the_edge_count_by_the_part_that_shows_the_image():
    content = torch.tensor([[0.75, 0.5], [1.0, 1.0]])
    weights = content_weights(content, 2, 2)
    assert weights[0].tolist() == [[1.0, 0.0], [0.5, 0.0]] and weights[1].tolist() == [[1, 1], [1, 1]]
    torch.testing.assert_close(weights.sum() / 4, area(content))


def test_classes_are_compared_at_the_temperature():
    logits, teacher, temperature = torch.tensor([0.0, 2.0]), torch.tensor([2.0, 0.0]), 2.0
    shares = (teacher / temperature).softmax(0).view(1, 2, 1, 1)
    # softmax((1, 0)) against softmax((0, 1)): KL = p - q = tanh(1/2), times T^2 = 4
    loss = soft_cross_entropy(logits.view(1, 2, 1, 1), shares, WHOLE, ONE, temperature=temperature)
    assert loss.item() == pytest.approx(4 * math.tanh(0.5), abs=1e-6)
    same = soft_cross_entropy(teacher.view(1, 2, 1, 1), shares, WHOLE, ONE, temperature=temperature)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_depth_is_compared_in_logarithms_with_or_without_the_scale():
    teacher = torch.tensor([[[1.0, 2.0], [4.0, 8.0]]]).log()
    student = teacher + math.log(2)
    assert log_distance(student, teacher, WHOLE, ONE).item() == pytest.approx(math.log(2))
    assert log_distance_up_to_scale(student, teacher, WHOLE, ONE).item() == pytest.approx(0, abs=1e-6)
    student = teacher + torch.tensor([[[0.1, -0.1], [0.1, -0.1]]])
    assert log_distance_up_to_scale(student, teacher, WHOLE, ONE).item() == pytest.approx(0.1)


def test_padding_teaches_nothing_whatever_a_teacher_says_of_it():
    content = torch.tensor([[1.0, 0.5]])
    teacher = torch.tensor([[[0.0, math.inf]]])
    student = torch.tensor([[[0.5, 7.0]]], requires_grad=True)
    loss = log_distance(student, teacher, content, area(content))
    loss.backward()
    assert loss.item() == 0.5 and student.grad is not None and student.grad.tolist() == [[[1, 0]]]


def test_directions_are_compared_whatever_their_length():
    pred, teacher = torch.tensor([3.0, 0, 0]).view(1, 3, 1, 1), torch.tensor([0.5, 0.5, 0]).view(1, 3, 1, 1)
    assert direction_distance(pred, teacher, WHOLE, ONE).item() == pytest.approx(1 - math.sqrt(0.5))


def test_distances_between_features_are_compared_in_units_of_the_old_mean():
    """One image whose 16 cells have the values 0 to 15, and the same spread twice as far."""
    old = torch.arange(16.0).view(1, 1, 4, 4)
    total = num_pairs(1, old)
    assert total == 256
    assert distance_preservation({3: old + 7}, {"3": old}, total).item() == pytest.approx(0, abs=1e-6)
    squares = (torch.arange(16.0)[:, None] - torch.arange(16.0)) ** 2
    # four times each squared distance: the difference is three times the old one
    wanted = ((3 * squares / squares.mean()) ** 2).mean()
    assert distance_preservation({3: 2 * old}, {"3": old}, total).item() == pytest.approx(wanted.item(), rel=1e-5)
    both = distance_preservation({3: 2 * old, 4: old}, {"3": old, "4": old}, total)
    assert both.item() == pytest.approx(wanted.item() / 2, rel=1e-5)


TASKS = {
    "segmentation": Segmentation(dropout=0),
    "depth": Depth(),
    "depth in bins": Depth(head="bins", num_bins=8),
    "normals": Normals(),
    "aligned": Detection(head=Aligned(num_convs=1)),
    "aligned with bins": Detection(head=Aligned(num_convs=1, bins=4)),
    "fcos": Detection(head=FCOS(num_convs=1)),
}
every_task = pytest.mark.parametrize("task", [pytest.param(task, id=name) for name, task in TASKS.items()])


def taught(task: Task, raw: object, soft: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    soft = {**soft, "content": torch.ones(2, 2)}
    return task.distill(raw, soft, task.count_soft(soft), PLAIN)


@every_task
def test_a_student_that_says_what_its_teacher_says_has_learnt_it(task: Task):
    raw = decoder(task)(random_maps(task.levels, 2))
    soft = task.soft_targets(raw, PLAIN, None, False, 1.0)
    parts = taught(task, raw, {name: value.detach() for name, value in soft.items()})
    assert all(abs(part.item()) < 1e-5 for part in parts.values()), parts


@every_task
def test_what_a_teacher_says_moves_every_parameter_of_a_student(task: Task):
    module = decoder(task)
    with torch.no_grad():
        soft = task.soft_targets(module(random_maps(task.levels, 2)), PLAIN, None, False, 1.0)
        if "quality" in soft:  # an untrained head's scores are too low to teach boxes
            soft = {**soft, "quality": soft["quality"] + 0.5, "weighted_boxes": soft["weighted_boxes"] + 9}
    parts = taught(task, module(random_maps(task.levels, 2)), soft)
    torch.stack(list(parts.values())).sum().backward()
    assert all(part > 0 and part.isfinite() for part in parts.values())
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_task
def test_the_view_of_a_mirrored_image_is_turned_back(task: Task):
    """Maps of an image and of its mirror image, through a head whose kernels are mirrored too, agree."""
    module = decoder(task).eval()
    levels = [level for level in task.levels if SIZE[1] % 2**level == 0]
    if isinstance(task, Detection):
        task = task.model_copy(update={"head": task.head.model_copy(update={"levels": tuple(levels)})})
        module = decoder(task).eval()
    maps = random_maps(task.levels, 1)
    plain = task.soft_targets(module(maps), PLAIN, None, False, 1.0)
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.flip(-1)
    raw = module({level: one.flip(-1) for level, one in maps.items()})
    if isinstance(task, Normals):
        raw = raw * torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
    if isinstance(task, Detection):  # left and right change places
        sides = raw["distances"].unflatten(-1, (4, -1))
        raw = {**raw, "distances": sides[:, :, [2, 1, 0, 3]].flatten(2)}
    mirrored = task.soft_targets(raw, PLAIN, None, True, 1.0)
    torch.testing.assert_close(mirrored, plain, rtol=1e-4, atol=1e-3)


def test_cells_that_cannot_be_mirrored_are_an_error():
    task = TASKS["aligned"]  # 96 px are no multiple of 128
    raw = decoder(task)(random_maps(task.levels, 1))
    with pytest.raises(ValueError, match=r"96 px wide, .* stride 128.*distill.flip=false"):
        task.soft_targets(raw, PLAIN, None, True, 1.0)


@pytest.mark.parametrize("task", [TASKS["segmentation"], TASKS["aligned"], TASKS["fcos"]], ids=lambda t: t.type)
def test_classes_in_another_order_are_put_right(task: Task):
    raw = decoder(task)(random_maps(task.levels, 1))
    plain = task.soft_targets(raw, PLAIN, None, False, 1.0)
    ordered = task.soft_targets(raw, PLAIN, torch.tensor([2, 0, 1]), False, 1.0)
    name, axis = ("shares", 1) if task.type == "segmentation" else ("scores", 2)
    for new, old in enumerate([2, 0, 1]):
        torch.testing.assert_close(ordered[name].select(axis, new), plain[name].select(axis, old))


def test_a_teacher_of_half_the_size_sees_everything_twice_as_near():
    task = Depth()
    raw = torch.zeros(1, 1, 2, 2)  # 1 m
    assert task.soft_targets(raw, PLAIN, None, False, 2.0)["log_depth"].exp().unique().item() == pytest.approx(2)


def test_the_mean_box_is_weighted_by_quality():
    """Two teachers of one cell: 0.6 and 0.2 sure."""
    one = {"quality": torch.tensor([[0.6]]), "weighted_boxes": torch.tensor([[[0.0, 0, 10, 10]]]) * 0.6}
    other = {"quality": torch.tensor([[0.2]]), "weighted_boxes": torch.tensor([[[0.0, 0, 30, 10]]]) * 0.2}
    soft = {name: (one[name] + other[name]) / 2 for name in one}
    assert (soft["weighted_boxes"] / soft["quality"][..., None]).flatten().tolist() == pytest.approx([0, 0, 15, 10])


def test_fcos_and_the_task_aligned_head_teach_each_other():
    fcos, aligned = TASKS["fcos"], TASKS["aligned"]
    aligned.check_teacher(fcos)
    maps = random_maps(fcos.levels, 2)
    with torch.no_grad():
        soft = fcos.soft_targets(decoder(fcos)(maps), PLAIN, None, False, 1.0)
    parts = taught(aligned, decoder(aligned)(maps), soft)
    assert set(parts) == {"class", "box"} and all(part.isfinite() for part in parts.values())
    with pytest.raises(ValueError, match=r"levels \(3, 4\) and the student's on \(3, 4, 5, 6, 7\)"):
        aligned.check_teacher(Detection(head=FCOS(levels=(3, 4))))


def test_class_scores_are_learnt_by_quality_focal_loss():
    task = Detection(head=Aligned(levels=(3,), num_convs=0))
    logits = torch.zeros(1, 1, 2)
    raw = {"logits": logits, "distances": torch.zeros(1, 1, 4), "quality": None, "shapes": [(3, 1, 1)]}
    soft = {
        "scores": torch.tensor([[[1.0, 0.5]]]), "quality": torch.ones(1, 1),
        "weighted_boxes": task.head.decode(raw)[0], "content": WHOLE,
    }  # fmt: skip
    parts = task.distill(raw, soft, {"soft_quality": torch.tensor(2.0)}, PLAIN)  # type: ignore[arg-type]
    # |1 - 0.5|^2 * log 2, and 0 for the class that agrees, over 2
    assert parts["class"].item() == pytest.approx(0.25 * math.log(2) / 2)
    assert parts["box"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", found(Task))
def test_a_task_learns_from_teachers_or_says_that_it_cannot(kind: type[Task]):
    task = kind()
    if kind.distill is Task.distill:
        with pytest.raises(ValueError, match=r"does not say how it learns from a teacher.*leave it out"):
            task.check_teacher(task)
        return
    task.check_teacher(task)
    raw = task.build(CHANNELS, SPACE)(random_maps(task.levels, 2))
    soft = task.soft_targets(raw, PLAIN, None, False, 1.0)
    assert all(value.dtype == torch.float32 and value.shape[0] == 2 for value in soft.values())
    assert all(name.startswith("soft_") for name in task.count_soft({**soft, "content": torch.ones(2, 2)}))
    assert set(task.soft_settings) <= set(SoftLoss.model_fields)
