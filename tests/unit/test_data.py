"""Batches depend on seed and epoch alone, and each label teaches exactly the tasks it fits."""

import pickle
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scene_run import epoch

from visionmtl.data.label_spaces import align, eval_names, resolve_spaces, supervises
from visionmtl.data.loader import Data, train_loader, val_loader
from visionmtl.data.transforms.augment import Augment
from visionmtl.data.workers import choose_workers
from visionmtl.datasets import Dataset, NamedDataset, open_datasets
from visionmtl.structures import IGNORE, Batch, Boxes, LabelSpace, Sample
from visionmtl.tasks.base import Task

ANIMALS = LabelSpace("animals", ("cat", "dog"), ((1, 2, 3), (4, 5, 6)))
TOOLS = LabelSpace("tools", ("saw",), ((1, 2, 3),))
SPACES = {"animals": ANIMALS, "tools": TOOLS}


class Drawn(Dataset):
    """Image number i is filled with i; every third has no depth. No `type`, so that discovery passes it by."""

    num: int = 10
    first: int = 0
    fields: dict[str, str | None] = {"depth_m": None, "segmentation": "animals"}

    def build(self) -> "_Drawn":
        return _Drawn(self)


class _Drawn:
    def __init__(self, spec: Drawn) -> None:
        self.spec = spec
        self.provides = {field: SPACES[name] if name else None for field, name in spec.fields.items()}

    def __len__(self) -> int:
        return self.spec.num

    def read(self, index: int) -> Sample:
        number = self.spec.first + index
        labels = {"segmentation": np.zeros((20, 30), np.uint8), "depth_m": np.full((20, 30), 1.0 + number, np.float32)}
        if index % 3 == 2:
            labels["depth_m"] = None
        given = {field: labels[field] for field in self.provides}
        return Sample(image=np.full((20, 30, 3), number, np.uint8), image_id=str(number), **given)


