"""Architecture: the layers of imports, what lies at the top level, names, and what `import visionmtl` offers."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT, project_files

import visionmtl
from visionmtl.run import schema

PRODUCT = [file for file in project_files() if file.parts[0] in ("visionmtl", "datasets", "tools")]
FILES = [file for file in PRODUCT if file.suffix == ".py"]

TOP_LEVEL = {
    "visionmtl", "datasets", "configs", "tools", "tests", "docs", ".ci", "setup.py", "pyproject.toml", "README.md",
    "LICENSE", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md", ".gitignore", ".gitattributes", ".gitmodules",
}  # fmt: skip
PACKAGE = {
    "api.py", "balance", "benchmark", "cli.py", "config", "data", "datasets.py", "engine", "export", "inference", "io",
    "metrics", "modeling", "network.py", "ops", "report", "run.py", "structures.py", "study", "tasks", "transfer",
    "visualization", "weights",
}  # fmt: skip

# names of the first layout that say nothing to a reader who comes from the field
PRIVATE_WORDS = {
    "Feed", "Plan", "Options", "Pace", "Advice", "RunState", "Framing", "Window", "View", "Frame", "Wanted", "Shrink",
    "Source", "FrugalReader", "Repeated", "Draws", "Where", "Kind", "Towers", "Photo", "Jpeg", "Encoded",
    "judged", "news", "hand_to_first", "again", "overlay", "lay", "home", "unread", "gathered", "twin", "headline",
    "suppress",
}  # fmt: skip

PUBLIC: dict[str, list[str]] = {
    "build_model": ["config_or_run", "*overrides"],
    "evaluate": [
        "checkpoint", "*overrides", "split", "data", "protocol", "tta", "batch_size", "limit_batches", "device",
        "allow_import",
    ],
    "load": ["path", "device", "tasks", "precision", "batch_size", "threads", "compile", "allow_import"],
    "train": ["config_or_run", "*overrides", "output", "allow_import", "**options"],
}  # fmt: skip


def lines_with(pattern: str) -> list[str]:
    return [
        f"{file}:{number}: {line.strip()}"
        for file in FILES
        for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_imports_point_down_the_layers_without_cycles():
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip("import-linter is not installed: pip install -e '.[dev]'")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(command), "--no-cache"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_top_level_holds_what_was_agreed():
    assert {file.parts[0] for file in project_files()} <= TOP_LEVEL
    files = {"__init__.py", "__main__.py", "py.typed"}
    package = {file.parts[1] for file in PRODUCT if file.parts[0] == "visionmtl"} - files
    assert package <= PACKAGE


def test_no_file_is_named_for_a_mood():
    assert not [file for file in FILES if file.stem in ("utils", "util", "common", "helpers", "helper", "misc")]


def test_classes_and_functions_bear_the_words_of_the_field():
    named = [
        f"{file}:{node.lineno}: {node.name}"
        for file in FILES
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name.lstrip("_") in PRIVATE_WORDS
    ]
    assert not named


def test_packages_hold_no_code_in_their_init():
    with_code = {"visionmtl/__init__.py", "datasets/scenes/__init__.py"}
    for file in FILES:
        if file.name == "__init__.py" and file.as_posix() not in with_code:
            body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{file}: a docstring and nothing else"


def test_reading_a_file_never_runs_code_in_it():
    assert not lines_with(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|Unpickler|\bpickle\.loads?\b")


def test_imports_are_absolute_and_of_no_test():
    assert not lines_with(r"^\s*from \.|^\s*(from|import) (tests|contract|scene_run|toy_run)\b")


def test_the_public_names_and_their_parameters_are_frozen():
    assert sorted(visionmtl.__all__) == sorted({*PUBLIC, "Predictor", "Result", "__version__"})
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    for name, parameters in PUBLIC.items():
        offered = inspect.signature(getattr(visionmtl, name)).parameters.values()
        assert [marks.get(one.kind, "") + one.name for one in offered] == parameters, name


@pytest.mark.parametrize("path", ["tasks", "balance", "modeling.decoders", "modeling.heads", "modeling.pyramids"])
def test_plug_in_paths_stay(path: str):
    assert importlib.import_module(f"visionmtl.{path}.base")


def test_the_schema_says_that_it_is_generated():
    assert schema()["$comment"].startswith("generated: ")  # that it is up to date: test_config.py
