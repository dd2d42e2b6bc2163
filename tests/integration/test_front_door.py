"""`import visionmtl`: loaded at once, with the predictions of evaluation, and under the names plug-ins know."""

import contextlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scene_run
import torch
from PIL import Image

import visionmtl
from visionmtl import cli
from visionmtl.api import Evaluation, place
from visionmtl.engine.checkpoint import open_model
from visionmtl.engine.distributed import Ranks
from visionmtl.inference.predictor import Result, ResultBoxes
from visionmtl.network import build_model
from visionmtl.structures import Detections, LabelSpace
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection

NOISE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of a run that was not trained, with boxes, classes, depth and normals, in bf16."""
    run = scene_run.run(names=("detection", "segmentation", "depth", "normals"), train={"precision": "bf16"})
    return scene_run.save_untrained(run, tmp_path_factory.mktemp("run")).parent.parent


@pytest.fixture(scope="module")
def model(folder: Path) -> visionmtl.Predictor:
    return visionmtl.load(folder, device="cpu")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_predictions_are_those_of_evaluation_bit_for_bit(folder: Path, precision: str):
    opened = open_model(folder, "cpu", [f"train.precision={precision}"])
    evaluated = []
    evaluation = Evaluation(opened, Ranks(0, 1, torch.device("cpu")), (), None)
    evaluation.measure(on_image=lambda sample, predictions, _: evaluated.append((sample.image, predictions)))

    results = visionmtl.Predictor(opened)([image for image, _ in evaluated])

    for result, (_, of_evaluation) in zip(results, evaluated, strict=True):
        boxes = of_evaluation["detection"]
        assert np.array_equal(result.boxes.xyxy, boxes.xyxy) and np.array_equal(result.boxes.scores, boxes.scores)
        for field, task in (("segmentation", "segmentation"), ("depth_m", "depth"), ("normals", "normals")):
            assert np.array_equal(getattr(result, field), of_evaluation[task]), field


def test_the_precision_is_the_runs_unless_another_is_asked_for(folder: Path, model):
    exact = visionmtl.load(folder, device="cpu", precision="fp32")
    assert model.precision == "bf16"
    assert not np.array_equal(model(NOISE).depth_m, exact(NOISE).depth_m)


def test_a_result_has_the_size_of_its_image_and_documented_types(model):
    result = model(NOISE)

    assert result.segmentation.shape == (50, 70) and result.segmentation.dtype == np.uint8
    assert result.depth_m.shape == (50, 70) and result.depth_m.dtype == np.float32
    assert result.normals.shape == (50, 70, 3)
    assert len(result.boxes.names) == len(result.boxes) == len(result.boxes.distance_m)
    assert result.plot().size[0] > 4 * 70


def test_every_kind_of_input_gives_the_same_result(model, tmp_path: Path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    inputs = [
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        Image.fromarray(NOISE),
        torch.from_numpy(NOISE.copy()).permute(2, 0, 1),
    ]

    expected = model(NOISE).depth_m
    assert all(np.array_equal(model(one).depth_m, expected) for one in inputs)
    assert [result.source for result in model(tmp_path)] == [str(tmp_path / "a.png")]
    assert len(model([NOISE, NOISE[:20], NOISE])) == 3
    assert model([]) == []


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (NOISE.astype(np.float32), r"image 0 is float32 \[50, 70, 3\]; uint8 .* is needed; read files"),
        (torch.zeros(50, 70, 3, dtype=torch.uint8), r"torch.uint8 tensor \[50, 70, 3\]; uint8 \[3, H, W\]"),
        (3, r"int is no image; a path, NumPy"),
    ],
)
def test_what_is_no_image_is_refused(model, image, said: str):
    with pytest.raises(ValueError, match=said):
        model(image)


def test_only_the_chosen_tasks_are_computed(folder: Path):
    model = visionmtl.load(folder, device="cpu", tasks=["depth"])
    result = model(NOISE)

    assert set(result.predictions) == {"depth"} and set(model.net.decoders) == {"depth"}
    assert result.boxes is None and result.segmentation is None and result.depth_m is not None
    with pytest.raises(ValueError, match=r"there is no task 'dpeth' \(did you mean 'depth'\?\)"):
        visionmtl.load(folder, device="cpu", tasks=["dpeth"])


def test_distance_is_the_median_depth_of_the_inner_half_of_a_box():
    depth_m = np.full((40, 40), 9, np.float32)
    depth_m[10:30, 10:30] = 2  # the inner half of the first box
    depth_m[10:30, 10:18] = 3
    boxes = np.array([[0, 0, 40, 40], [39, 39, 40, 40], [5.2, 5.2, 5.4, 5.4]], np.float32)

    result = ResultBoxes(boxes, np.ones(3, np.float32), np.zeros(3, np.int64), ["a"] * 3, depth_m)

    assert result.distance_m.tolist() == [2, 9, 9]
    assert replace(result, depth_m=None).distance_m is None


def test_boxes_are_chosen_by_number_slice_and_mask():
    xyxy = np.array([[0, 0, 2, 2], [0, 2, 2, 4], [2, 2, 4, 4]], np.float32)
    depth_m = np.array([[1, 1, 9, 9]] * 2 + [[2, 2, 3, 3]] * 2, np.float32)
    scores, labels = np.array([0.9, 0.8, 0.25], np.float32), np.array([4, 5, 4])
    boxes = ResultBoxes(xyxy, scores, labels, ["sofa", "bed", "sofa"], depth_m)

    for chosen, expected in (
        (0, [0]), (-1, [2]), (np.int64(1), [1]), (slice(1, None), [1, 2]), ([2, 0], [2, 0]),
        (boxes.labels == 4, [0, 2]), ([False, True, False], [1]), ([], []),
    ):  # fmt: skip
        some = boxes[chosen]
        assert some.names == [boxes.names[i] for i in expected] and len(some) == len(expected)
        for column in ("xyxy", "scores", "labels", "distance_m"):
            np.testing.assert_array_equal(getattr(some, column), getattr(boxes, column)[expected])
    assert [(one.names, float(one.distance_m[0])) for one in boxes] == [(["sofa"], 1), (["bed"], 2), (["sofa"], 3)]
    with pytest.raises(IndexError):
        boxes[3]


def test_printed_results_tell_the_best_boxes_and_the_shapes_of_maps(folder: Path, model):
    scores = np.array([0.912, 0.8, 0.5, 0.25], np.float32)
    boxes = ResultBoxes(np.zeros((4, 4), np.float32), scores, np.arange(4), ["sofa", "bed", "lamp", "box"])
    assert repr(boxes) == "ResultBoxes(4: sofa 0.91, bed 0.80, lamp 0.50, ...)"
    assert repr(boxes[:1]) == "ResultBoxes(1: sofa 0.91)" and repr(boxes[:0]) == "ResultBoxes(0)"

    printed = repr(replace(model(NOISE), source="a.png", boxes=boxes))
    assert printed == (
        f"Result('a.png', 50x70 px, boxes={boxes}, segmentation=uint8[50, 70], depth_m=float32[50, 70], "
        "normals=float32[50, 70, 3])"
    )
    file = str(folder / "checkpoints" / "last.pt")
    assert repr(model) == f"Predictor({file!r}, detection, segmentation, depth, normals, on cpu)"


def test_the_first_task_of_a_kind_fills_the_field_and_none_is_lost():
    space = LabelSpace("two", ("a", "b"), ((0, 0, 0), (9, 9, 9)))
    found = Detections(np.zeros((1, 4), np.float32), np.ones(1, np.float32), np.array([1]))
    tasks = {"near": Depth(max_depth_m=2), "far": Depth(), "things": Detection()}
    depths = {name: np.full((2, 2), value, np.float32) for name, value in (("near", 1), ("far", 5))}

    result = Result.of(
        NOISE[:2, :2], None, {**depths, "things": found}, tasks, {"near": None, "far": None, "things": space}
    )

    assert result.depth_m is depths["near"] and result.predictions["far"] is depths["far"]
    assert result.boxes.names == ["b"] and result.boxes.distance_m.tolist() == [1]


def test_save_never_writes_over_a_file(model, tmp_path: Path):
    result = model(NOISE)
    assert result.save(tmp_path / "new" / "a.png") == tmp_path / "new" / "a.png"

    with pytest.raises(ValueError, match=r"a\.png exists already; nothing is written over; choose another name"):
        result.save(tmp_path / "new" / "a.png")
    with pytest.raises(ValueError, match=r"names no format of image files"):
        result.save(tmp_path / "a.txt")


def test_train_evaluate_and_load_from_python(tmp_path: Path):
    run = scene_run.run(names=("depth",), train={"epochs": 1})

    trained = visionmtl.train(run, "optim.lr=1e-3", output=tmp_path / "run", device="cpu", max_steps=np.int64(2))
    evaluated = visionmtl.evaluate(tmp_path / "run", device=torch.device("cpu"))

    assert set(evaluated) == {"depth"} and evaluated["depth"]["images"] == 4
    assert not trained or evaluated["depth"]["rmse_m"] > 0
    assert visionmtl.load(tmp_path / "run", device="cpu")(NOISE).depth_m.shape == (50, 70)


def test_an_option_that_training_does_not_have_is_named():
    with pytest.raises(TypeError, match=r"no option max_step=5 \(did you mean 'max_steps'\?\); options are resume, "):
        visionmtl.train("quickstart.yaml", max_step=5)


def test_the_home_folder_is_found_from_python(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model(NOISE).save("~/a.png") == tmp_path / "a.png"
    assert model("~/a.png").image.shape == model(tmp_path / "a.png").image.shape
    with pytest.raises(ValueError, match=f"there is no checkpoint {tmp_path}/none"):
        visionmtl.load("~/none.pt")
    assert place(scene_run.run(), "name", "~/run", None).output == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tta": "flop"}, "tta is 'flop'; it can be 'flip' or None"),
        ({"limit_batches": 0}, "limit_batches is 0; a whole number of at least 1"),
        ({"batch_size": -1}, "batch_size is -1; a whole number of at least 1"),
        ({"data": "folder"}, "--data folder: the validation data sets are"),
        ({"protocol": 5}, "protocol is 5; a text, or None"),
        ({"device": None}, "device is 'None'; allowed are auto"),
    ],
)
def test_what_evaluate_cannot_be_asked_for_is_refused(folder: Path, options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        visionmtl.evaluate(folder, **{"device": "cpu", **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": 0}, "max_steps is 0; a whole number of at least 1, or None, is needed"),
        ({"max_time_s": "10m"}, "max_time_s is '10m'; seconds from 0 on, or None"),
        ({"max_time_s": float("nan")}, "max_time_s is nan"),
        ({"stop": True}, "stop is True; a function that returns whether to stop"),
        ({"dry_run": "no"}, "dry_run is 'no'; True or False"),
        ({"resume": True}, "resume is True; a path"),
        ({"init_from": ""}, "init_from is ''; a path"),
        ({"output": 5}, "output is 5; a path"),
        ({"init_from": "a.pt", "resume": "b.pt"}, "init_from is a.pt, and resume b.pt; .*; leave one of them out"),
        ({"device": 5}, "device is '5'; allowed are auto, cpu, cuda and cuda:N"),
    ],
)
def test_what_train_cannot_be_asked_for_is_refused_before_a_folder_is_made(
    tmp_path: Path, options: dict[str, Any], said: str
):
    run = scene_run.run(tmp_path / "run")
    with pytest.raises(ValueError, match=said):
        visionmtl.train(run, **options)
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_changed_by_hand_is_checked():
    with pytest.raises(ValueError, match="seed"):
        visionmtl.train(scene_run.run().model_copy(update={"seed": -5}))


def test_build_model_gives_the_untrained_network_of_a_run():
    net = visionmtl.build_model(scene_run.run(), "model.pyramid.channels=8")
    assert list(net.decoders) == list(scene_run.TASKS) and net.trunk.out_channels == 8
    assert isinstance(net, type(build_model(scene_run.run().model, {"depth": Depth()}, {"depth": None}, (64, 64))))


# ---- importing ----


def of_new_process(code: str, folder: Path | None = None) -> str:
    root = Path(visionmtl.__file__).parent.parent
    paths = f"import sys; sys.path[:0] = [{str(root)!r}, {str(folder or root)!r}]; "
    return subprocess.run([sys.executable, "-c", paths + code], check=True, capture_output=True, text=True).stdout


def test_import_loads_nothing_heavy_and_offers_every_name():
    heavy = "'torch', 'numpy', 'pydantic', 'timm', 'cv2'"
    code = f"import visionmtl; print([name for name in ({heavy}) if name in sys.modules], *sorted(visionmtl.__all__))"
    assert of_new_process(code).split() == [
        "[]",
        "Predictor",
        "Result",
        "__version__",
        "build_model",
        "evaluate",
        "load",
        "train",
    ]
    assert all(callable(getattr(visionmtl, name)) for name in visionmtl.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        visionmtl.lode  # noqa: B018


def test_help_of_every_tool_is_answered_without_importing_torch():
    code = (
        "from visionmtl import cli\nsys.argv = ['visionmtl']\n"
        "for tool in cli.verbs():\n"
        "    try:\n        cli.main([tool, '--help'])\n"
        "    except SystemExit as ended:\n        assert not ended.code\n"
        "print([name for name in ('torch', 'timm', 'pydantic', 'numpy') if name in sys.modules])"
    )
    told = of_new_process(code)
    assert all(f"usage: visionmtl {tool} " in told for tool in cli.verbs())
    assert told.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--version"], ["check", "--version"]])
def test_every_command_tells_its_version(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with contextlib.suppress(SystemExit):
        cli.main(arguments)
    assert capsys.readouterr().out == f"visionmtl {visionmtl.__version__}\n"


def test_a_misspelt_setting_is_refused_without_importing_timm():
    code = (
        "from visionmtl.run import load\ntry:\n    load('quickstart.yaml', ['train.epoch=3'])\n"
        "except ValueError as error:\n    print('epochs' in str(error))\n"
        "print([name for name in ('timm', 'torchvision', 'torchjd', 'scipy', 'albumentations') if name in sys.modules])"
    )
    assert of_new_process(code).splitlines() == ["True", "[]"]


@pytest.mark.slow
def test_plug_in_paths_from_before_the_move_are_the_same_modules():
    code = (
        "import importlib\nfor package in ('decoders', 'heads', 'pyramids', 'sharing'):\n"
        "    old = importlib.import_module(f'visionmtl.{package}.base')\n"
        "    new = importlib.import_module(f'visionmtl.modeling.{package}.base')\n"
        "    folder = importlib.import_module(f'visionmtl.{package}')\n"
        "    print(old is new, folder.base is new, new.__spec__.name == new.__name__)"
    )
    assert of_new_process(code).split() == ["True"] * 12


@pytest.mark.slow
def test_a_plug_in_written_for_the_old_paths_is_found_by_type(tmp_path: Path):
    (tmp_path / "my_module.py").write_text(
        "from typing import Literal\n"
        "from visionmtl.decoders.base import Decoder\n"
        "from visionmtl.decoders.semantic_fpn import SemanticFPN\n"
        "class MyDecoder(SemanticFPN, frozen=True):\n"
        "    type: Literal['my_module.MyDecoder'] = 'my_module.MyDecoder'\n"
        "assert issubclass(MyDecoder, Decoder)\n",
        encoding="utf-8",
    )
    code = (
        "from visionmtl.run import load\n"
        "run = load('quickstart.yaml', ['tasks.depth.decoder={type: my_module.MyDecoder, channels: 8}'])\n"
        "print(type(run.tasks['depth'].decoder).__name__, run.tasks['depth'].decoder.channels)"
    )
    assert of_new_process(code, tmp_path).split() == ["MyDecoder", "8"]