class _Task(Task):
    """Collates to the image numbers it was given, -1 where it got None."""

    space: str | None = None

    def collate(self, samples: Any, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {"seen": torch.tensor([-1 if sample is None else int(sample.image_id) for sample in samples])}

    def count(self, targets: dict[str, torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {"images": (targets["seen"] >= 0).sum().float()}

    levels: ClassVar[Any] = ()
    build: ClassVar[Any] = None  # the loader asks for `collate` only
    loss: ClassVar[Any] = None
    predict: ClassVar[Any] = None
    meter: ClassVar[Any] = None
    truth: ClassVar[Any] = None
    draw: ClassVar[Any] = None


class Depth(_Task):
    field: ClassVar[str] = "depth_m"


class Segmentation(_Task):
    field: ClassVar[str] = "segmentation"


def loader(*train: Drawn, batch_size: int = 3, workers: int = 0, seed: int = 0, rank: int = 0, world: int = 1):
    augment = Augment(zoom=(1, 2), flip=0.5, brightness=0.3, hue_turns=0.1)
    data = Data(train=train or (Drawn(),), val=[Drawn()], size=(24, 32), augment=augment, workers=workers)
    tasks: dict[str, Task] = {"depth": Depth(), "animals": Segmentation(space="animals")}
    if any("tools" in one.fields.values() for one in data.train):
        tasks["tools"] = Segmentation(space="tools")
    sources = open_datasets(data.train)
    return train_loader(data, tasks, resolve_spaces(tasks, sources), sources, batch_size, seed, rank, world)


def numbers(batch: Batch) -> list[int]:
    return batch.image[:, 0, 0, 0].tolist()


def assert_same(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others) > 0
    for a, b in zip(some, others, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.color, b.color)
        assert a.counts == b.counts
        for task in a.targets:
            assert torch.equal(a.targets[task]["seen"], b.targets[task]["seen"])
            assert torch.equal(a.labelled[task], b.labelled[task])


def test_batches_do_not_depend_on_the_number_of_workers():
    inline = loader(Drawn(num=20))
    for workers in (1, 2):
        processes = loader(Drawn(num=20), workers=workers)
        for number in (0, 1):
            assert_same(list(epoch(inline, number)), list(epoch(processes, number)))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_exactly_the_remaining_batches(workers):
    whole = list(epoch(loader(Drawn(num=20)), 4))
    resumed = loader(Drawn(num=20), workers=workers)
    next(epoch(resumed, 4))  # an epoch that was broken off does not leak into the next

    assert_same(list(epoch(resumed, 4, start=2)), whole[2:])
    assert list(epoch(resumed, 4, start=len(whole))) == []


def test_epochs_and_seeds_differ():
    first = [numbers(batch) for batch in epoch(loader(Drawn(num=50)), 0)]
    assert first != [numbers(batch) for batch in epoch(loader(Drawn(num=50)), 1)]
    assert first != [numbers(batch) for batch in epoch(loader(Drawn(num=50), seed=1), 0)]


def test_every_sample_is_augmented_anew_each_epoch():
    epochs = [list(epoch(loader(), number)) for number in range(2)]
    matrices = [tuple(matrix.flatten().tolist()) for batches in epochs for batch in batches for matrix in batch.color]
    assert len(set(matrices)) == len(matrices) == 18


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(epoch(loader(workers=1), 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_one_common_batch_without_overlap():
    alone = [numbers(batch) for batch in epoch(loader(Drawn(num=26), batch_size=8), 3)]
    ranks = [list(epoch(loader(Drawn(num=26), batch_size=4, rank=rank, world=2), 3)) for rank in range(2)]

    assert len(alone) == 3 and all(len(set(batch)) == 8 for batch in alone)
    assert alone == [numbers(left) + numbers(right) for left, right in zip(*ranks, strict=True)]


def test_a_label_teaches_only_the_tasks_of_its_space():
    train = Drawn(num=9), Drawn(num=9, first=100, fields={"segmentation": "tools"})
    for batch in epoch(loader(*train), 0):
        has_animals = torch.tensor([number < 100 for number in numbers(batch)])
        has_depth = has_animals & torch.tensor([number % 3 != 2 for number in numbers(batch)])
        assert torch.equal(batch.labelled["animals"], has_animals)
        assert torch.equal(batch.labelled["tools"], ~has_animals)
        assert torch.equal(batch.labelled["depth"], has_depth)
        for task, labelled in batch.labelled.items():
            expected = torch.where(labelled, torch.tensor(numbers(batch)), -1)
            assert torch.equal(batch.targets[task]["seen"], expected)


def test_images_are_padded_with_zeros_at_the_bottom_right():
    data = Data(train=[Drawn(first=50)], val=[Drawn(first=50)], size=(24, 30))
    batch = next(iter(val_loader(data, {}, {}, open_datasets(data.val), 2, workers=0)))
    assert batch.image.shape == (2, 3, 24, 30) and batch.image.dtype == torch.uint8
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert (batch.image[1, :, :20] == 51).all() and (batch.image[:, :, 20:] == 0).all()


def test_without_colour_settings_no_matrices_travel():
    data = Data(train=[Drawn()], val=[Drawn()], size=(24, 32), workers=0)
    assert next(epoch(train_loader(data, {}, {}, open_datasets(data.train), 2, 0))).color is None


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_sees_every_image_once_with_its_original(workers):
    data = Data(train=[Drawn()], val=[Drawn(num=7), Drawn(num=4, first=7)], size=(10, 32), workers=workers)
    sources, tasks = open_datasets(data.val), {"depth": Depth()}
    spaces = resolve_spaces(tasks, sources)
    ranks = [val_loader(data, tasks, spaces, sources, 4, rank, 2) for rank in range(2)]
    batches = [batch for rank in ranks for batch in rank]

    assert [len(rank) for rank in ranks] == [2, 2] and [len(batch.samples) for batch in batches] == [4, 2, 4, 1]
    assert sorted(int(sample.image_id) for batch in batches for sample in batch.samples) == list(range(11))
    for batch in batches:
        assert all(meta.size == (20, 30) and meta.content_size == (10, 15) for meta in batch.metas)
        assert batch.labelled["depth"].tolist() == [sample.depth_m is not None for sample in batch.samples]
    assert len(list(val_loader(data, tasks, spaces, sources, 4, limit=1))) == 1


def test_jobs_for_spawned_workers_pickle():
    pickle.loads(pickle.dumps(loader().dataset))


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (Segmentation(), {"depth_m": None}, "no training data set provides; they provide depth_m; add a data set"),
        (Segmentation(space="animal"), {"segmentation": "animals"}, "did you mean 'animals'.*correct tasks.t.space"),
    ],
)
def test_a_task_nobody_can_teach_is_an_error(task, fields, message):
    with pytest.raises(ValueError, match=message):
        resolve_spaces({"t": task}, open_datasets([Drawn(fields=fields)]))


def test_several_label_spaces_ask_for_a_choice():
    sources = open_datasets([Drawn(), Drawn(fields={"segmentation": "tools"})])
    with pytest.raises(ValueError, match=r"can learn animals, tools; .* tasks.t.space=NAME"):
        resolve_spaces({"t": Segmentation()}, sources)
    assert resolve_spaces({"t": Segmentation(space="tools")}, sources) == {"t": TOOLS}


def test_validation_in_another_label_space_is_an_error():
    data = Data(train=[Drawn()], val=[Drawn(fields={"segmentation": "tools"})], size=(8, 8))
    with pytest.raises(ValueError, match=r"learns animals, but the validation data .* with Drawn .tools."):
        eval_names({"t": Segmentation()}, {"t": ANIMALS}, open_datasets(data.val))


class _Fixed:
    """A reader of one image with a box of each class and a column of pixels of each."""

    def __init__(self, space: LabelSpace) -> None:
        self.provides, self.count = {"boxes": space, "segmentation": space}, len(space.classes)

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Sample:
        labels = np.arange(self.count)
        boxes = Boxes(np.ones((self.count, 4), np.float32), labels, labels > 9, np.ones(self.count, np.float32))
        pixels = np.append(labels, IGNORE).astype(np.uint8)[None]
        return Sample(image=np.zeros((1, 1, 3), np.uint8), image_id="0", boxes=boxes, segmentation=pixels)


def of_classes(*classes: str) -> LabelSpace:
    return LabelSpace("animals", classes, tuple((0, 0, 0) for _ in classes))


def test_a_split_that_lists_fewer_classes_is_read_by_their_names():
    learned, source = of_classes("cat", "cow", "dog"), NamedDataset("val", _Fixed(of_classes("dog", "cat")))
    spaces = {"t": learned}

    (aligned,) = align([source], {"t": Segmentation()}, spaces)
    sample = pickle.loads(pickle.dumps(aligned)).read(0)

    assert sample.segmentation.tolist() == [[2, 0, IGNORE]] and sample.boxes.labels.tolist() == [0, 1]
    assert supervises(aligned, Segmentation(), learned) and not supervises(source, Segmentation(), learned)
    assert aligned.notes == ["segmentation: lists no class cow"]
    assert align([aligned], {"t": Segmentation()}, spaces) == [aligned]


def test_a_split_with_a_class_that_nobody_learns_is_refused_by_its_name():
    source = NamedDataset("val", _Fixed(of_classes("cat", "pig")))
    with pytest.raises(ValueError, match=r"val labels 'segmentation' with classes pig, .* lacks dog; .*; correct"):
        align([source], {"t": Segmentation()}, {"t": of_classes("cat", "dog")})


def test_too_little_data_for_one_step_is_an_error():
    with pytest.raises(ValueError, match="an epoch has 10 images, but one step takes 6 x 2"):
        loader(batch_size=6, world=2)


def test_workers_are_chosen_with_a_reason():
    assert choose_workers(3) == (3, "data.workers=3")
    number, reason = choose_workers("auto", processes=1000)
    assert number == 0 and "cores for 1000 processes" in reason
