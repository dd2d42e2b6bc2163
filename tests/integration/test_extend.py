"""The examples of CONTRIBUTING.md run as they stand: one file of one's own and one line in a config each."""

import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from contract import check_spec, found

from visionmtl import run as config
from visionmtl.balance.base import Balance, Balancer
from visionmtl.cli import main
from visionmtl.config.loader import SHIPPED
from visionmtl.config.registry import Configurable
from visionmtl.datasets import Dataset, DatasetReader
from visionmtl.metrics.base import Meter
from visionmtl.modeling.decoders.base import Decoder, DenseMap
from visionmtl.modeling.heads.base import Head
from visionmtl.modeling.pyramids.base import Pyramid, PyramidMaps
from visionmtl.modeling.sharing.base import Sharing
from visionmtl.tasks.base import Task

KINDS = (Task, Head, Balance, Sharing, Decoder, Pyramid)
ROOT = Path(__file__).parents[2]
_BLOCKS = re.findall(
    r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M | re.S
)
FILES = dict(_BLOCKS)
"""The examples of CONTRIBUTING.md by file name."""
_TYPES = ("my_task.Borders", "my_parts.Lateral", "my_parts.Finest", "my_data.Stripes", "my_balance.GeometricMean")


def run(folder: Path, *arguments: str) -> str:
    """The output of a Python process that finds the folder's files, as a user would start it."""
    paths = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": paths}, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_examples_train_and_come_back_from_their_checkpoint(tmp_path: Path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    tool = str(ROOT / "tools" / "train.py")
    trained = run(tmp_path, tool, "mine.yaml", "--device", "cpu", "--output", "out")
    assert "borders" in trained and "depth" in trained

    again = "import visionmtl, sys; print(visionmtl.load('out', 'cpu', allow_import=sys.argv[1:]).run)"
    modules = sorted({name.partition(".")[0] for name in _TYPES})
    read = run(tmp_path, "-c", again, *modules)
    assert all(name in read for name in _TYPES)


def test_the_methods_of_the_examples_take_what_the_contracts_say(tmp_path: Path):
    contracts = {
        "my_task": {"Borders": Task, "Meter": Meter}, "my_data": {"Stripes": Dataset, "Reader": DatasetReader},
        "my_parts": {"Lateral": Pyramid, "LateralMaps": PyramidMaps, "Finest": Decoder, "FinestMap": DenseMap},
        "my_balance": {"GeometricMean": Balance, "Inverse": Balancer},
    }  # fmt: skip
    for module, kinds in contracts.items():
        file = tmp_path / f"{module}.py"
        file.write_text(FILES[file.name], encoding="utf-8")
        defined = runpy.run_path(str(file), run_name=module)
        for name, contract in kinds.items():
            own = [one for one in vars(defined[name]).values() if inspect.isfunction(one) and one.__module__ == module]
            for method in (one for one in own if one.__name__ != "__init__"):
                expected = inspect.signature(getattr(contract, method.__name__))
                assert list(inspect.signature(method).parameters) == list(expected.parameters), (name, method)


def test_an_extension_that_cannot_be_found_is_named_with_what_to_do(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(FILES["mine.yaml"], encoding="utf-8")
    with pytest.raises(config.ConfigError, match=r"my_task\.Borders.*put its folder on PYTHONPATH"):
        config.load(tmp_path / "mine.yaml")


def test_normals_join_the_quick_start_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = f"base: {SHIPPED / 'quickstart.yaml'}\ntasks: {{normals: {{type: normals}}}}\n"
    (tmp_path / "four.yaml").write_text(text, encoding="utf-8")
    small = ["data.train.0.num_images=2", "data.val.0.num_images=2", "train.batch_size=2", "data.workers=0"]
    small += ["optim.warmup_steps=1"]
    assert main(["train", str(tmp_path / "four.yaml"), *small, "--dry-run", "--device", "cpu"]) == 0
    assert "within_11_25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "member"),
    [pytest.param(kind, *case.values, id=f"{kind.__name__} {case.id}") for kind in KINDS for case in found(kind)],
)
def test_settings_are_frozen_strict_and_come_back_from_their_dump(base: type[Configurable], member: type[Configurable]):
    check_spec(member(), base)
