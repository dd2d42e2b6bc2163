"""`tools/eval.py` on a checkpoint with random weights: tables, JSON, report, overrides and expectations."""

import json
import shutil

import pytest
import scene_run

from visionmtl import run as config
from visionmtl.cli import main
from visionmtl.engine.verify_results import Expectation

SMALL = [
    "data.train.0.num_images=3",
    "data.val.0.num_images=3",
    "data.train.0.size=[64,96]",
    "data.val.0.size=[64,96]",
    "data.size=[64,96]",
    "data.workers=0",
    "train.batch_size=2",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The last.pt of a run folder, as training leaves it."""
    return scene_run.save_untrained(config.load("configs/quickstart.yaml", SMALL), tmp_path_factory.mktemp("run"))


def evaluated(saved, *arguments):
    return main(["eval", str(saved), "--device", "cpu", *arguments])


def test_results_are_printed_by_protocol_and_kept_in_the_run_folder(saved, capsys):
    assert evaluated(saved) == 0

    words = " ".join(capsys.readouterr().out.split())
    assert "protocol coco " in words
    assert "protocol per_image: 0.3 < truth < 12 m" in words
    assert "cylinder │ 0.0000" in words  # a class table
    written = json.loads((saved.parent.parent / "eval" / "last-val.json").read_text())
    assert written["header"]["step"] == 7
    assert {name: result["images"] for name, result in written["results"].items()} == {
        "detection": 3,
        "segmentation": 3,
        "depth": 3,
        "detection+depth": 3,
    }
    assert 0 <= written["results"]["segmentation"]["miou"] <= 1


def test_a_missed_expectation_is_exit_status_1(saved, tmp_path, capsys):
    file = ("--json", str(tmp_path / "r.json"))

    assert evaluated(saved, *file, "--expect", "segmentation/miou>=0", "--expect", "depth/images=3+-0") == 0
    assert evaluated(saved, *file, "--expect", "segmentation/miou>=0", "--expect", "depth/rmse_m<=0") == 1
    assert "NOT MET: depth/rmse_m<=0 (found " in capsys.readouterr().out


def test_an_expectation_reaches_classes_with_a_slash_in_their_name():
    results = {"segmentation": {"per_class": {"a": {"iou": 0.1}, "a/b|c": {"iou": 0.5}}}}
    for text, found in (("per_class/a/b|c/iou>=0.4", (True, 0.5)), ("per_class/a/iou>=0.4", (False, 0.1))):
        assert Expectation.parse(f"segmentation/{text}").met(results) == found
    with pytest.raises(ValueError, match=r"per_class has no 'x'; it has a, a/b\|c; correct"):
        Expectation.parse("segmentation/per_class/x/iou>=0").met(results)


def test_results_of_another_evaluation_are_kept(saved, tmp_path, capsys):
    file, few = tmp_path / "r.json", ("--limit-batches", "1")
    assert evaluated(saved, *few, "--json", str(file)) == 0
    before = file.read_text()

    assert evaluated(saved, *few, "--json", str(file)) == 0  # the same again
    assert evaluated(saved, *few, "tasks.depth.protocol=pooled", "--json", str(file)) == 2
    assert "r.json exists and holds something else than the results of this evaluation" in capsys.readouterr().err
    assert file.read_text() == before

    for setting in ("data.val.0.num_images=2", "data.val.0.num_images=1", "data.val.0.num_images=2"):
        assert evaluated(saved, *few, setting) == 0
    folder = saved.parent.parent / "eval"
    assert [path.name for path in sorted(folder.glob("last-val-first1*"))] == [
        "last-val-first1-2.json", "last-val-first1.json",
    ]  # fmt: skip


def test_a_run_folder_stands_for_its_checkpoint(saved, tmp_path):
    file = tmp_path / "r.json"
    assert evaluated(saved.parent.parent, "--limit-batches", "1", "--json", str(file)) == 0
    assert json.loads(file.read_text())["header"]["checkpoint"] == str(saved)


def test_numbers_are_in_the_file_when_printing_fails(saved, tmp_path, monkeypatch):
    file = tmp_path / "r.json"

    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr("visionmtl.engine.logging.results_table", closed)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert evaluated(saved, "--limit-batches", "1", "--json", str(file)) == 141
    assert results(file)["depth"]["images"] == 2


def test_overrides_splits_and_limits_are_recorded_and_followed(saved, tmp_path):
    file = tmp_path / "r.json"

    assert (
        evaluated(saved, "tasks.depth.protocol=pooled", "--split", "test", "--limit-batches", "1", "--json", str(file))
        == 0
    )

    written = json.loads(file.read_text())
    assert written["results"]["depth"]["images"] == 2
    assert written["results"]["depth"]["protocol"].startswith("pooled")
    assert written["header"]["overrides"] == ["tasks.depth.protocol=pooled"]
    assert written["header"]["split"] == "test"


def results(file):
    return json.loads(file.read_text())["results"]


def test_saved_predictions_score_as_the_network_did(saved, tmp_path, capsys):
    once, again = tmp_path / "once.json", tmp_path / "again.json"
    folder = tmp_path / "predictions"

    assert evaluated(saved, "--save-predictions", str(folder), "--depth-units", "1000", "--json", str(once)) == 0
    (folder / "depth" / "preview.png").write_bytes(b"")
    capsys.readouterr()
    assert evaluated(saved, "--from-predictions", str(folder), "--json", str(again)) == 0

    left = f"depth: not scored: 1 PNGs of {folder / 'depth'} that no labelled image asked for, as preview.png"
    assert [line for line in capsys.readouterr().out.splitlines() if "not scored" in line] == [left]
    assert sorted(path.name for path in folder.iterdir()) == [
        "depth", "detection.json", "segmentation", "submission.json",
    ]  # fmt: skip
    before, after = results(once), results(again)
    assert after["detection"] == before["detection"]
    assert after["segmentation"] == before["segmentation"]
    assert after["depth"]["rmse_m"] == pytest.approx(before["depth"]["rmse_m"], abs=5e-4)  # half a millimetre
    assert evaluated(saved, "--save-predictions", str(folder)) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_a_config_with_files_needs_no_checkpoint(saved, tmp_path, capsys):
    folder, file = tmp_path / "predictions", tmp_path / "r.json"
    assert evaluated(saved, "--save-predictions", str(folder), "--json", str(file)) == 0
    only = ["eval", "configs/quickstart.yaml", *SMALL, "--from-predictions", f"segmentation={folder}/segmentation"]

    assert (
        main([*only, "--device", "cpu", "--expect", f"segmentation/miou={results(file)['segmentation']['miou']}+-0"])
        == 0
    )

    printed = capsys.readouterr().out
    assert "files of segmentation against configs/quickstart.yaml, val" in printed
    assert "not scored: detection, depth" in printed


def test_boxes_of_another_split_are_refused(saved, tmp_path, capsys):
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps([{"image_id": "elsewhere", "category_id": 0, "bbox": [0, 0, 9, 9], "score": 0.5}]))

    assert evaluated(saved, "--from-predictions", f"detection={file}") == 2
    refused = f"{file} has results for 1 image(s) that are not in scenes, the first is elsewhere"
    assert refused in capsys.readouterr().err


def test_all_definitions_stand_beside_each_other(saved, tmp_path, capsys):
    file = tmp_path / "r.json"
    assert evaluated(saved, "--all-protocols", "--json", str(file), "--expect", "depth/rmse_m>=0") == 0

    words, found = " ".join(capsys.readouterr().out.split()), results(file)
    assert "segmentation as" in words and "all pixels pooled, whole image" in words
    assert found["segmentation"]["miou"] == found["segmentation"]["definitions"]["one table, void left out"]["miou"]
    assert found["depth"]["rmse_m"] == found["depth"]["definitions"]["mean of images, whole image, metric"]["rmse_m"]


def test_flipping_is_recorded_beside_every_number(saved, tmp_path, capsys):
    file = tmp_path / "r.json"

    assert evaluated(saved, "--tta", "flip", "--json", str(file)) == 0

    assert all(result["protocol"].endswith("its mirror image") for result in results(file).values())
    assert json.loads(file.read_text())["header"]["tta"] == "flip"


def test_cocos_files_are_scored_without_images_or_a_network(real_data, tmp_path, capsys):
    folder = real_data / "coco" / "eval_reference"
    files = [
        *("--from-predictions", str(folder / "instances_val2014_fakebbox100_results.json")),
        *("--truth", str(folder / "instances_val2014_100.json")),
    ]

    assert main(["eval", *files, "--json", str(tmp_path / "r.json"), "--expect", "bbox/ap=0.505+-0.0005"]) == 0

    printed = capsys.readouterr().out.splitlines()
    published = (folder / "val2014_fake_eval_res.txt").read_text().splitlines()
    start = published.index("type=bbox") + 3
    at = printed.index(published[start])
    assert printed[at : at + 12] == published[start : start + 12]
    assert len(results(tmp_path / "r.json")["bbox"]["pr_curves"]["iou50"]) == 101


def test_the_report_shows_pictures(saved, tmp_path):
    page = tmp_path / "page.html"

    assert evaluated(saved, "--json", str(tmp_path / "r.json"), "--report", str(page)) == 0
    text = page.read_text()
    assert text.count('class="slider"') % 3 == 0 and text.count("data:image/webp") >= 10
    assert "detection: precision over recall" in text and "depth: error by true distance" in text
    assert "worst depth: rmse_m" in text and "taken for" in text and "command of this page" in text
    assert "command of the training" in text


def test_the_report_on_a_checkpoint_alone_names_no_training_that_cannot_be_run(saved, tmp_path):
    shutil.copy(saved, tmp_path / "net.pt")
    page = tmp_path / "page.html"
    assert evaluated(tmp_path / "net.pt", "--report", str(page), "--limit-batches", "1") == 0
    text = page.read_text()
    assert "command of this page" in text and "command of the training" not in text
    assert "higher is better" in text and "no config.yaml" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expect", "segmentatio/miou>=0"], "no task 'segmentatio' (did you mean 'segmentation'?)"),
        (["--expect", "segmentation/mio>=0"], "segmentation has no 'mio' (did you mean 'miou'?)"),
        (["--split", "vall"], "(from override data.val.0.split=vall)"),
        (["--json", "/dev/null/r.json"], "/dev/null cannot be read or written: Not a directory"),
        (
            ["--json", "new/r.out", "--report", "new/../new/r.out"],
            "is to hold two results; each needs a file of its own",
        ),
        (["--batch-size", "2", "--report", "/dev/null/r.html"], "/dev/null cannot be read or written"),
        (["--protocol", "coco"], "'coco' scores boxes in coco80, but task 'detection' learns scenes_objects"),
        (["--protocol", "coco", "--all-protocols"], "--all-protocols and --protocol do not go together"),
        (["--protocol", "coca"], "unknown protocol 'coca' (did you mean 'coco'?)"),
        (["--from-predictions", "nowhere", "--tta", "flip"], "tta would have no effect with --from-predictions"),
        (["--from-predictions", "nowhere", "--device", "cuda"], "device would have no effect with --from-predictions"),
        (["--from-predictions", "nowhere", "--truth", "x.json"], "checkpoint would have no effect with --truth"),
        (["--from-predictions", "nowhere"], "nowhere holds predictions of none of the tasks detection, segmentation"),
        (["--truth", "x.json"], "--truth goes with one --from-predictions FILE, and there are 0"),
        (["--depth-units", "1000"], "depth-units would have no effect"),
        (["--iou-type", "segm"], "iou-type would have no effect"),
        (["train.batchsize=2"], "train.batchsize"),
    ],
)
def test_errors_are_one_line_and_exit_status_2(saved, tmp_path, capsys, arguments, message):
    assert evaluated(saved, "--json", str(tmp_path / "r.json"), *arguments) == 2

    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1 and not (tmp_path / "r.json").exists()


def test_files_are_scored_against_any_network_that_other_commands_take(capsys):
    assert main(["eval", "nyuv2-small", "--from-predictions", "nowhere"]) == 2
    assert "nowhere holds predictions of none of the tasks detection, segmentation, depth" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [[], ["data.root=gone"], ["data.val.0.root=gone"]])
def test_where_data_are_not_there_the_error_names_the_setting_that_says_where(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "nyuv2-small", "--device", "cpu", *settings]) == 2
    error = capsys.readouterr().err
    assert f"found no {'gone' if settings else 'data'}/test.txt" in error
    assert "or give their folder as data.root=DIR" in error


@pytest.mark.parametrize("text", ["miou>=0.5", "segmentation/miou=0.5", "segmentation/miou>=0.5+-0.1", "a/b>0.1"])
def test_an_expectation_out_of_grammar_is_refused_before_anything_runs(saved, text, capsys):
    with pytest.raises(SystemExit):
        evaluated(saved, "--expect", text)
    assert "is no expectation; allowed are TASK/METRIC>=X" in capsys.readouterr().err


def test_whole_images_after_training_on_crops_are_another_input_size(saved, capsys):
    assert evaluated(saved, "data.eval_size=[128,192]") == 0
    assert "input (128, 192)" in capsys.readouterr().out
    assert evaluated(saved, "data.eval_size=[100,192]") == 2
    wrong = "data.eval_size is 100x192 px, but the network on encoder 'resnet10t' needs multiples of"
    assert wrong in capsys.readouterr().err
    assert evaluated(saved, "data.size=[128,192]") == 2
    assert "trained at (64, 96), and its depth is relative to that; another is not allowed; set" in (
        capsys.readouterr().err
    )
