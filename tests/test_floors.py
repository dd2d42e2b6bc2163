"""The tower holds: imports point down, siblings do not meet, and every file keeps the manners of the project."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import readme_tree

# floor by file pattern, the first that matches; a file without a floor is a failure. Half floors lie in between.
FLOORS: dict[str, float] = {
    "visionmtl/__init__.py": 0,
    "visionmtl/structures.py": 0,
    "visionmtl/config/registry.py": 0,
    "visionmtl/ops/*.py": 1,
    "visionmtl/datasets.py": 1,
    "visionmtl/modeling/layers.py": 1,
    "visionmtl/modeling/unused_parameters.py": 1,
    "visionmtl/modeling/sync_batchnorm.py": 1.5,  # a layer that asks ranks
    "visionmtl/engine/environment.py": 1,
    "datasets/*.py": 1.5,
    "visionmtl/data/transforms/photometric.py": 1.5,  # a pipeline of albumentations; applied by augment
    "visionmtl/modeling/weights.py": 1.5,  # a state dict for a timm model; read by the encoder
    "visionmtl/modeling/encoder.py": 2,
    "visionmtl/modeling/pyramids/*.py": 2,
    "visionmtl/data/transforms/augment.py": 2,
    "visionmtl/drawing.py": 2,
    "visionmtl/modeling/decoders/*.py": 2,
    "visionmtl/modeling/heads/*.py": 2,
    "visionmtl/metrics/*.py": 2,
    "visionmtl/tasks/*.py": 3,
    "visionmtl/balance/*.py": 3,
    "visionmtl/modeling/sharing/*.py": 3,
    "visionmtl/data/workers.py": 1,  # processes that load; started by data
    "visionmtl/data/transforms/crop_resize.py": 1.5,  # the geometry of a view; drawn by augment
    "visionmtl/data/cache/packed.py": 1.5,  # samples as bytes; written by the data cache
    "visionmtl/data/cache/decoded.py": 2,
    "visionmtl/data/sampler.py": 1,  # a part of the data's settings
    "visionmtl/data/label_spaces.py": 3.5,  # asks tasks what they learn; read by data
    "visionmtl/network.py": 4,
    "visionmtl/data/loader.py": 4,
    "visionmtl/engine/optim.py": 4,
    "visionmtl/config/loader.py": 4,
    "visionmtl/run.py": 4.5,  # `Run` holds the specs of model, data and optim
    "visionmtl/engine/checkpoint.py": 5,
    "visionmtl/engine/compile.py": 5,
    "visionmtl/engine/logging.py": 5,
    "visionmtl/engine/throughput.py": 5,
    "visionmtl/engine/distributed.py": 5,
    "visionmtl/engine/fsdp.py": 5,
    "visionmtl/data/prefetch.py": 5,
    "visionmtl/engine/options.py": 6,
    "visionmtl/engine/resume.py": 6.5,  # looks for what an evaluation found
    "visionmtl/engine/state.py": 5.5,  # a step of a run, which ranks share
    "visionmtl/engine/protocols.py": 5,
    "visionmtl/engine/evaluator.py": 6,
    "visionmtl/engine/verify_results.py": 6,
    "visionmtl/inference/results_io.py": 6,
    "visionmtl/coco_files.py": 6,
    "visionmtl/eval_options.py": 6.5,  # names protocols, expectations and units of submissions
    "visionmtl/inference/predictor.py": 6,
    "visionmtl/export.py": 6,
    "visionmtl/benchmark/base.py": 5,
    "visionmtl/benchmark/measure.py": 5.6,
    "visionmtl/benchmark/workload.py": 5.6,  # the state of a run, and batches for it
    "visionmtl/benchmark/works.py": 5.7,
    "visionmtl/benchmark/peers.py": 5.7,
    "visionmtl/benchmark/plain_loader.py": 5.7,
    "visionmtl/benchmark/gpu.py": 6.5,  # runs several verbs
    "visionmtl/benchmark/*.py": 6,
    "visionmtl/report.py": 6,
    "visionmtl/data_check/base.py": 5,
    "visionmtl/data_check/survey.py": 5.5,  # reads with what stands below it in its folder
    "visionmtl/data_check/statistics.py": 6,
    "visionmtl/data_check/verdict.py": 6,
    "visionmtl/data_check/tables.py": 6,
    "visionmtl/data_check/sheet.py": 6.5,  # its lines are those of the tables
    "visionmtl/data_check/*.py": 5,
    "visionmtl/engine/trainer.py": 7,
    "visionmtl/cli.py": 8,
    "tools/*.py": 8,
}

# importer -> (imported, reason): the only files of one floor that may meet, besides a folder's `base`
MAY_MEET: dict[str, dict[str, str]] = {
    "datasets/nyuv2_mat.py": {"datasets/nyuv2.py": "one data set in two layouts: classes and settings are said once"},
    "visionmtl/ops/assignment.py": {"visionmtl/ops/boxes.py": "cells are assigned by distances and overlaps of boxes"},
    "visionmtl/ops/coco_by_stem.py": {
        "visionmtl/ops/coco_json.py": "boxes of an instances file, in another order",
        "visionmtl/ops/file_names.py": "a name stands for one image",
    },
    "visionmtl/ops/coco_entries.py": {
        "visionmtl/ops/file_names.py": "a file name in an annotation file stays inside its folder",
        "visionmtl/ops/index_cache.py": "what is parsed is kept",
    },
    "visionmtl/ops/coco_json.py": {
        "visionmtl/ops/coco_entries.py": "the instances format is one of those that share them",
        "visionmtl/ops/index_cache.py": "what is parsed is kept",
    },
    "visionmtl/ops/coco_panoptic.py": {
        "visionmtl/ops/coco_entries.py": "the panoptic format is one of those that share them",
        "visionmtl/ops/index_cache.py": "what is parsed is kept",
        "visionmtl/ops/photos.py": "segments lie in PNGs",
    },
    "visionmtl/ops/losses.py": {"visionmtl/ops/ranks.py": "losses are divided by what all ranks labelled"},
    "visionmtl/ops/fused.py": {"visionmtl/ops/resize.py": "the gradient of upsampled rows goes back to their cells"},
    "visionmtl/ops/path_patterns.py": {"visionmtl/ops/file_names.py": "a path in the settings stays inside its folder"},
    "visionmtl/ops/photos.py": {"visionmtl/ops/images.py": "headers are read by Pillow, which fails in the same ways"},
    "visionmtl/ops/street_panoptic.py": {
        "visionmtl/ops/coco_entries.py": "Cityscapes' panoptic json is COCO's, with texts for ids of images",
        "visionmtl/ops/street_labels.py": "categories have the ids of labelIds",
    },
    "visionmtl/modeling/pyramids/pafpn.py": {
        "visionmtl/modeling/pyramids/fpn.py": "a PAFPN is an FPN with a bottom-up path after it"
    },
}

TOP_LEVEL = {
    *("visionmtl", "datasets", "configs", "tools", "tests", "docs", ".ci", ".gitignore"),
    *("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "CHANGELOG.md"),
}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MAX_LINES = 300

FILES = readme_tree.project_files()
PYTHON = [file for file in FILES if file.suffix == ".py"]
PRODUCT = [file for file in PYTHON if file.parts[0] in ("visionmtl", "datasets", "tools")]
TREES = {file: ast.parse((readme_tree.ROOT / file).read_text(encoding="utf-8"), str(file)) for file in PYTHON}


def floor(file: Path) -> float:
    for pattern, number in FLOORS.items():
        if fnmatch(file.as_posix(), pattern) and len(file.parts) == pattern.count("/") + 1:
            return number
    raise AssertionError(f"{file} has no floor; give it one in {Path(__file__).name}")


def find_module(name: str) -> Path | None:
    """The project file behind a dotted name, e.g. visionmtl.tasks.depth or visionmtl.datasets.coco."""
    name = re.sub(r"^visionmtl\.(datasets|cli)\.", lambda match: {"cli": "tools"}.get(match[1], match[1]) + ".", name)
    path = Path(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file in TREES), None)


def imported(file: Path) -> Iterator[tuple[Path, int]]:
    """Project files that a file imports, also inside functions, with the line."""
    for node in ast.walk(TREES[file]):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the absolute name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if find_module(name) else str(node.module) for name in names]
        for name in names:
            if name.split(".")[0] != "visionmtl":
                assert name.split(".")[0] != "tools", f"{file}:{node.lineno}: tools are run, not imported"
                continue
            found = find_module(name)
            assert found, f"{file}:{node.lineno}: {name} does not exist"
            yield found, node.lineno


def may_import(file: Path, other: Path) -> bool:
    is_base = other.name == "base.py" and other.parent == file.parent
    return floor(other) < floor(file) or is_base or other.as_posix() in MAY_MEET.get(file.as_posix(), {})


@pytest.mark.parametrize("file", PRODUCT, ids=str)
def test_imports_point_down(file: Path):
    wrong = [
        f"{file}:{line} (floor {floor(file):g}) imports {other} (floor {floor(other):g})"
        for other, line in imported(file)
        if other != file and not may_import(file, other)
    ]
    assert not wrong, "\n".join(wrong)


def test_pairs_that_may_meet_do_meet_and_say_why():
    for file, others in MAY_MEET.items():
        met = {other.as_posix() for other, _ in imported(Path(file))}
        assert set(others) <= met, f"{file} no longer imports {set(others) - met}; take the pair off the list"
        assert all(others.values())


def test_the_top_level_is_what_was_agreed():
    assert {file.parts[0] for file in FILES} <= TOP_LEVEL
    assert Path("datasets/__init__.py") not in FILES, "it would shadow the `datasets` package of Hugging Face"


@pytest.mark.parametrize("file", PYTHON, ids=str)
def test_a_file_opens_with_its_charter_in_one_sentence(file: Path):
    source = (readme_tree.ROOT / file).read_text(encoding="utf-8")
    assert source.startswith('"""'), "the first line is the charter: a docstring"
    assert readme_tree.charter(file).endswith("."), "the first line is a whole sentence"
    assert "`" * 3 not in readme_tree.charter(file)


