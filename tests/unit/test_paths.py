"""Names of files mean one image, lie inside their folder, and are looked for one folder at a time."""

import os
import socket
import unicodedata

import pytest

from visionmtl.io.paths import (
    ABSENT,
    AMBIGUOUS,
    Files,
    Names,
    any_case,
    fixed_part,
    read_lines,
    regular_file,
    stays_inside,
    without_ending,
)


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("images/x/a.jpg", 0), ("x/a.jpg", 0), ("x/a", 0), ("images/y/a", 1),
        ("a.jpg", AMBIGUOUS), ("b.png", 2), ("b", 2), ("c", ABSENT), ("z/a.jpg", ABSENT),
    ],
)  # fmt: skip
def test_an_image_goes_by_every_name_that_only_it_can_have(name, position):
    assert Names(["images/x/a.jpg", "images/y/a.jpg", "images/b.png"], "images/").find(name) == position


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "./a", "a//b", "a\\b", "c:/a", "a\0", "\ud800.jpg"])
def test_a_name_that_may_lead_elsewhere_does_not_stay_inside(name):
    assert not stays_inside(name)


def test_dots_within_names_are_names():
    assert all(map(stays_inside, ["a", "a/b..c.png", "...", ".hidden/a"]))
    assert [without_ending(name) for name in ("a/b.c.png", "a.b/c", ".hidden")] == ["a/b.c", "a.b/c", ".hidden"]


def test_the_fixed_part_of_a_pattern_ends_before_its_first_wildcard():
    patterns = ["images/x/*.jpg", "images/*/x/*.jpg", "*.jpg", "images/a[0-9].png"]
    assert [fixed_part(pattern) for pattern in patterns] == ["images/x/", "images/", "", "images/"]


def test_only_a_plain_ending_is_taken_in_any_case():
    patterns = ["a/*.jpg", "a/*.mp4", "a/*", "a/*.[jp]*g", "a.b/c"]
    assert [any_case(one) for one in patterns] == ["a/*.[jJ][pP][gG]", "a/*.[mM][pP]4", *patterns[2:4], "a.b/c"]


def test_a_list_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \r\n\ntwo")
    assert read_lines(tmp_path / "a.txt") == ["one", "", "two"]
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not in UTF-8: byte 3 .*; a text file in UTF-8 is needed; save"):
        read_lines(tmp_path / "a.txt")


def test_files_are_found_where_they_are(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").touch()
    assert Files(tmp_path).present(["a/1.png", "a/2.png", "b/1.png"]).tolist() == [True, False, False]


def test_names_in_two_unicode_forms_meet(tmp_path):
    composed = [f"Räume/café_{i}.png" for i in range(2)]
    decomposed = [unicodedata.normalize("NFD", name) for name in composed]
    assert (
        composed[0] != decomposed[0] and Names(decomposed).find(composed[1]) == Names(composed).find(decomposed[1]) == 1
    )
    (tmp_path / decomposed[0]).parent.mkdir()
    (tmp_path / decomposed[0]).touch()

    files = Files(tmp_path)

    assert files.present(composed).tolist() == [True, False]
    assert files.path(composed[0]) == tmp_path / decomposed[0] and files.path(composed[0]).is_file()


def test_where_both_forms_are_images_the_very_name_decides():
    names = Names(["é.png", "e\u0301.png"])
    assert (names.find("é.png"), names.find("e\u0301.png"), names.find("é")) == (0, 1, 0)


@pytest.mark.parametrize("kind", ["a named pipe", "a folder", "a socket", "a device", "zero bytes"])
def test_only_regular_files_are_opened(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    place = {"a device": "/dev/zero", "zero bytes": "a\0b"}.get(kind, "a.txt")
    if kind == "a named pipe":
        os.mkfifo(place)
    elif kind == "a folder":
        os.mkdir(place)
    elif kind == "a socket":
        socket.socket(socket.AF_UNIX).bind(place)
    with pytest.raises(ValueError, match=kind):
        regular_file(place)


def test_links_to_files_are_regular_and_a_missing_file_is_the_callers_to_tell(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert regular_file(tmp_path / "b") == tmp_path / "b"
    with pytest.raises(FileNotFoundError):
        regular_file(tmp_path / "c")


@pytest.mark.parametrize("name", ["../a", "b/../../a", "/etc/passwd", "b/..", "a\0b"])
def test_no_name_leads_out_of_the_root_and_links_below_it_may(tmp_path, name):
    (tmp_path / "root" / "b").mkdir(parents=True)
    (tmp_path / "a").write_text("secret")
    (tmp_path / "root" / "linked").symlink_to(tmp_path)
    files = Files(tmp_path / "root")
    with pytest.raises(ValueError, match=r"leads out of .*root; files of a data set have relative names"):
        files.present([name])
    assert files.present(["linked/a"]).all()
