"""Every recipe in `configs/` says what it costs and may be expected to give, fits its data, and makes a step."""

import re
from itertools import takewhile
from pathlib import Path

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from write_cityscapes import write_cityscapes
from write_coco import write_coco
from write_folder import write_standard_folder
from write_nyuv2 import drawn_frames, write_prepared

import visionmtl.cli.train as tool
from visionmtl import run as config
from visionmtl.cli import main
from visionmtl.config import loader
from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.datasets import Dataset, open_datasets
from visionmtl.network import build_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TREES = {file.stem: loader.read(file).values for file in sorted(CONFIGS.glob("*.yaml"))}
RECIPES = [name for name, values in TREES.items() if {"model", "data"} <= values.keys()]
BASES = [name for name in TREES if name not in RECIPES]

TRAINING_IMAGES = {"coco": 118_287, "cityscapes": 2975, "nyuv2": 795}  # of the official splits
TRAINING_IMAGES["folder"] = 1000  # as its header assumes
SMALL = [
    *("data.size=[64,128]", "data.workers=0", "train.batch_size=2", "train.precision=fp32", "train.compile=false"),
    "model.encoder.pretrained=false",
]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each data set in its official layout, drawn."""
    root = tmp_path_factory.mktemp("official")
    write_coco(root / "coco", num_train=2, num_val=2)
    write_cityscapes(root / "cityscapes", num_train=2, num_val=2)
    (root / "nyuv2").mkdir()
    write_standard_folder(root / "folder")
    metas = drawn_frames(2, (480, 640))
    for split in ("train", "test"):
        write_prepared(root / "nyuv2", metas, split)
    return root


def kinds(name: str) -> list[str]:
    """The types of the data sets that a recipe trains on."""
    return [dataset["type"] for dataset in TREES[name]["data"]["train"]]


def placed(name: str, official: Path) -> list[str]:
    """The override that tells a recipe where its data lies: its folder, or that of all where it mixes several."""
    of = kinds(name)
    return [] if of == ["scenes"] else [f"data.root={official if len(of) > 1 else official / of[0]}"]


def header(name: str) -> str:
    """The comment that a config opens with, on one line."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))


LARGE = [pytest.param(name, marks=pytest.mark.slow) if name.endswith("_resnet50") else name for name in RECIPES]


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_trains_and_evaluates(name: str, official: Path, tmp_path: Path):
    small = [*SMALL, "data.eval_size=[128,256]"] if "eval_size" in TREES[name]["data"] else SMALL
    options = ["--device", "cpu", "--dry-run", "--output", str(tmp_path / "out")]
    small = [*small, "optim.warmup_steps=1"]  # the drawn data give a run of few steps

    assert main(["train", str(CONFIGS / f"{name}.yaml"), *placed(name, official), *small, *options]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_network_fits_the_sizes_of_its_recipe(name: str, official: Path):
    run = config.load(CONFIGS / f"{name}.yaml", [*placed(name, official), "model.encoder.pretrained=false"])
    spaces = resolve_spaces(run.tasks, open_datasets(run.data.train))
    dense = [task for task, spec in run.tasks.items() if spec.field not in ("boxes", "image_labels")]

    with FakeTensorMode(), torch.no_grad():  # shapes without values: nothing is computed
        net = build_model(run.model, run.tasks, spaces, run.data.size).eval()
        for height, width in {run.data.size, run.data.input_size}:
            raw = net(torch.empty(1, 3, height, width, dtype=torch.uint8))

            assert {task: raw[task].shape[2:] for task in dense} == dict.fromkeys(dense, (height // 4, width // 4))


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_commands_are_those_of_the_file(name: str):
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    commands = [line.partition("tools/train.py ")[2] for line in lines if "tools/train.py" in line]
    assert commands

    for command in commands:
        args = tool.parser().parse_intermixed_args(command.split())
        assert args.config == f"configs/{name}.yaml"
        config.load(CONFIGS.parent / args.config, args.overrides)


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_states_the_steps_it_takes(name: str):
    said = re.search(r"([\d,]+) steps of (\d+) images of (\d+)x(\d+)", header(name))
    run = config.load(CONFIGS / f"{name}.yaml", ["data.root=DIR"])
    known = [getattr(dataset, "num_images", TRAINING_IMAGES.get(dataset.type)) for dataset in run.data.train]
    images = run.data.sampling.epoch_images or sum(known)

    steps = run.train.epochs * (images // run.train.batch_size)
    assert said and said.groups() == (f"{steps:,}", f"{run.train.batch_size}", *map(str, run.data.size))


def test_every_official_data_set_has_recipes_with_resnet50_and_with_a_small_encoder():
    not_official = {
        "scenes": "drawn by ourselves", "folder": "the user's own", "subset": "a part of another",
        "shards": "another in tar files",
    }  # fmt: skip
    shipped = [kind for kind, member in Dataset.members().items() if member.__module__.startswith("visionmtl.")]
    wanted = {(kind,) for kind in shipped if kind not in not_official} - {("nyuv2_mat",)}  # nyuv2 unprepared
    wanted |= {("coco", "cityscapes", "nyuv2")}
    encoders: dict[tuple[str, ...], set[bool]] = {}
    for name in RECIPES:
        encoder = TREES[name]["model"]["encoder"]["name"].partition(".")[0]
        encoders.setdefault(tuple(kinds(name)), set()).add(encoder == "resnet50")
        assert "resnet50" not in name or encoder == "resnet50"

    assert {of for of, found in encoders.items() if found == {True, False}} == wanted
    assert {"nyuv2_40_resnet50", "nyuv2_40_mobilenetv4"} <= set(RECIPES)


def test_every_encoder_has_the_weights_that_it_shall_start_from():
    started = [values["model"]["encoder"] for values in map(TREES.get, RECIPES) if values]
    named = {encoder["name"] for encoder in started if encoder.get("pretrained")}

    assert named and named <= set(timm.list_pretrained())  # a tag in each name: timm may change which one is meant


@pytest.mark.parametrize("name", [name for name in RECIPES if kinds(name) != ["scenes"]])
def test_a_recipe_without_its_data_asks_for_the_folder(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(CONFIGS / f"{name}.yaml")]) == 2

    assert "data.root: left open (???); it must be given; add data.root=VALUE" in capsys.readouterr().err
