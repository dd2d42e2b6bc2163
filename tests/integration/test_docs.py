"""Every command and code block of the documentation runs as it stands, on a network of a few steps.

Blocks of a page run in their order in one folder. It holds a trained run under the name of the quick start's, photos,
and small configs under the names of those that take minutes: a relative path finds them before the shipped ones.
"""

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scene_run
import yaml
from PIL import Image

from visionmtl import cli
from visionmtl import run as config
from visionmtl.cli import main
from visionmtl.datasets.folder import Folder
from visionmtl.run import dump
from visionmtl.study import comparison

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "datasets" / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)

ELSEWHERE = {
    "git": "a clone is what these tests run in",
    "make": "the targets are what starts these tests; the quick start runs before each release",
    "torchrun": "test_distributed starts processes with it",
    "/downloads": "files of gigabytes that the reader fetched; test_prepare makes small ones",
}
"""What marks commands that this test does not run, and why: the first word, or the beginning of a path."""
PARSED_ONLY = {"benchmark": "takes minutes; test_benchmark_verbs runs small ones", "demo": "serves until it is stopped"}
"""And the README's comparison: docs/comparing.md has the same."""

IMAGE = {"id": 1, "file_name": "photo.jpg", "width": 64, "height": 48}
BOX = {"image_id": 1, "category_id": 1, "bbox": [8, 8, 20, 16], "area": 320, "iscrowd": 0}
COMPARISON = """
config: ../quickstart.yaml
seeds: [0]
held_out: 0.5
runs: {upgrad: {overrides: ["balance=upgrad"]}, tuned: {overrides: ["tasks.depth.weight=2"]}}
"""
"""In place of the shipped comparison."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> list[list[str]]:
    """One list of words for each command; comments are left out, and lines that end in a backslash are joined."""
    lines = block.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.partition("   #")[0].split("&&")]
    return [words for part in parts if (words := shlex.split(os.path.expandvars(part), comments=True))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted; each page gets a copy."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "docs" / "examples", folder / "docs" / "examples")
    shutil.copy(ROOT / "docs" / "example.webp", folder / "docs")
    levels = {"decoder": {"levels": [2, 3, 4, 5]}}  # those that the pages' new tasks read
    small = scene_run.run(tasks={"segmentation": levels})
    (folder / "configs" / "quickstart.yaml").write_text(dump(small), encoding="utf-8")
    (folder / "configs" / "compare" / "scenes.yaml").write_text(COMPARISON, encoding="utf-8")
    output = str(folder / "runs" / "quickstart")
    assert main(["train", str(folder / "configs" / "quickstart.yaml"), "--device", "cpu", "--output", output]) == 0
    (folder / "results.json").write_text(json.dumps([BOX | {"score": 0.9}]), encoding="utf-8")
    truth = {"images": [IMAGE], "categories": [{"id": 1, "name": "chair"}], "annotations": [BOX | {"id": 1}]}
    (folder / "instances.json").write_text(json.dumps(truth), encoding="utf-8")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for path in ("photo.jpg", "photos/a.jpg", "photos/b.jpg"):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(folder / path)
    return folder


@pytest.fixture
def here(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workplace, as current folder."""
    shutil.copytree(workplace, tmp_path / "page")
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "page"


SLOW = ("README.md", "comparing.md", "export.md", "lifelong.md", "own_data.md", "predicting.md", "visualizing.md")
MARKED = [pytest.param(page, marks=pytest.mark.slow) if page.name in SLOW else page for page in PAGES]