@pytest.mark.parametrize("file", [file for file in FILES if file.suffix in (".yaml", ".yml")], ids=str)
def test_a_config_opens_with_a_comment_that_says_what_it_is(file: Path):
    assert len(readme_tree.charter(file)) > 10


@pytest.mark.parametrize("file", [file for file in FILES if file.suffix in (".py", ".yaml")], ids=str)
def test_a_file_has_at_most_300_lines(file: Path):
    lines = (readme_tree.ROOT / file).read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{lines} lines; find the second idea in it and give that a file"


def test_a_package_opens_with_a_docstring_and_nothing_else():
    full = [str(file) for file in PYTHON if file.name == "__init__.py" and len(TREES[file].body) != 1]
    assert not full


def test_no_file_is_named_after_the_mood_of_its_author():
    moods = [str(file) for file in FILES if FORBIDDEN_NAMES & {part.partition(".")[0].lower() for part in file.parts}]
    assert not moods


@pytest.mark.parametrize("file", PYTHON, ids=str)
def test_no_error_is_caught_blindly(file: Path):
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            blind = {"everything", "Exception", "BaseException"} & set(re.findall(r"\w+", caught))
            assert not blind, f"{file}:{node.lineno} catches {caught}; name the error you expect"


@pytest.mark.parametrize("file", PRODUCT, ids=str)
def test_no_file_is_read_in_a_way_that_runs_code(file: Path):
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not UNPICKLERS & {name.split(".")[0] for name in names}, f"{file}:{node.lineno}"
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            assert (node.arg, node.value.value) not in {("weights_only", False), ("allow_pickle", True)}, file


