"""One .safetensors file is the whole network for every reader of checkpoints, and a damaged one is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import scene_run
import torch
from damage import damaged
from safetensors import safe_open
from safetensors.torch import save_file

from visionmtl.cli import main
from visionmtl.engine import checkpoint
from visionmtl.engine.checkpoint import Damaged, open_model
from visionmtl.engine.initial_weights import load_initial
from visionmtl.export.hub import from_pretrained, save_pretrained
from visionmtl.inference.predictor import load


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    folder = tmp_path_factory.mktemp("trained")
    scene_run.save_untrained(scene_run.run(folder, ["depth"]), folder)
    return folder


@pytest.fixture(scope="module")
def file(trained: Path) -> Path:
    """What the command writes by default."""
    assert main(["export", str(trained), "--format", "safetensors"]) == 0
    return trained / "export" / "last.safetensors"


def test_the_file_is_the_network_to_the_bit_for_every_reader(trained: Path, file: Path):
    image = np.random.default_rng(0).integers(0, 256, (50, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load(file, device="cpu")(image).depth_m, load(trained, device="cpu")(image).depth_m)
    assert (open_model(file).step, open_model(file).run) == (7, open_model(trained).run)
    run = scene_run.run(names=["depth"])
    net = scene_run.untrained(run)
    torch.nn.init.zeros_(next(net.parameters()))
    taken = load_initial(net, run, file)
    assert not any("not taken" in line for line in taken)
    assert scene_run.differences(dict(net.state_dict()), dict(open_model(trained).net.state_dict())) == []


def test_its_metadata_is_text_alone(file: Path):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert set(metadata) == {"format", "visionmtl", "sha256"}
    assert set(json.loads(metadata["visionmtl"])) == {"visionmtl_format", "step", "epoch", "run", "spaces"}


def test_a_training_does_not_go_on_from_it(file: Path):
    with pytest.raises(ValueError, match=r"holds a network and no state of a training; .*--init-from .*last\.safetens"):
        checkpoint.load_resumed(file, fall_back=False)


def test_a_damaged_file_is_refused(file: Path, tmp_path: Path):
    rng, whole, path = np.random.default_rng(0), file.read_bytes(), tmp_path / "a.safetensors"
    for _ in range(60):
        path.write_bytes(damaged(whole, rng))
        with pytest.raises(Damaged, match=r"a\.safetensors is damaged or no network of visionmtl \(.*\); .*; use one"):
            checkpoint.load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(Damaged, match="has no digest in its metadata, so that visionmtl did not write it"):
        checkpoint.load(path)


def test_a_damaged_published_network_is_refused(trained: Path, tmp_path: Path):
    folder = save_pretrained(trained, tmp_path / "published", licence="other")
    rng = np.random.default_rng(0)
    for name in ("model.safetensors", "config.json"):
        whole = (folder / name).read_bytes()
        for _ in range(15):
            changed = damaged(whole, rng)
            (folder / name).write_bytes(changed)
            try:
                same = name == "config.json" and json.loads(changed) == json.loads(whole)
            except ValueError:
                same = False
            if not same:  # white space between the parts of JSON may be lost
                with pytest.raises(ValueError, match=r"published.*;.*;"):
                    from_pretrained(folder, device="cpu")
        (folder / name).write_bytes(whole)

    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"step": 8}))
    with pytest.raises(ValueError, match=r"has another 'step' than model\.safetensors"):
        from_pretrained(folder, device="cpu")


def test_a_network_that_was_published_before_the_digest_still_loads(trained: Path, tmp_path: Path):
    folder = save_pretrained(trained, tmp_path / "published", licence="other")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"visionmtl_format": 1}))
    save_file(dict(open_model(trained).net.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    assert list(from_pretrained(folder, device="cpu").net.tasks) == ["depth"]

    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged \(.*\); .* is needed; fetch it again"):
        from_pretrained(folder, device="cpu")


def test_options_that_would_have_no_effect_are_refused(
    trained: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["export", str(trained), "--format", "safetensors"]
    refusals = {
        "--int8": "--int8 would have no effect with --format safetensors",
        "--batch=4": "--batch would have no effect",
        f"--output={tmp_path / 'a.pt'}": "does not end in .safetensors",
        f"--output={file}": "exists already",
    }
    for option, said in refusals.items():
        assert main([*command, option]) == 2
        assert said in capsys.readouterr().err
    assert main([*command, "data.eval_size=[96,96]", "--output", str(tmp_path / "new" / "a.safetensors")]) == 0
    assert open_model(tmp_path / "new" / "a.safetensors").run.data.eval_size == (96, 96)


def test_half_the_bytes_are_the_network_within_float16(trained: Path, file: Path, tmp_path: Path):
    small = tmp_path / "small.safetensors"
    assert main(["export", str(trained), "--format", "safetensors", "--half", "--output", str(small)]) == 0
    assert small.stat().st_size < 0.6 * file.stat().st_size
    whole, half = (open_model(one).net for one in (file, small))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(half.state_dict()[name], value, rtol=2**-11, atol=1e-7)
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())


def test_numbers_beyond_float16_are_not_halved(trained: Path, tmp_path: Path):
    opened = open_model(trained)
    torch.nn.init.constant_(next(opened.net.parameters()), 1e5)
    with pytest.raises(
        ValueError, match=r"beyond float16, which ends at 65504: .* numbers are not finite, in .*; write"
    ):
        checkpoint.save_weights(tmp_path / "a.safetensors", opened, half=True)


def test_a_network_of_the_package_is_known_by_its_name(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    networks, home = tmp_path / "networks", tmp_path / "home"
    networks.mkdir()
    home.mkdir()
    (networks / "tiny.safetensors").write_bytes(file.read_bytes())
    monkeypatch.setattr(checkpoint, "PACKAGED", networks)
    monkeypatch.chdir(home)

    assert load("tiny", device="cpu").net.tasks.keys() == {"depth"}
    assert main(["eval", "tiny"]) == 0
    assert [path.name for path in networks.iterdir()] == ["tiny.safetensors"], "nothing is written into the package"
    assert list((home / "runs" / "tiny" / "eval").iterdir())
    with pytest.raises(ValueError, match=r"no checkpoint tinny; .*; with the package comes tiny$"):
        load("tinny")
    (home / "tiny").mkdir()
    with pytest.raises(ValueError, match="tiny is a folder without a checkpoint"):
        load("tiny")


def test_the_network_of_the_package_predicts(tmp_path: Path):
    model = load("nyuv2-small", device="cpu")
    assert {name: len(space.classes) for name, space in model.net.spaces.items() if space} == {
        "detection": 19, "segmentation": 13
    }  # fmt: skip
    assert sum(parameter.numel() for parameter in model.net.parameters()) == 5_134_681
    assert repr(model) == "Predictor('nyuv2-small', detection, segmentation, depth, on cpu)"
    result = model(np.full((60, 80, 3), 128, np.uint8))
    assert result.depth_m.shape == result.segmentation.shape == (60, 80)
    assert 0.5 <= result.depth_m.min() <= result.depth_m.max() <= 10
    file = checkpoint.PACKAGED / "nyuv2-small.safetensors"
    assert file.stat().st_size < 12e6 and file.with_suffix(".md").is_file()
    with pytest.raises(ValueError, match="'other'"):
        save_pretrained("nyuv2-small", tmp_path / "new", licence="apache-2.0")
    card = (save_pretrained("nyuv2-small", tmp_path / "new", licence="other") / "README.md").read_text()
    assert all(f"## {name}\n" in card for name in ("Data and licence", "Training", "Scores", "Limits"))


@pytest.mark.slow
def test_the_network_of_the_package_scores_what_its_card_says(real_data: Path, tmp_path: Path):
    results = tmp_path / "results.json"
    command = ["eval", "nyuv2-small", "--protocol", "nyu_joint", f"data.val.0.root={real_data / 'nyuv2'}"]
    assert main([*command, "data.workers=0", "--json", str(results)]) == 0
    scores = json.loads(results.read_text())["results"]
    card = (checkpoint.PACKAGED / "nyuv2-small.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| **this file"))
    said = [float(cell) for cell in row.split("|")[2:-1]]
    metrics = [("detection", "ap"), ("detection", "ap50"), ("segmentation", "miou"), ("segmentation", "pixel_accuracy"),
               ("depth", "rmse_m"), ("depth", "abs_rel"), ("depth", "delta1")]  # fmt: skip
    assert [scores[task][metric] for task, metric in metrics] == pytest.approx(said, abs=1e-3)
