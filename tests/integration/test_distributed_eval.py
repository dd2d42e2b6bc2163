"""Evaluation over several processes gives the numbers of one, also where a process has no image."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import scene_run
import torch

from visionmtl.api import distance_meters
from visionmtl.data.label_spaces import eval_names, resolve_spaces
from visionmtl.data.loader import val_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine import distributed
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.evaluator import evaluate
from visionmtl.run import Run
from visionmtl.structures import Sample

IMAGES = {"seven": 7, "two": 2}
"""Images to judge: of 7 the processes have unequal numbers, of 2 the last of three processes has none."""


def settings(count: int) -> Run:
    """Two data sets; that of the last image has boxes only, and calls it as the other does its first."""
    few = [scene_run.scenes(count - 1, split="val"), scene_run.scenes(1, split="val", size=[96, 64], labels=["boxes"])]
    return scene_run.run(data={"val": few}, train={"batch_size": 2})


def loader(run: Run, ranks: Ranks) -> Any:
    sources = open_datasets(run.data.val)
    spaces = resolve_spaces(run.tasks, sources)
    return val_loader(run.data, run.tasks, spaces, sources, 2, ranks.rank, ranks.world)


def measured(run: Run, ranks: Ranks) -> dict[str, Any]:
    """What random weights, the same in every process, are judged to be, and the images this process looked at."""
    images: list[str] = []
    net = scene_run.state(run).net.requires_grad_(False)
    data = loader(run, ranks)
    names = eval_names(run.tasks, net.spaces, open_datasets(run.data.val))
    meters = {name: run.tasks[task].meter(net.spaces[task]) for name, task in names.items()}
    meters |= distance_meters(run.tasks, net.spaces, open_datasets(run.data.val))
    each = evaluate(net, data, "cpu", meters=meters, on_image=lambda sample, *_: images.append(name_of(sample)))
    pooled = evaluate(net, data, "cpu")
    return {"results": {f"{name}, pooled": pooled[name] for name in pooled} | each, "images": images}


def name_of(sample: Sample) -> str:
    return f"{sample.image_id} of {sample.size}"


def one_of_several(groups: Iterator[None], folder: Path) -> None:
    next(groups)
    with distributed.group("cpu", timeout_s=120) as ranks:
        for name, count in IMAGES.items():
            torch.save(measured(settings(count), ranks), folder / f"{ranks.world}-{ranks.rank}-{name}.pt")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each process of runs with 2 and with 3 of them found."""
    folder = tmp_path_factory.mktemp("several")
    for world in (2, 3):
        processes.run(world, one_of_several, folder)
    return folder


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", IMAGES)
def test_several_processes_measure_what_one_does_and_all_know_it(several: Path, world: int, name: str):
    alone = measured(settings(IMAGES[name]), scene_run.ALONE)["results"]
    for rank in range(world):
        found = torch.load(several / f"{world}-{rank}-{name}.pt", weights_only=False)["results"]
        for task, result in alone.items():
            images = {"detection, pooled": IMAGES[name], "detection@scenes-2": 1}.get(task, IMAGES[name] - 1)
            assert found[task]["images"] == result["images"] == images
            # batches differ, and with them the order of sums within the network; the meters' sums are exact
            apart = differences(found[task], result)
            assert not apart, (task, apart)


def differences(found: Any, expected: Any) -> list[Any]:
    """Pairs of unlike leaves; numbers may differ in the sixth digit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return [pair for key in expected for pair in differences(found[key], expected[key])]
    if isinstance(expected, float):
        return [] if found == pytest.approx(expected, rel=1e-6) else [(found, expected)]
    return [] if json.dumps(found, default=list) == json.dumps(expected, default=list) else [(found, expected)]


@pytest.mark.parametrize("name", IMAGES)
def test_each_image_is_looked_at_once(several: Path, name: str):
    everything = sorted(measured(settings(IMAGES[name]), scene_run.ALONE)["images"])
    for world in (2, 3):
        of_rank = [
            torch.load(several / f"{world}-{rank}-{name}.pt", weights_only=False)["images"] for rank in range(world)
        ]

        assert sorted(image for images in of_rank for image in images) == everything
        assert [len(images) for images in of_rank] == [len(everything[rank::world]) for rank in range(world)]