def fingerprint(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """The body without docstring, with its own variables numbered; None for a body too short to be a copy."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    nodes = [node for statement in body for node in ast.walk(statement)]
    if sum(isinstance(node, ast.stmt) for node in nodes) <= 3:
        return None

    own = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    code = "\n".join(ast.unparse(statement) for statement in body)
    words = [word for word in re.findall(r"[^\W\d]\w*", code) if word in own]
    numbers = {word: f"_{index}" for index, word in enumerate(dict.fromkeys(words))}
    return re.sub(r"(?<![\w.])[^\W\d]\w*", lambda match: numbers.get(match[0], match[0]), code)


def test_no_function_has_a_twin_in_another_file():
    homes: dict[str, set[str]] = defaultdict(set)
    for file, module in TREES.items():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (print_ := fingerprint(node)):
                homes[print_].add(f"{file}:{node.name}")
    twins = [sorted(found) for found in homes.values() if len({name.partition(":")[0] for name in found}) > 1]
    assert not twins, f"give each pair one home, a floor down: {twins}"


def test_a_renamed_copy_counts_as_a_twin():
    one, two, other = (
        ast.parse(f"def {name}({x}):\n '''{name}'''\n {y} = {call}({x})\n {y} += 1\n print({y})\n return {y}").body[0]
        for name, x, y, call in (("f", "a", "b", "min"), ("g", "c", "d", "min"), ("h", "c", "d", "max"))
    )
    assert fingerprint(one) == fingerprint(two) != fingerprint(other)


def test_the_readme_lists_every_file_with_its_charter():
    readme = (readme_tree.ROOT / "README.md").read_text(encoding="utf-8")
    expected = readme_tree.tree()
    assert expected in readme, f"run `make tree`, or paste this into README.md:\n{expected}"
