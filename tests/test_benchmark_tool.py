"""`tools/benchmark.py` on data sets small enough for a test."""

import json

import pytest

from visionmtl.cli import main


def test_workers_share_the_annotations_and_start_from_the_cache(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("visionmtl.io.index.MIN_BYTES", 0)
    command = ["benchmark", "data", "--images", "300", "--boxes", "2000", "--workers", "2"]
    assert main([*command, "--json", str(tmp_path / "a.json")]) == 0

    rows = {row["name"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert rows["growth of a worker, Uss"]["value"] < rows["growth of a worker, Uss"]["limit"] == 5
    assert rows["start from the cache"]["value"] < 3
    assert "growth of a worker, Private_Dirty" in capsys.readouterr().out


def test_a_count_that_cannot_be_is_refused(capsys):
    assert main(["benchmark", "data", "--workers", "0"]) == 2
    assert "--workers must be at least 1" in capsys.readouterr().err


def test_an_unknown_verb_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "fly"])
    assert "choose from" in capsys.readouterr().err
