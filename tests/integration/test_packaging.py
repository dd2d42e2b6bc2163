"""The package works however it is installed: from a wheel, editable, or straight from the checkout."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PathDistribution, distributions, packages_distributions
from pathlib import Path

import project
import pytest

pytestmark = pytest.mark.slow

WAYS = ("wheel", "editable", "checkout")

# run from an empty folder by a Python that has visionmtl in one of the three ways
PROBE = """
import contextlib, importlib.util, io, json, multiprocessing, sys

def read(index):
    from visionmtl.datasets.scenes import __file__ as file
    return file

if __name__ == "__main__":
    seen = {}
    import visionmtl
    seen["package"] = visionmtl.__file__
    seen["light"] = not {"torch", "timm", "visionmtl.tasks.base"} & set(sys.modules)
    seen["here"] = importlib.import_module("visionmtl.datasets.scenes").__file__
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seen["worker"] = pool.apply(read, (0,))

    from visionmtl import cli
    with contextlib.redirect_stdout(io.StringIO()) as text:
        seen["status"] = cli.main(["--help"])
    seen["help"] = text.getvalue()
    if sys.argv[1] == "wheel":  # what a tool does to sys.path for plain checkouts must not reach pip users
        for verb in cli.verbs():
            importlib.import_module("visionmtl.cli." + verb)
        small = ["data.train.0.num_images=2", "data.val.0.num_images=1", "data.size=[64,96]", "train.batch_size=2"]
        small += ["optim.warmup_steps=1"]
        with contextlib.redirect_stdout(sys.stderr):
            seen["trained"] = cli.main(["train", "quickstart.yaml", *small, "data.workers=1", "--dry-run"])
    hub = importlib.util.find_spec("datasets")
    seen["hub"] = hub and hub.origin
    if seen["hub"] and sys.argv[1] == "checkout":  # the way most likely to shadow it; importing it takes seconds
        from datasets import Dataset
    print(json.dumps(seen))
"""


def build(kind: str, source: Path, target: Path) -> Path:
    """A wheel ("wheel") or the pointer that an editable install writes ("editable"), by the hook that pip calls."""
    target.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the project, because building leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for file in project.project_files():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project.ROOT / file, copy / file)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("built") / "wheel")


def environment(folder: Path) -> tuple[Path, Path]:
    """A fresh virtual environment that sees our libraries but not our own install: its Python, its site-packages."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = next(folder.rglob("site-packages"))
    # a .pth adds these folders without reading the .pth files in them, one of which points to the checkout
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return python, site


@pytest.fixture(scope="module", params=WAYS)
def seen(request, checkout, wheel, tmp_path_factory) -> dict:
    """What the probe saw under one way of installing."""
    folder = tmp_path_factory.mktemp(request.param)
    python, site = environment(folder / "venv")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if request.param == "checkout":
        env["PYTHONPATH"] = str(checkout)
    else:
        built = wheel if request.param == "wheel" else build("editable", checkout, folder / "built")
        zipfile.ZipFile(built).extractall(site)  # all that installing a pure wheel does, apart from its script

    (folder / "probe").mkdir()
    (folder / "probe/probe.py").write_text(PROBE)
    (folder / "empty").mkdir()
    command = [str(python), str(folder / "probe/probe.py"), request.param]
    done = subprocess.run(command, cwd=folder / "empty", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "home": str(site if request.param == "wheel" else checkout)}


def test_the_package_is_the_installed_one_and_importing_it_loads_nothing_else(seen):
    assert seen["package"].startswith(seen["home"])
    assert seen["light"], "import visionmtl must not load torch or any task"


def test_data_sets_are_found_here_and_in_spawned_workers(seen):
    assert seen["here"].startswith(seen["home"])
    assert seen["worker"] == seen["here"]


def test_the_command_trains_with_worker_processes_from_a_wheel(seen):
    assert seen.get("trained", 0) == 0


def test_the_command_finds_every_tool(seen):
    tools = {file.stem for file in project.project_files() if file.parts[0] == "tools" and file.suffix == ".py"}
    assert seen["status"] == 0
    assert tools <= set(re.findall(r"^  (\w+)", seen["help"], flags=re.MULTILINE))


def find_distribution(name: str) -> Path | None:
    """The `__init__.py` of an installed distribution of that name."""
    found = next((found for found in distributions() if found.name == name), None)
    return Path(str(found.locate_file(f"{name}/__init__.py"))) if found else None


