"""Claims about `visionmtl.io.index`: parsed once, found by content, shared by name, never half there."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from visionmtl.io import index
from visionmtl.io.index import Arrays, cached


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(index, "MIN_BYTES", 0)
    monkeypatch.setenv("VISIONMTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.json").write_text("one")
    return tmp_path / "data/a.json"


def make() -> dict[str, np.ndarray]:
    return {"numbers": np.arange(5), "empty": np.zeros((0, 4), np.float32), "names": np.array([b"x", b"yz"])}


def kept(cache: Path) -> list[Path]:
    """What is in the cache besides locks."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def never() -> dict[str, np.ndarray]:
    raise AssertionError("made again")


def test_what_was_made_is_found_again(source):
    first, second = cached(source, "kind", make), cached(source, "kind", never)
    for name, values in make().items():
        for found in (first, second):
            assert found[name].dtype == values.dtype and (found[name] == values).all()
            assert type(found[name]) is np.ndarray
    assert list(source.parent.iterdir()) == [source], "the data set's folder stays as it was"


def test_other_content_of_the_same_size_and_date_is_made_anew(source):
    cached(source, "kind", make)
    date = source.stat()
    source.write_text("two")
    os.utime(source, ns=(date.st_atime_ns, date.st_mtime_ns))
    assert cached(source, "kind", lambda: {"numbers": np.array([7])})["numbers"].tolist() == [7]


def test_another_kind_is_made_too(source):
    cached(source, "kind", make)
    assert list(cached(source, "kind-2", lambda: {"other": np.zeros(1)})) == ["other"]


def test_a_copy_of_the_file_elsewhere_finds_the_same_index(source, tmp_path):
    cached(source, "kind", make)
    (tmp_path / "a.json").write_text("one")
    assert cached(tmp_path / "a.json", "kind", never)["numbers"].sum() == 10


def test_a_worker_is_sent_the_name_and_not_the_values(source):
    big = cached(source, "kind", lambda: {"numbers": np.arange(10**6)})
    sent = pickle.dumps(big)
    assert len(sent) < 1000 and (pickle.loads(sent)["numbers"] == np.arange(10**6)).all()


def test_small_sources_are_not_kept(source, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MIN_BYTES", 100)
    arrays = cached(source, "kind", make)
    assert not (tmp_path / "cache").exists()
    assert pickle.loads(pickle.dumps(arrays))["numbers"].tolist() == [0, 1, 2, 3, 4]


def test_arrays_cannot_be_written_to(source):
    for arrays in (cached(source, "kind", make), Arrays(make())):
        with pytest.raises(ValueError, match="read-only"):
            arrays["numbers"][0] = 3


def test_a_cache_that_cannot_be_written_is_said_and_costs_only_time(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISIONMTL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"cannot keep the index .* set VISIONMTL_CACHE"):
        assert cached(source, "kind", make)["numbers"].sum() == 10


def test_a_disk_that_fills_up_leaves_nothing_half_written(source, tmp_path, monkeypatch):
    def full(file, array, **_):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.warns(UserWarning, match="No space left"):
            cached(source, "kind", make)
    assert not kept(tmp_path / "cache")
    assert cached(source, "kind", make)["numbers"].sum() == 10


def test_where_another_process_was_faster_its_index_stays(source, tmp_path):
    def beaten() -> dict[str, np.ndarray]:
        folder = tmp_path / "cache" / f"a-kind-{index.content_key(source)}"
        index.save_arrays(folder, {"numbers": np.array([1])})  # by one that does not wait
        return {"numbers": np.array([2])}

    assert cached(source, "kind", beaten)["numbers"].tolist() == [1]
    assert len(kept(tmp_path / "cache")) == 1


@pytest.mark.parametrize("name", ["numbers.npy", "empty.npy", "names.npy", "arrays.json"])
@pytest.mark.parametrize("how", ["a bit", "cut short", "longer", "gone", "of another version"])
def test_a_damaged_index_is_told_and_made_anew(source, name, how):
    folder = cached(source, "kind", make).folder
    for at in range(-1, -60, -7):
        content = bytearray((folder / name).read_bytes())
        if how == "gone":
            (folder / name).unlink()
        elif how == "of another version":
            (folder / "arrays.json").rename(folder / "names.txt")
        elif how == "a bit":
            content[at] ^= 4
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_bytes(content[:at] if how == "cut short" else content + b"0")
        with pytest.warns(UserWarning, match=r"the index .* is damaged, .*: .*; .*: it is deleted and made anew from "):
            found = cached(source, "kind", make)
        assert found["numbers"].sum() == 10 and (cached(source, "kind", never)["names"] == make()["names"]).all()


def test_an_index_that_is_damaged_while_it_is_opened_by_a_worker_has_its_length(source):
    arrays = cached(source, "kind", make)
    sent = pickle.dumps(arrays)
    (arrays.folder / "numbers.npy").write_bytes(b"")
    with pytest.raises(index.CacheError, match=r"numbers\.npy: it has another length"):
        pickle.loads(sent)


def test_nothing_in_a_cache_is_executed(source, tmp_path):
    """An array of objects is a pickle, which runs what it likes; with sound checksums too."""

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    folder = cached(source, "kind", make).folder
    for path in folder.iterdir():
        path.unlink()
    np.save(folder / "numbers.npy", np.array([Payload()], object), allow_pickle=True)
    text = index.json.dumps(
        {"numbers": ((folder / "numbers.npy").stat().st_size, index.file_crc32(folder / "numbers.npy"))}
    )
    (folder / "arrays.json").write_text(f"{index.zlib.crc32(text.encode()):08x} {text}")
    with pytest.warns(UserWarning, match=r"numbers\.npy: .*made anew"):
        assert cached(source, "kind", make)["numbers"].sum() == 10
    assert not (tmp_path / "owned").exists()


def test_the_default_folder_is_the_users_cache(monkeypatch):
    monkeypatch.delenv("VISIONMTL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert index.cache_folder() == Path("/somewhere/visionmtl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert index.cache_folder() == Path.home() / ".cache" / "visionmtl"
