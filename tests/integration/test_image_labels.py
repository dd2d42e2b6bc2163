"""Image labels beside boxes and classes: a run trains and judges them, and files and Python give the same numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import scene_run

import visionmtl
from visionmtl.cli import main
from visionmtl.datasets.scenes import SCENES_FLOORS
from visionmtl.engine.checkpoint import open_model
from visionmtl.engine.trainer import train
from visionmtl.inference.results_io import open_predictions
from visionmtl.structures import Sample
from visionmtl.tasks.classification import Classification


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of boxes and floors, of one epoch."""
    folder = tmp_path_factory.mktemp("floors") / "run"
    run = scene_run.run(folder, ("detection",), tasks={"floor": {"type": "classification", "level": 4}})
    results = train(run)
    assert results["floor"]["images"] == 4 and 0 <= results["floor"]["accuracy"] <= 1
    assert all(row["losses"]["floor"]["cross_entropy"] > 0 for row in scene_run.rows(folder))
    return folder


def test_predictions_in_files_score_as_the_network_does(folder: Path, tmp_path: Path):
    saved, again = tmp_path / "p", tmp_path / "again.json"
    direct = ["eval", str(folder), "--device", "cpu", "--json", str(tmp_path / "direct.json")]
    assert main([*direct, "--save-predictions", str(saved)]) == 0
    assert main(["eval", str(folder), "--from-predictions", f"floor={saved / 'floor.json'}", "--json", str(again)]) == 0

    results = [json.loads(file.read_text())["results"]["floor"] for file in (tmp_path / "direct.json", again)]
    assert results[0] == results[1]
    rows = json.loads((saved / "floor.json").read_text())
    assert len(rows) == 4 and set(rows[0]["scores"]) == set(SCENES_FLOORS.classes)


def test_python_names_the_classes_best_first(folder: Path, tmp_path: Path):
    model = visionmtl.load(folder, device="cpu")
    result = model(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))

    known = result.classification
    assert known.name == known.names[0] and known.score == known.scores[0] == max(known.scores)
    assert set(known.names) == set(SCENES_FLOORS.classes) and known.scores.sum() == pytest.approx(1)
    assert result.save(tmp_path / "picture.png").is_file()


def test_it_comes_back_from_its_checkpoint_and_has_a_report(folder: Path, tmp_path: Path):
    assert open_model(folder).net.spaces["floor"] == SCENES_FLOORS
    options = ["--device", "cpu", "--json", str(tmp_path / "r.json"), "--report", str(tmp_path / "report.html")]
    assert main(["eval", str(folder), *options]) == 0
    assert "accuracy" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "holds a dict; a list of entries"),
        ([{"image_id": 1}], r"entry\[0\] .* it needs image_id, and as scores"),
        ([{"image_id": 1, "scores": {"plank": 1}}], r"'plank' \(did you mean 'planks'\?\).* no class of scenes_floors"),
        ([{"image_id": 1, "scores": {"planks": 2}}], "a number of 0..1"),
        (
            [{"image_id": 1, "scores": {}}, {"image_id": "01", "scores": {}}],
            r"entry\[1\] has image_id '01', .* earlier",
        ),
    ],
)
def test_files_of_scores_that_cannot_be_meant_are_errors(tmp_path: Path, rows: object, message: str):
    (tmp_path / "floor.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        open_predictions(tmp_path / "floor.json", Classification(), SCENES_FLOORS)


def test_an_image_without_an_entry_is_an_error(tmp_path: Path):
    (tmp_path / "floor.json").write_text('[{"image_id": 1, "scores": {"planks": 1}}]')
    read = open_predictions(tmp_path / "floor.json", Classification(), SCENES_FLOORS).read
    image = np.zeros((1, 1, 3), np.uint8)
    assert read(Sample(image=image, image_id="0001"))[1].labels.tolist() == [0]
    with pytest.raises(ValueError, match=r"image '2' has no entry in .*floor.json, which has 1; .* add it"):
        read(Sample(image=image, image_id="2"))
