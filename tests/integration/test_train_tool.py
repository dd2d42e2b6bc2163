"""`tools/train.py`: its options reach the loop, and what is wrong is one line on stderr and an exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import scene_run

import visionmtl.cli.train as tool
from visionmtl import run as config
from visionmtl.cli import main
from visionmtl.engine import checkpoint
from visionmtl.engine.nonfinite import NotFinite

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config on disk, of one task."""
    path = tmp_path / "tiny.yaml"
    path.write_text(config.dump(scene_run.run(tmp_path / "out", ["depth"])))
    return path


@pytest.mark.slow
def test_a_fresh_process_overfits_four_images(file: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "train.py", file, "--overfit", "4", "--device", "cpu", "train.epochs=2"],
        cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "rmse_m" in done.stdout
    folder = tmp_path / "out-overfit4"  # the run of that name itself stays free
    assert [row["step"] for row in scene_run.rows(folder)] == list(range(1, 9))
    assert scene_run.rows(folder, "val")[-1]["results"]["depth"]["images"] == 4


def test_options_reach_the_loop(file: Path, tmp_path: Path):
    there = str(tmp_path / "there")
    few = ["--device", "cpu", "--limit-train-batches", "2", "--limit-val-batches", "1"]

    assert main(["train", str(file), "train.epochs=2", *few, "--output", there, "--max-steps", "1"]) == 0
    assert main(["train", str(file), "train.epochs=2", *few, "--output", there, "--resume"]) == 0

    assert [row["epoch"] for row in scene_run.rows(tmp_path / "there")] == [0, 0, 1, 1]
    assert scene_run.rows(tmp_path / "there", "val")[-1]["results"]["depth"]["images"] == 2
    assert checkpoint.load(tmp_path / "there" / "checkpoints" / "last.pt")["run"]["output"] == there
    assert not (tmp_path / "out").exists()


def test_print_config_tells_where_each_value_comes_from(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(file), "optim.lr=0.5", "--print-config"]) == 0

    printed = capsys.readouterr().out.splitlines()
    origins = {text.strip(): origin.strip() for text, _, origin in (line.partition("#") for line in printed)}
    assert origins["lr: 0.5"] == "override optim.lr=0.5"
    assert "tiny.yaml" in origins["epochs: 1"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optim.learning_rate=1"], "unknown field 'learning_rate'"),
        (["train.epoch=1"], "did you mean 'epochs'?"),
        (["train.epochs=0"], "train.epochs"),
        (["epochs=3"], "unknown field 'epochs'; allowed are seed, output"),
        (["epochs=3"], "did you mean train.epochs?"),
        (["train.lr=3"], "did you mean optim.lr?"),
        (["--output", "/dev/null/run"], "/dev/null/run cannot be read or written: Not a directory; a path"),
        (["balance.type=fixd"], "did you mean 'fixed'?"),
        (["distill.teachers=[a.pt,a.pt]"], "names one of its values twice"),
        (["train.best=dept/rmse_m"], "did you mean 'depth'?"),
        (["train.batch_size=9"], "an epoch has 8 images, but one step takes 9 x 1 process"),
        (["data.size=[40,64]"], "needs multiples of 16; choose 48x64"),
        (["--resume", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["--init-from", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "gpu"], "device is 'gpu'; allowed are auto, cpu, cuda and cuda:N"),
    ],
)
def test_what_is_wrong_is_said_on_stderr(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    device = [] if "--device" in arguments else ["--device", "cpu"]

    assert main(["train", str(file), *device, *arguments]) == 2  # as every tool

    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and said in printed


@pytest.mark.parametrize("arguments", [["--init-from", ""], ["--output="], [""]])
def test_an_empty_argument_is_no_argument_left_out(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    """As of a variable of the shell that is not set."""
    with pytest.raises(SystemExit) as left:
        main(["train", str(file), *arguments])
    assert left.value.code == 2
    assert "is empty; a value is needed" in capsys.readouterr().err


@pytest.mark.parametrize("cured", [True, False])
def test_only_what_a_setting_can_cure_becomes_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cured: bool
):
    """A bug keeps its traceback."""
    kind = NotFinite if cured else RuntimeError

    def end(*_: object) -> None:
        raise kind("so it is")

    monkeypatch.setattr("visionmtl.engine.trainer.train", end)
    if cured:
        assert main(["train", str(file)]) == 2
        assert capsys.readouterr().err == "error: so it is\n"
    else:
        with pytest.raises(RuntimeError, match="so it is"):
            main(["train", str(file)])


@pytest.mark.parametrize(
    "arguments", [["--overfit", "0"], ["--max-time", "2 days"], ["--limit-val-batches", "x"], ["--resme"]]
)
def test_an_option_out_of_grammar_is_refused_before_anything_runs(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    with pytest.raises(SystemExit) as ended:
        main(["train", str(file), *arguments])

    assert ended.value.code == 2
    assert "usage: visionmtl train" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_setting_written_as_an_option_is_named_as_a_setting(file: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train", str(file), "--lr", "0.1"])

    assert "--lr 0.1; settings are written a.b=c, without dashes: optim.lr=0.1\n" in capsys.readouterr().err


def test_only_the_config_is_required(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train"])

    assert capsys.readouterr().err.endswith("required: config\n")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("45m", 2700), ("1.5h", 5400)])
def test_durations_have_a_unit(text: str, seconds: float):
    assert tool.duration_s(text) == seconds


def test_settings_behind_an_option_that_takes_several_names_are_settings():
    from visionmtl.cli.compare import parser

    args = parser().parse_intermixed_args(["a.yaml", "b.c=1", "--output", "o", "--only", "one", "two", "d.e=2", "~f.g"])
    assert args.only == ["one", "two"] and args.overrides == ["b.c=1", "d.e=2", "~f.g"]


@pytest.mark.parametrize(
    ("behind", "resume", "overrides"),
    [
        (["b.c=1"], "auto", ["b.c=1"]),
        (["~b.c", "d=2"], "auto", ["d=2", "~b.c"]),
        (["runs/lr=1/last.pt"], "runs/lr=1/last.pt", []),
        ([], "auto", []),
    ],
)
def test_settings_behind_resume_are_settings(behind: list[str], resume: str, overrides: list[str]):
    args = tool.parser().parse_intermixed_args(["a.yaml", "--resume", *behind])
    assert (args.resume, args.overrides) == (resume, overrides)
