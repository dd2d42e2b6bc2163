"""Configs: files build on each other, overrides go on top, and whatever is wrong is named with its place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from visionmtl.config.loader import SHIPPED, ConfigError
from visionmtl.config.registry import PYDANTIC_ERRORS
from visionmtl.run import Distributed, Optim, Run, dump, load, print_config, read, restore, schema

BASE = """\
# A base.
model:
  encoder: {name: resnet18}
  pyramid: {type: fpn, channels: 64, separable: true}
tasks:
  depth: {type: depth, max_depth_m: 8}
  normals: {type: normals}
data:
  size: [64, 96]
  train: [{type: scenes}, {type: scenes, seed: 1}]
  val: [{type: scenes}]
optim: {lr: 1e-3}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small config file."""
    return write(tmp_path, "base.yaml", BASE)


def write(folder: Path, name: str, text: str) -> Path:
    """The file, written."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problem(path: Path | str, *overrides: str) -> str:
    """The text of the error that loading must raise."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_a_file_lies_over_its_base(base: Path):
    child = write(base.parent, "child.yaml", "base: base.yaml\noptim: {weight_decay: 0.1}\ndata: {train: [scenes]}\n")

    run = load(child)

    assert (run.optim.lr, run.optim.weight_decay) == (1e-3, 0.1), "mappings merge"
    assert len(run.data.train) == 1, "lists are replaced"
    assert run.train.epochs == 12, "what nobody wrote has its default"


def test_later_bases_win_and_the_file_itself_wins_over_them(base: Path):
    write(base.parent, "one.yaml", "seed: 1\ntrain: {epochs: 1, keep: 1}\n")
    write(base.parent, "two.yaml", "seed: 2\ntrain: {epochs: 2}\n")
    child = write(base.parent, "child.yaml", "base: [base.yaml, one.yaml, two.yaml]\nseed: 3\n")

    run = load(child)

    assert (run.seed, run.train.epochs, run.train.keep) == (3, 2, 1)


def test_a_file_may_drop_what_its_base_has(base: Path):
    child = write(base.parent, "child.yaml", "base: base.yaml\nremove: tasks.normals\n")
    assert list(load(child).tasks) == ["depth"]


def test_bases_in_a_circle_are_an_error(base: Path):
    one = write(base.parent, "one.yaml", "base: two.yaml\n")
    write(base.parent, "two.yaml", "base: one.yaml\n")
    assert "circle: one.yaml -> two.yaml -> one.yaml" in problem(one)


def test_a_missing_base_and_a_missing_config_name_the_nearest(base: Path):
    child = write(base.parent, "child.yaml", "base: bse.yaml\n")
    assert "did you mean 'base.yaml'?" in problem(child)
    name = min(SHIPPED.glob("*.yaml")).name
    assert f"nearest: {name}" in problem(name.replace(".yaml", "x.yaml"))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid_or_a_base_of_one(path: Path):
    bases = {name for file in SHIPPED.glob("*.yaml") for name in bases_of(file)}
    if path.name not in bases:
        assert load(path.name, ["data.root=somewhere"]).tasks, "found by its name from anywhere"


def bases_of(path: Path) -> list[str]:
    """The names under `base:`."""
    names = yaml.safe_load(path.read_text(encoding="utf-8")).get("base", [])
    return [names] if isinstance(names, str) else names


@pytest.mark.parametrize("override", ["model.pyramid.type=bifpn", "model.pyramid=bifpn", "model.pyramid={type: bifpn}"])
def test_another_type_drops_the_fields_of_the_old_one(base: Path, override: str):
    pyramid = load(base, [override]).model.pyramid
    assert (pyramid.type, pyramid.channels) == ("bifpn", type(pyramid)().channels)


def test_the_same_type_keeps_the_fields_below(base: Path):
    pyramid = load(base, ["model.pyramid={type: fpn, norm: group}"]).model.pyramid
    assert (pyramid.channels, pyramid.norm) == (64, "group")


def test_a_word_takes_fields_as_the_type_it_stands_for(base: Path):
    pyramid = load(base, ["model.pyramid=bifpn", "model.pyramid.channels=32"]).model.pyramid
    assert (pyramid.type, pyramid.channels) == ("bifpn", 32)


def test_overrides_are_typed_reach_into_lists_and_remove(base: Path):
    run = load(
        base,
        ["optim.lr=3e-4", "train.compile=true", "data.train.1.seed=7", "optim.ema_decay=null", "~tasks.normals",
         "data.root=/a=b", "seed=5"],
    )  # fmt: skip

    assert (run.optim.lr, run.train.compile, run.optim.ema_decay, run.seed) == (3e-4, True, None, 5)
    assert [dataset.seed for dataset in run.data.train] == [0, 7]  # type: ignore[attr-defined]
    assert list(run.tasks) == ["depth"]
    assert run.data.root == "/a=b"


def test_settings_and_variables_can_be_referred_to(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_FOLDER", "/there")
    run = load(base, ["data.root=${oc.env:SOME_FOLDER}/x", "output=${data.root}/run"])
    assert run.output == "/there/x/run"


def test_a_reference_to_nothing_and_an_open_value_say_what_to_give(base: Path):
    text = problem(base, "data.root=${oc.env:SURELY_NOT_SET}")
    assert "data.root: the environment has no variable 'SURELY_NOT_SET'" in text
    assert "SURELY_NOT_SET" in text and "add data.root=VALUE" in text
    assert "data.root: left open (???); it must be given; add data.root=VALUE" in problem(base, "data.root=???")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optm.lr=1", "optm: unknown field 'optm' (did you mean 'optim'?)"),
        ("optim.lrr=1", "optim.lrr: unknown field 'lrr' (did you mean 'lr'?); allowed are name, lr,"),
        ("model.pyramid.chanels=1", "model.pyramid.chanels: unknown field 'chanels' (did you mean 'channels'?)"),
        ("model.pyramid.type=bifnp", "model.pyramid: unknown Pyramid type 'bifnp' (did you mean 'bifpn'?)"),
        ("tasks.depth.decoder={type: semantic_fpn, norn: 1}", "tasks.depth.decoder.norn: unknown field 'norn'"),
        ("data.train.1.sed=1", "data.train.1.sed: unknown field 'sed' (did you mean 'seed'?)"),
        ("train.precision=fp8", "train.precision: found 'fp8'; input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("optim.lr=fast", "optim.lr: found 'fast'; input should be a valid number"),
        ("train.epochs=yes", "train.epochs: found true (in YAML also yes, no, on, off); allowed is a number"),
        ("data.size=[true,64]", "data.size: found [true, 64] (in YAML also yes, no, on, off); allowed is a number"),
        ("tasks.depth=3", "tasks.depth: found 3; a Task needs 'type'; choose one of: classification"),
        ("tasks.depth.type=3", "tasks.depth: found type 3; a Task needs 'type'"),
        ("optim.momentum=0.9", "momentum is set but does nothing under name: adamw"),
        ("train.best=dpth/rmse_m", "train.best: found 'dpth/rmse_m' (did you mean 'depth'?)"),
        ("tasks.a-b={type: depth}", "tasks.a-b: task names are letters"),
        ("data.train.2.seed=1", "data.train.2 does not exist: data.train is a list of 2; its entries are 0 to 1"),
        ("~tasks.dept", "nothing to remove at 'tasks.dept' (did you mean 'depth'?)"),
        ("optim..lr=1", "is no path to a setting"),
        ("seed=[", "is not YAML"),
        ("seed", "'seed' is no override; write path=value"),
    ],
)
def test_a_wrong_override_is_named_with_its_path_and_what_is_allowed(base: Path, override: str, said: str):
    text = problem(base, override)
    assert said in text
    assert override in text, "it says where the problem comes from"


def test_every_problem_of_a_file_is_listed_with_its_line(base: Path):
    child = write(base.parent, "child.yaml", "base: base.yaml\nseed: x\ntrain:\n  epochs: 0\n")

    lines = problem(child).splitlines()

    assert lines[0].startswith("2 problems in ")
    assert lines[1].strip().startswith("seed: found 'x'") and lines[1].endswith("child.yaml:2)")
    assert lines[2].strip().startswith("train.epochs: found 0") and lines[2].endswith("child.yaml:4)")


def test_a_run_without_tasks_is_an_error(base: Path):
    assert "tasks: no tasks; a run learns one or more" in problem(base, "~tasks.depth", "~tasks.normals")


def test_the_nearest_field_is_named_in_python_too():
    with pytest.raises(ValidationError, match="did you mean 'weight_decay'"):
        Optim(weight_decy=1)  # type: ignore[call-arg]
    assert "extra_forbidden" in PYDANTIC_ERRORS, "pydantic still calls it so"


def test_a_path_that_begins_with_a_tilde_lies_in_the_home_folder(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(base.parent))
    folder = "{type: folder, root: '${data.root}', images: '*.png'}"

    run = load(base, ["data.root=~/mine", f"data.train=[{folder}]", "data.cache=~/cache", "output=~/runs"])

    assert [run.data.root, run.data.train[0].root] == [f"{base.parent}/mine"] * 2  # type: ignore[attr-defined]
    assert (run.data.cache, run.output) == (base.parent / "cache", f"{base.parent}/runs")
    write(base.parent, "child.yaml", "base: ~/base.yaml\n")
    assert load(base.parent / "child.yaml") == load(base)


def test_a_dumped_run_loads_as_the_same_run(base: Path):
    run = load(base, ["optim.schedule=step", "optim.milestones=[0.5, 0.75]"])

    again = load(write(base.parent, "config.yaml", dump(run)))

    assert again == run
    assert Run.model_validate(json.loads(json.dumps(run.model_dump(mode="json")))) == run, "as checkpoints keep it"


def test_the_printed_config_is_the_dumped_one_with_origins(base: Path):
    child = write(base.parent, "child.yaml", "base: base.yaml\nbalance: uncertainty\n")
    loaded = read(child, ["data.train.1.seed=7"])

    text = print_config(loaded)

    assert yaml.safe_load(text) == yaml.safe_load(dump(loaded.run))
    origins = {line.split("#")[0].strip(): line.split("#")[1].strip() for line in text.splitlines() if "#" in line}
    assert origins["lr: 0.001"].endswith("base.yaml:12")
    assert origins["type: uncertainty"].endswith("child.yaml:2")
    assert origins["seed: 7"] == "override data.train.1.seed=7"
    assert origins["epochs: 12"] == "default"


def test_merged_values_have_the_line_of_their_anchor(tmp_path: Path):
    text = (
        "data:\n  train:\n    - &mine {type: scenes, num_images: 6,\n       seed: 3}\n"
        "  val:\n    - {<<: *mine, seed: 4}\n    - <<: [{seed: 5}, *mine]\n"
    )
    child = write(tmp_path, "merged.yaml", "base: base.yaml\n" + text)
    write(tmp_path, "base.yaml", BASE)

    lines = print_config(read(child)).splitlines()
    printed = [(line.split("#")[0].strip(), line.rpartition(":")[2]) for line in lines if "merged.yaml" in line]

    assert [line for line in printed if line[0].startswith("num_images")] == [("num_images: 6", "4")] * 3
    assert [line for line in printed if line[0].startswith("seed")] == [
        ("seed: 3", "5"), ("seed: 4", "7"), ("seed: 5", "8"),
    ]  # fmt: skip
    run = load(child)
    assert [one.model_dump()["seed"] for one in (*run.data.train, *run.data.val)] == [3, 4, 5]


def test_a_base_is_looked_for_beside_the_file_then_among_the_shipped_configs(tmp_path: Path):
    child = write(tmp_path, "mine.yaml", "base: quickstart.yaml\ntrain: {epochs: 2}\n")
    assert load(child).train.epochs == 2 and "segmentation" in load(child).tasks

    write(tmp_path, "quickstart.yaml", BASE)
    assert list(load(child).tasks) == ["depth", "normals"]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("epochs=3", "did you mean train.epochs?"),
        ("train.lr=3", "did you mean optim.lr?"),
        ("name=x", "did you mean model.encoder.name or optim.name?"),
        ("nothing_like_it=1", "correct it ("),
    ],
)
def test_a_setting_in_the_wrong_place_is_told_its_path(base: Path, override: str, hint: str):
    assert hint in problem(base, override)


def test_the_schema_knows_every_field_and_points_nowhere_empty():
    plain = schema()
    definitions = plain["$defs"]

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if isinstance(target := node.get("$ref"), str):
                assert target.removeprefix("#/$defs/") in definitions
            for inner in node.values():
                walk(inner)
        elif isinstance(node, list):
            for inner in node:
                walk(inner)

    walk(plain)
    assert set(plain["properties"]) == {"base", "remove", *Run.model_fields}
    members = plain["properties"]["tasks"]["additionalProperties"]["anyOf"]
    assert any("max_depth_m" in member.get("properties", {}) for member in members)
    assert "required" not in plain, "a file may hold any part of a run"


def test_the_schema_accepts_every_shipped_config():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema())
    for path in SHIPPED.glob("*.yaml"):
        validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_shipped_schema_is_the_one_the_command_writes():
    # in a process of its own: specs that other tests define would join the schema
    done = subprocess.run([sys.executable, "-m", "visionmtl.run"], capture_output=True, text=True, check=True)
    shipped = (SHIPPED / "schema.json").read_text(encoding="utf-8")
    assert shipped == done.stdout, "write it again: python -m visionmtl.run > configs/schema.json"


def test_an_eager_run_that_was_saved_with_a_former_default_of_a_compiler_setting_opens(base: Path):
    plain = load(base).model_dump(mode="json")
    plain["train"]["activation_memory"] = 0.95
    assert restore(plain, "last.pt") == load(base)
    with pytest.raises(ConfigError, match=r"activation_memory is 0\.9, but compile is false"):
        restore(plain, "last.pt", ["train.activation_memory=0.9"])


def test_a_former_setting_is_passed_over_at_its_default_and_refused_otherwise():
    assert Distributed.model_validate({"static_graph": False, "bucket_mb": None}) == Distributed()
    with pytest.raises(ValidationError, match="unknown field 'static_graph'"):
        Distributed.model_validate({"static_graph": True})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import", r"invalid syntax .half_written.py, line 1.*; correct that file"),
        ("", "half_written has no Part; correct"),
    ],
)
def test_a_plug_in_that_cannot_be_read_is_one_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "half_written.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "half_written", raising=False)
    with pytest.raises(ConfigError, match=message):
        load("configs/quickstart.yaml", ["model.sharing=half_written.Part"])
    sys.modules.pop("half_written", None)
