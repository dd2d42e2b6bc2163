"""Text files of others: limits, one value a key, plain data; what is wrong is named by file and line or field."""

import json
import os
from pathlib import Path

import pytest

from visionmtl.config import loader
from visionmtl.config.loader import ConfigError
from visionmtl.config.text_files import (
    MAX_NODES,
    check_plain,
    parse_line,
    parse_yaml,
    printable,
    read_json,
    read_object,
    read_text,
    read_yaml,
    shown,
)

TEN = [", ".join([f"'${{a{n}}}'"] * 10) for n in range(8)]
TENFOLD = "a0: [x, x]\n" + "".join(f"a{n + 1}: [{ten}]\n" for n, ten in enumerate(TEN))
LAUGHS = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}' if n else 'x'] * 9)}]\n" for n in range(9))


def test_yaml_is_plain_data_with_dates_as_texts_and_numbers_as_python_writes_them():
    content, _ = parse_yaml("{a: 1e-3, b: 2001-12-14, c: [0x10, 1_000, .5], d: null, 7: on}", "f")
    assert content == {"a": 0.001, "b": "2001-12-14", "c": [16, 1000, 0.5], "d": None, 7: True}
    assert parse_yaml("", "f") == (None, None)


def test_of_merged_mappings_the_first_wins_and_what_is_written_wins_over_both():
    content, _ = parse_yaml("x: &x {a: 1, b: 1}\ny: {<<: [{a: 2}, *x], c: 3}\nz: {a: 4, <<: *x}", "f")
    assert content["y"] == {"a": 2, "b": 1, "c": 3} and content["z"] == {"a": 4, "b": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: !!python/object/apply:os.system [ls]", r"f:2: the tag 'tag:yaml.org,2002:python/object"),
        ("a: !!timestamp 2001-99-99", r"f:1: the tag"),
        ("a: ! b", r"f:1: the tag '!'"),
        ("a: 1\nb: 2\na: 3", r"f:3: the key 'a' stands twice"),
        ("a: &x [1, *x]", r"f:1: the alias \*x stands inside what it names"),
        (LAUGHS, rf"more than {MAX_NODES:,} values, aliases written out"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("a: 0x" + "f" * 5000, "a number of 5,002 characters"),
        ("a: 0x_", "'0x_' looks like a number and is none"),
        ("yes: 1", "the key 'yes' is no text and no whole number"),
        ("[a]: 1", "the key 'a sequence' is no text"),
        ("a:\n\t- b", "f:2 is not YAML"),
        ("a: \0", "f is not YAML: unacceptable character"),
        ("<<: 3", "f:1: << takes a mapping"),
    ],
)
def test_yaml_that_asks_for_more_is_refused_by_line(text, said):
    with pytest.raises(ValueError, match=said) as told:
        parse_yaml(text, "f")
    assert str(told.value).count(";") >= 2 and type(told.value).__module__ != "yaml.constructor"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "is no complete JSON"),
        (b"[" * 100_000, "too deeply nested"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b"9" * 5000, "is no complete JSON"),
        (b"<xml/>", "is XML"),
    ],
)
def test_json_that_cannot_be_meant_is_refused_by_name(tmp_path, content, said):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said) as told:
        read_json(file)
    assert "a.json" in str(told.value) and str(told.value).count(";") >= 2


def test_a_file_of_ours_has_its_fields(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": {"b": 1}, "c": null}')
    assert read_object(file, {"a.b": int, "c": (dict, type(None))})["a"] == {"b": 1}
    for fields, said in [({"a.x": int}, "no field 'a.x'"), ({"a.b": str}, "a whole number as 'a.b'; a text is needed")]:
        with pytest.raises(ValueError, match=said):
            read_object(file, fields)
    for content, said in [
        ("[]", "a list"),
        ('{"a": ' + "[" * 80 + "]" * 80 + "}", "deeper"),
        (f'{{"a": {2**70}}}', "63"),
    ]:
        file.write_text(content)
        with pytest.raises(ValueError, match=said):
            read_object(file)
    with pytest.raises(ValueError, match=r"metrics.jsonl:3 is not JSON"):
        parse_line('{"a', "metrics.jsonl:3")


def test_what_is_no_regular_file_and_what_is_too_large_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match="named pipe"):
        read_yaml(tmp_path / "pipe.yaml")
    (tmp_path / "large.txt").write_text("a" * 100)
    with pytest.raises(ValueError, match="has 100 bytes"):
        read_text(tmp_path / "large.txt", max_bytes=99)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin.txt is not in UTF-8: byte 3 is 0xe9"):
        read_text(tmp_path / "latin.txt")


def test_control_characters_are_written_out_for_terminals():
    assert printable("a\x1b[2J\u202eb\nc\td\x9b") == "a\\x1b[2J\\u202eb\nc\td\\x9b"
    assert shown("\x1b\ud800") == '"\\u001b\\ud800"'
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep).endswith("too large to show")


def test_saved_settings_are_plain_data():
    check_plain({"a": [1, (2, "b")], 3: None}, "f")
    for odd, said in [
        ({"a": {1.5: 2}}, "the key 1.5"),
        ({"a": {1, 2}}, "a set among"),
        ([0] * (MAX_NODES + 1), "more than"),
    ]:
        with pytest.raises(ValueError, match=said):
            check_plain(odd, "f")


# ---- references in configs ----


def resolve(text: str, tmp_path: Path) -> dict:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    return loader.read(file).resolved()


def test_references_are_followed_to_settings_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", "/data")
    text = "a: {b: [1, {c: 2}]}\nd: ${a.b.1.c}\ne: ${a}\nf: '${oc.env:SOME_FOLDER}/x${d}'\n"
    text += "g: ${oc.env:NOT_SET,none}\nh: \\${d}\n"
    found = resolve(text, tmp_path)
    assert found["d"] == 2 and found["e"] == {"b": [1, {"c": 2}]} and found["f"] == "/data/x2" and found["g"] == "none"
    assert found["h"] == "${d}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: ${b}\nb: ${a}", "leads in a circle"),
        ("a: {b: '${a}'}", "leads in a circle"),
        ("a: ${oc.decode:1}", "names no setting and no variable"),
        ("a: ${oc.create:x}", "names no setting and no variable"),
        ("a: ${nothing.here}", "names no setting"),
        ("a: ${", r"without a path"),
        ("a: {b: 1}\nc: x${a}", "no single value"),
        (TENFOLD, "references written out"),
        ("\n".join(f"a{n}: ${{a{n + 1}}}" for n in range(100)) + "\na100: 1", "leads in a circle, or over 32 others"),
    ],
)  # fmt: skip
def test_references_that_lead_nowhere_or_too_far_are_refused(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said) as told:
        resolve(text, tmp_path)
    assert "a.yaml" in str(told.value) and str(told.value).count(";") >= 2


def test_json_files_are_yaml_with_the_same_rules(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": [1, "b"]}))
    assert read_yaml(tmp_path / "a.json")[0] == {"a": [1, "b"]}
