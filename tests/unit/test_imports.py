"""No file that is opened runs code: a checkpoint imports only what the user allows, and no payload is executed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from toy_run import small_run, small_state, small_tasks

import visionmtl
from visionmtl import cli
from visionmtl import run as config
from visionmtl.config.imports import allow_imports, foreign_settings
from visionmtl.config.loader import ConfigError
from visionmtl.engine import checkpoint
from visionmtl.io.depth_maps import read_array
from visionmtl.io.label_maps import class_file, color_file
from visionmtl.io.yolo import read_classes
from visionmtl.run import dump, restore
from visionmtl.structures import LabelSpace

PLUG_IN = """
from pathlib import Path
from typing import Literal
from visionmtl.tasks.depth import Depth

Path("touched").write_text("this module was run")


class Mine(Depth, frozen=True):
    type: Literal["plugin_of_tests.Mine"] = "plugin_of_tests.Mine"
"""
MODULE = "plugin_of_tests"


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The current folder with a module that touches a file when it is imported, and a checkpoint that names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path(f"{MODULE}.py").write_text(PLUG_IN)
    state = small_state(small_run({"depth": small_tasks()["depth"]})).state_dict()
    state["run"]["tasks"]["depth"]["type"] = f"{MODULE}.Mine"
    checkpoint.save(Path("last.pt"), state)
    yield Path("touched")
    sys.modules.pop(MODULE, None)


def test_a_checkpoint_imports_nothing_that_is_not_allowed_by_name(plug_in):
    for open_it in (
        lambda: visionmtl.load("last.pt", "cpu"),
        lambda: visionmtl.load("last.pt", "cpu", allow_import=["os"]),
    ):
        with pytest.raises(ConfigError, match=rf"last.pt names the module '{MODULE}'.*add --allow-import {MODULE}"):
            open_it()
    assert not plug_in.exists() and MODULE not in sys.modules


def test_a_checkpoint_imports_what_is_allowed(plug_in):
    visionmtl.load("last.pt", "cpu", allow_import=[MODULE])
    assert plug_in.exists()


@pytest.mark.parametrize("verb", ["eval", "predict", "visualize", "export", "publish", "demo"])
def test_every_tool_that_opens_a_checkpoint_says_what_to_type(plug_in, capsys, verb):
    Image.new("RGB", (40, 30)).save("photo.jpg")
    more = {
        "predict": ["photo.jpg", "--output", "out"],
        "export": ["--format", "onnx"],
        "publish": ["--licence", "other", "--folder", "out"],
    }
    try:
        status = cli.main([verb, "last.pt", *more.get(verb, [])])
    except SystemExit as error:  # a wrong command line of this test
        status = -int(error.code or 0)
    told = capsys.readouterr().err
    assert status == cli.ERROR and f"add --allow-import {MODULE}" in told, told
    assert not plug_in.exists()


def test_what_is_allowed_is_exported_as_it_is(plug_in):
    assert (
        cli.main(
            ["export", "last.pt", "--allow-import", MODULE, "--format", "safetensors", "--output", "a.safetensors"]
        )
        == 0
    )
    assert plug_in.exists() and Path("a.safetensors").stat().st_size > 1000


def test_the_allowance_ends_with_the_tool(plug_in, capsys):
    with allow_imports([MODULE]), allow_imports(["other"]):
        visionmtl.load("last.pt", "cpu")
    sys.modules.pop(MODULE)
    with pytest.raises(ConfigError, match="--allow-import"):
        visionmtl.load("last.pt", "cpu")


def test_every_tool_that_opens_what_others_wrote_has_the_option():
    for verb in cli.verbs():
        text = (Path(cli.__path__[0]) / f"{verb}.py").read_text()
        reads_checkpoints = any(word in text for word in ("heckpoint", "open_model", "existing"))
        assert ("add_imports()" in text) >= reads_checkpoints or verb in ("prepare", "check_data", "soup"), verb


def test_the_users_own_config_imports_and_that_of_a_run_folder_does_not(plug_in):
    Path("mine.yaml").write_text(dump(small_run(small_tasks())))
    override = f"tasks.mine={{type: {MODULE}.Mine}}"
    Path("config.yaml").write_text(Path("mine.yaml").read_text() + "# recorded\n")
    content = yaml.safe_load(Path("config.yaml").read_text())
    content["tasks"]["depth"]["type"] = f"{MODULE}.Mine"
    Path("config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="--allow-import"):
        config.load_recorded(Path("."))
    assert not plug_in.exists()
    assert config.load("mine.yaml", [override]).tasks["mine"].type == f"{MODULE}.Mine"
    assert plug_in.exists()
    config.load_recorded(Path("."))  # what the program has imported itself may be used


def test_no_import_path_leads_elsewhere():
    with pytest.raises(ConfigError, match="is no import path"):
        config.load("quickstart", ["tasks.depth.type=../../.."])
    with foreign_settings("x.pt"), pytest.raises(ConfigError, match=r"x\.pt names the module 'this.module'"):
        config.load("quickstart", ["tasks.depth.type=this.module.Thing"])


def test_settings_of_a_checkpoint_read_no_variable_and_follow_no_reference(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    plain = small_run(small_tasks()).model_dump(mode="json")
    for text in ("${oc.env:SECRET}", "${seed}", "a${oc.decode:x}"):
        with pytest.raises(ConfigError, match=r"x\.pt holds the setting .*; saved settings have no references") as told:
            restore({**plain, "output": text}, "x.pt")
        assert "hunter2" not in str(told.value)
    monkeypatch.setenv("FOLDER", "/elsewhere")
    assert restore(plain, "x.pt", ["output=${oc.env:FOLDER}"]).output == "/elsewhere"  # the user's own


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": None}, "no settings 'data'"),
        ({"tasks": {"depth": {1.5: 2}}}, "the key 1.5"),
        ({"output": "a\x1b[2J"}, "no control characters"),
        ({"train": {"distributed": 3, "compile": torch.zeros(1)}}, "a Tensor among its settings"),
    ],
)
def test_settings_of_a_checkpoint_that_are_none_are_refused(change, said):
    with pytest.raises(ConfigError, match=said) as told:
        restore({**small_run(small_tasks()).model_dump(mode="json"), **change}, "x.pt")
    assert "x.pt" in str(told.value) and str(told.value).count(";") >= 2


class _Touches:
    """Its pickle makes a file when it is loaded."""

    def __reduce__(self):
        return (open, ("touched", "w"))


def test_no_payload_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{tmp_path}/touched']]"
    torch.save({"format": 1, "run": _Touches()}, "payload.pt")
    np.save("payload.npy", np.array([_Touches()], object), allow_pickle=True)
    Path("payload.yaml").write_text(f"names: {touch}\n")
    Path("list.yaml").write_text(f"- {touch}\n")
    Path("payload.json").write_text(json.dumps({"a": "__import__('os').system('touch touched')"}))
    readers = [
        lambda: checkpoint.load(Path("payload.pt")), lambda: read_array(Path("payload.npy")),
        lambda: config.load("payload.yaml"), lambda: read_classes(Path("payload.yaml")),
        lambda: class_file(Path("list.yaml")), lambda: color_file(Path("payload.yaml")),
        lambda: class_file(Path("payload.json")),
    ]  # fmt: skip
    for read in readers:
        with pytest.raises(ValueError, match=r"payload|list\.yaml"):
            read()
    assert not Path("touched").exists()


def test_a_class_name_cannot_command_a_terminal(tmp_path):
    with pytest.raises(ValueError, match=r"class 'cup\\x1b\[2J'"):
        LabelSpace("mine", ("cup\x1b[2J",), ((0, 0, 0),))


def test_errors_show_control_characters_written_out(tmp_path, capsys):
    strange = tmp_path / "a\x1b[2Jb"
    assert cli.main(["eval", str(strange)]) == cli.ERROR
    told = capsys.readouterr().err
    assert "\x1b" not in told and "\\x1b[2Jb" in told
