"""Networks on the hub: a local folder in its layout comes back bit for bit; files by URL are checked."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import scene_run
import yaml

from visionmtl.cli import main
from visionmtl.engine import checkpoint
from visionmtl.engine.checkpoint import open_model
from visionmtl.export import hub
from visionmtl.export.hub import from_pretrained, push_to_hub, save_pretrained
from visionmtl.inference.predictor import load
from visionmtl.io.download import local_file, sha256


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    scene_run.save_untrained(scene_run.run(folder), folder)
    depth = {"images": 4, "rmse_m": 0.5125, "protocol": "per_image | mean", "per_class": {"secret": {"iou": 1.0}}}
    (folder / "eval").mkdir()
    results = {"depth": depth, "detection+depth": {"abs_rel": 0.25, "matched": 3, "protocol": "distance"}}
    (folder / "eval" / "step-0000007.json").write_text(json.dumps({"header": {"step": 7}, "results": results}))
    others = {"last": {"step": 9}, "first1": {"step": 7, "limit_batches": 1}, "train": {"step": 7, "split": "train"}}
    for number, (name, header) in enumerate(others.items(), 1):  # written later, of other weights or fewer images
        file = folder / "eval" / f"{name}.json"
        file.write_text(json.dumps({"header": header, "results": {"depth": {"rmse_m": 0.1, "images": 1}}}))
        os.utime(file, (2e9 + number, 2e9 + number))
    return folder


@pytest.fixture(scope="module")
def published(trained: Path) -> Path:
    return save_pretrained(trained, trained / "published", licence="apache-2.0", repo="me/toy")


def test_a_published_network_predicts_the_same_to_the_bit(trained: Path, published: Path):
    image = np.random.default_rng(0).integers(0, 256, (50, 64, 3), dtype=np.uint8)
    expected, found = load(trained, device="cpu")(image), from_pretrained(published, device="cpu")(image)
    np.testing.assert_array_equal(found.depth_m, expected.depth_m)
    np.testing.assert_array_equal(found.segmentation, expected.segmentation)
    np.testing.assert_array_equal(found.boxes.xyxy, expected.boxes.xyxy)
    alone = from_pretrained(published, device="cpu", tasks=["depth"])(image)
    assert list(alone.predictions) == ["depth"]


def test_the_card_tells_tasks_data_licence_and_metrics_with_their_protocols(trained: Path, published: Path):
    _, header, body = (published / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(header)
    assert (fields["license"], fields["library_name"]) == ("apache-2.0", "visionmtl")
    assert set(fields["tags"]) == {"multi-task", "detection", "segmentation", "depth"}
    assert "| depth | rmse_m | 0.5125 | 4 | per_image \\| mean |" in body
    assert "| detection+depth | abs_rel | 0.2500 |" in body
    assert 'from_pretrained("me/toy")' in body and "scenes" in body and "secret" not in body
    for name, space in load(trained, device="cpu").net.spaces.items():
        assert not space or all(label in body for label in space.classes), name
    assert str(trained) not in (published / "config.json").read_text(), "no path of the machine that trained it"


def test_a_network_of_the_package_keeps_its_licence_scores_and_limits(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(checkpoint, "PACKAGED", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    checkpoint.save_weights(tmp_path / "weights" / "tiny.safetensors", open_model(trained))
    front = "---\nlicense: other\nlicense_name: for-research\n---\n\n"
    (tmp_path / "weights" / "tiny.md").write_text(f"{front}# tiny\n\n## Scores\n\nAP 0.256\n\n## Limits\n\nRooms.\n")

    with pytest.raises(ValueError, match=r"licence is 'apache-2\.0', and tiny.* has 'other' \(for-research\);.*; give"):
        save_pretrained("tiny", tmp_path / "new", licence="apache-2.0")
    assert not (tmp_path / "new").exists()
    card = (save_pretrained("tiny", tmp_path / "new", licence="other") / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert (fields["license"], fields["license_name"]) == ("other", "for-research")
    assert "Licence of the weights: for-research." in body
    assert body.endswith("## Scores\n\nAP 0.256\n\n## Limits\n\nRooms.\n") and "## Metrics" not in body
    save_pretrained(trained, tmp_path / "own", licence="apache-2.0")  # any other network has whatever licence


def test_no_absolute_path_is_published():
    data = {"root": "/home/me/data/", "train": [{"root": "/home/me/data/rooms"}, {"root": "/mnt/coco", "split": "a/b"}]}
    run = {"output": "/runs/1", "model": {"encoder": {"checkpoint": "/w.pt"}}, "data": data}
    published = hub._without_paths(run)
    assert published["data"] == {"root": "data/", "train": [{"root": "data/rooms"}, {"root": "coco", "split": "a/b"}]}
    assert "/home" not in str(published) and "/runs" not in str(published)


def test_results_of_another_network_are_refused(trained: Path, tmp_path: Path):
    (tmp_path / "other.json").write_text(json.dumps({"results": {"normals": {}}}))
    with pytest.raises(ValueError, match="results are of task 'normals', and the network has"):
        save_pretrained(trained, tmp_path / "new", licence="other", results=tmp_path / "other.json")
    header = {"checkpoint": "other.pt", "step": 5}
    (tmp_path / "other.json").write_text(json.dumps({"header": header, "results": {"depth": {"rmse_m": 0.001}}}))
    with pytest.raises(ValueError, match=r"other.json is not of this network on all of its validation data"):
        save_pretrained(trained, tmp_path / "new", licence="other", results=tmp_path / "other.json")
    assert not (tmp_path / "new").exists()


def test_uploading_hands_the_same_files_to_the_hub(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class FakeApi:
        """What is asked of `huggingface_hub.HfApi`, into a folder."""

        def __init__(self, token: str | None) -> None:
            assert token is None

        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
            assert private and exist_ok
            (tmp_path / repo).parent.mkdir()

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return "https://address"

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    assert push_to_hub(trained, "me/toy", licence="other") == "https://address"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: tmp_path / repo)
    assert from_pretrained("me/toy", device="cpu").net.size == (64, 64)


def test_the_command_and_what_it_refuses(
    trained: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["publish", str(trained), "--licence", "other", "--folder"]
    assert main([*command, str(tmp_path / "new")]) == 0
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(hub.FILES)
    assert main([*command, str(tmp_path / "new")]) == 2
    assert main([*command, str(tmp_path / "other"), "--public"]) == 2
    told = capsys.readouterr().err
    assert "is not empty" in told and "--public would have no effect" in told
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no config\.json"):
        from_pretrained(trained)
    with pytest.raises(ValueError, match="which has none"):
        from_pretrained(published, revision="main")


def test_a_checkpoint_loads_from_a_url_with_its_checksum(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VISIONMTL_CACHE", str(tmp_path / "cache"))
    file = trained / "checkpoints" / "last.pt"
    url, digest = file.as_uri(), sha256(file)
    opened = open_model(f"{url}#sha256={digest}")
    assert opened.step == 7 and opened.path.is_relative_to(tmp_path / "cache")
    assert checkpoint.find(Path(f"{url}#sha256={digest}")) == opened.path, "a Path joins slashes; fetched once"

    wrong = "0" * 64
    for place in (f"{url}#sha256={wrong}", f"{file}#sha256={wrong}"):
        with pytest.raises(ValueError, match=f"{digest}, and {wrong} is asked for"):
            local_file(place)
    assert not (tmp_path / "cache" / wrong[:16] / "last.pt").exists()
    assert local_file(f"{file}#sha256={digest}") == file
    with pytest.raises(ValueError, match="a URL without a checksum"):
        local_file("https://host/best.pt")
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        local_file(f"{url}#sha256=abc")
    with pytest.raises(ValueError, match="cannot be fetched"):
        local_file(f"{url}.missing#sha256={digest}")


@pytest.mark.parametrize(
    ("changed", "is_taken"),
    [
        ({}, True),
        ({"checkpoint": "x/checkpoints/last.pt", "overrides": ["data.root=/y", "data.workers=0"]}, True),
        ({"checkpoint": "x/checkpoints/calibrated.pt"}, False),
        ({"overrides": ["data.val.0.images=images/*_0.png"]}, False),
        ({"limit_batches": 1}, False),
    ],
)
def test_the_card_has_results_of_this_network_on_all_of_its_data(trained: Path, tmp_path: Path, changed, is_taken):
    opened = open_model(checkpoint.find(trained))
    file = tmp_path / "result.json"
    header = {"checkpoint": str(opened.path), "step": opened.step, "split": "val", "overrides": [], **changed}
    file.write_text(json.dumps({"header": header, "results": {}}))
    assert hub._are_of(file, opened) == is_taken