def test_hugging_face_datasets_stays_importable_beside_it(seen):
    if not (installed := find_distribution("datasets")):
        pytest.skip("the `datasets` package of Hugging Face is not installed")
    assert seen["hub"] == str(installed), "`import datasets` found something else"


def test_a_wheel_carries_adapters_configs_and_tools_and_claims_one_name(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    carried = {
        f"visionmtl/_{file.as_posix()}"
        for file in project.project_files()
        if file.parts[0] in ("datasets", "configs", "tools") and file.suffix in (".py", ".yaml", ".json")
    }
    own = {file.as_posix() for file in project.project_files() if file.parts[0] == "visionmtl"}
    assert carried | own <= names
    assert {name.split("/")[0] for name in names} == {"visionmtl", "visionmtl-0.1.0.dist-info"}


def requirements(wheel: Path) -> tuple[set[str], set[str]]:
    """Names of the libraries that the wheel always needs, and of all that it may need."""
    info = zipfile.Path(wheel) / "visionmtl-0.1.0.dist-info"
    lines = PathDistribution(info).requires or []
    plain = [(re.match(r"[\w.-]+", line)[0].lower().replace("_", "-"), "extra ==" in line) for line in lines]
    return {name for name, extra in plain if not extra}, {name for name, _ in plain}


def foreign_imports(file: Path) -> list[tuple[str, bool]]:
    """Libraries that a file imports, and whether it cannot be imported without them."""
    module = ast.parse((project.ROOT / file).read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(module):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        found += [(name.split(".")[0], node in module.body) for name in names]
    return [(name, always) for name, always in found if name not in {*sys.stdlib_module_names, "visionmtl"}]


WITH_TORCH = {"triton"}
PROVIDER = {"mlflow": "mlflow-skinny"}
"""Of libraries that are under another name and may not be installed here."""
"""torch's own wheels for Linux bring it; `ops/fused.py` asks whether it is there before it imports what needs it."""


def test_every_imported_library_is_declared(wheel):
    always, ever = requirements(wheel)
    providers = packages_distributions()
    missing = []
    for file in project.project_files():
        if file.suffix == ".py" and file.parts[0] in ("visionmtl", "datasets", "tools"):
            for name, needed in foreign_imports(file):
                known = {found.lower().replace("_", "-") for found in providers.get(name, [PROVIDER.get(name, name)])}
                if name in WITH_TORCH:
                    continue
                if not known & (always if needed else ever):
                    missing.append(f"{file}: {name}")
    assert not missing, "add these to setup.py (inside a function an extra is enough)"


def test_no_library_that_comes_along_is_under_the_gpl(wheel):
    waiting, known = sorted(requirements(wheel)[0]), set()
    while waiting:
        name = waiting.pop()
        found = next(distributions(name=name), None)  # None: for another platform or Python
        if name in known or not found:
            continue
        known.add(name)
        facts = found.metadata.get_all("Classifier", []) + found.metadata.get_all("License-Expression", [])
        licences = [fact for fact in facts if "GPL" in fact and "LGPL" not in fact and "exception" not in fact]
        assert not licences, f"{name}: {licences}"
        waiting += [re.match(r"[\w.-]+", line)[0] for line in found.requires or [] if "extra ==" not in line]


def test_an_unknown_verb_is_answered_with_the_nearest_one(capsys, monkeypatch):
    from visionmtl import cli

    monkeypatch.setattr(cli, "verbs", lambda: {"train": "Trains.", "eval": "Evaluates."})
    assert cli.main(["trian"]) == 2
    assert "unknown verb 'trian' (did you mean 'train'?)" in capsys.readouterr().err


def test_a_verb_is_the_main_of_its_tool(tmp_path, monkeypatch):
    from visionmtl import cli

    (tmp_path / "greet_all.py").write_text("'''Greets.'''\ndef main(argv):\n    return len(argv)\n")
    monkeypatch.setattr(cli, "__path__", [str(tmp_path)])
    monkeypatch.setattr(cli, "_folder", tmp_path)
    monkeypatch.setattr(sys, "argv", ["visionmtl"])
    assert cli.verbs() == {"greet_all": "Greets."}
    assert cli.main(["greet-all", "a", "b", "c"]) == 3
    assert sys.argv == ["visionmtl greet_all", "a", "b", "c"]