@pytest.mark.parametrize("page", MARKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs(page: Path, here: Path):
    names: dict[str, object] = {}
    for language, block in blocks(page):
        if "$VISIONMTL_DATA" in block and not os.environ.get("VISIONMTL_DATA"):
            continue
        if language == "python":
            exec(compile(block, page.name, "exec"), names)
        elif language == "yaml":
            check_config(block)
        elif language in ("", "sh", "bash"):
            for words in commands(block):
                execute(words, page)
        else:
            assert language in ("text", "json", "eval-rst"), f"{page.name} has a block of unknown language {language!r}"


def execute(words: list[str], page: Path) -> None:
    """Run one command in the current folder; tools run in this process, with the same arguments."""
    if words[0] in ELSEWHERE or any(word.startswith("/downloads") for word in words):
        return
    assignments = [word for word in words if re.match(r"[A-Z_]+=", word)]
    words = words[len(assignments) :]
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[0] == "python" and words[1].startswith("tools/"):
        words = ["visionmtl", Path(words[1]).stem, *words[2:]]
    if words[0] == "visionmtl" and (words[1] in PARSED_ONLY or (page.name, words[1]) == ("README.md", "compare")):
        importlib.import_module(f"visionmtl.cli.{words[1]}").parser().parse_args(words[2:])
    elif words[0] == "visionmtl":
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = main(words[1:])
        fits = {0, 1} if "--expect" in words else {0}  # 1: a network of a few steps does not reach what is expected
        assert status in fits, f"{shlex.join(words)} ended with {status}: {said.getvalue()}"
    elif words[0] == "python" and words[1].endswith(".py"):
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")
    else:
        assert words[0] in ("cp", "mkdir", "ls", "pip", "cd", "source"), f"{words[0]} is no command this test knows"
        if words[0] in ("cp", "mkdir", "ls"):
            subprocess.run(words, check=True)


def check_config(block: str) -> None:
    """A block of settings is a comparison, a config, or a part of one that belongs on top of the quick start's; or each
    of its lines is a setting of the data set `folder`.

    Under the name that its first line may give, later commands of the page find it.
    """
    name = re.match(r"# (\S+\.yaml)\n", block)
    path = Path(name[1] if name else "configs/compare/block.yaml")
    values = yaml.safe_load(block)
    if values.keys() <= Folder.model_fields.keys():
        for line in filter(None, block.splitlines()):
            split = {"split": "train"} if "{split}" in line else {}
            Folder.model_validate({"root": ".", "images": "{folder}/*.png", **split, **yaml.safe_load(line)})
    elif "runs" in values:
        path.write_text(block, encoding="utf-8")
        comparison.read(path)
    else:
        base = "" if "base" in values else "base: quickstart.yaml\n"
        path.write_text(base + block, encoding="utf-8")
        config.load(path)


@pytest.mark.parametrize("tool", cli.verbs())
def test_the_manual_of_each_tool_ends_in_examples_that_it_understands(tool: str):
    parser = importlib.import_module(f"visionmtl.cli.{tool}").parser()
    examples = parser.epilog.partition("examples:\n")[2].splitlines()
    assert examples, f"the manual of {tool} has no examples"
    for line in examples:
        command = re.split(r" {3,}", line.strip())[0].rpartition(" | ")[2]
        words = shlex.split(command)
        assert words[:2] == ["visionmtl", tool], line
        if tool == "benchmark":  # its verbs have parsers of their own
            parser.parse_args(words[2:])
        else:
            parser.parse_intermixed_args(words[2:])


def test_every_page_is_among_the_contents_of_the_site():
    contents = re.findall(r"^```{toctree}\n(.*?)^```", (ROOT / "docs" / "index.md").read_text("utf-8"), re.M | re.S)
    named = {line for block in contents for line in block.split()}
    assert {page.stem for page in PAGES if page.parent.name == "docs"} - {"index"} <= named


def test_messages_are_those_of_the_code():
    sources = " ".join(
        path.read_text(encoding="utf-8")
        for folder in ("visionmtl", "tools", "datasets")
        for path in (ROOT / folder).rglob("*.py")
    )
    said = re.sub(r'"\s*f?"', "", sources)
    for message in re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "messages.md").read_text("utf-8"), re.M):
        for part in re.split(r"\b[A-Z]{2,}\b|\bN\b", message):
            assert part.strip() in said, f"no message says {part.strip()!r}"


def test_the_reference_of_settings_names_every_setting():
    reference = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    schema = config.schema()
    page = "".join(reference["_section"]("Run", "", schema, schema["$defs"], set()))
    for title in ("Train", "Optim", "Data", "Encoder", "Depth: type depth", "UPGrad: type upgrad"):
        assert f"\n## {title}\n" in page
    for name in (*schema["properties"], *schema["$defs"]["Train"]["properties"]):
        assert f"| `{name}` |" in page
