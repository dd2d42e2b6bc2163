"""Files that would run code when they are unpickled run none, whichever door they come in by."""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scene_run
import torch
from torch import nn

from visionmtl.engine import checkpoint, extension
from visionmtl.engine.checkpoint import open_model
from visionmtl.engine.initial_weights import load_initial
from visionmtl.io.depth_maps import read_depth
from visionmtl.io.index import open_arrays
from visionmtl.modeling.weights import check_weights


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def zip_archive(value: Any) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def foreign_zip(value: Any) -> bytes:
    """By hand, with the newest protocol."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value))
        archive.writestr("archive/version", b"3")
    return buffer.getvalue()


def legacy(value: Any) -> bytes:
    """As torch before 1.6."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def legacy_tar(value: Any) -> bytes:
    """As torch before 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("pickle", "storages", "tensors"):
            data = pickle.dumps(value)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


WRAPPINGS = {"zip": zip_archive, "by hand": foreign_zip, "legacy": legacy, "tar": legacy_tar, "bare": pickle.dumps}


def initial(path: Path) -> Any:
    run = scene_run.run(names=["depth"])
    return load_initial(scene_run.untrained(run), run, path)


def old_network(path: Path) -> Any:
    return extension._load(extension.Extend.model_validate({"type": "frozen", "checkpoint": str(path)}))


DOORS: dict[str, Callable[[Path], Any]] = {
    "eval, predict, export, teachers": open_model,
    "--resume PATH": lambda path: checkpoint.load_resumed(path, fall_back=False),
    "--resume": lambda path: checkpoint.load_resumed(path, fall_back=True),
    "--init-from": initial,
    "--extend": old_network,
    "extend.fisher": extension._read_fisher,
    "model.encoder.checkpoint": lambda path: check_weights(path, nn.Linear(1, 1)),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("door", DOORS)
def test_a_pickle_with_a_payload_runs_nothing(tmp_path: Path, door: str, wrapping: str):
    target, path = tmp_path / "touched", tmp_path / "last.pt"
    whole = {**scene_run.checkpoint_content(1), "format": 1, "net": {"a": torch.zeros(1)}}
    for value in (
        Payload(target),
        {**whole, "curriculum": Payload(target)},
        {"a": torch.zeros(1), "b": Payload(target)},
    ):
        path.write_bytes(WRAPPINGS[wrapping](value))
        with pytest.raises(ValueError, match=r"last\.pt|no checkpoint in") as error:
            DOORS[door](path)
        assert str(error.value).count(";") >= 2, "in three parts"
        assert not target.exists()
    if wrapping == "bare":
        pickle.loads(path.read_bytes())
        assert target.exists(), "the payload is a real one"


def test_arrays_of_objects_are_not_read(tmp_path: Path):
    target = tmp_path / "touched"
    payload = np.array([[Payload(target)]], dtype=object)
    np.save(tmp_path / "depth.npy", payload)
    with pytest.raises(ValueError, match=r"depth\.npy"):
        read_depth(tmp_path / "depth.npy")
    np.save(tmp_path / "a.npy", payload)
    (tmp_path / "names").write_text("a")
    (tmp_path / "names.txt").write_text("a")
    with pytest.raises(ValueError, match="a"):
        open_arrays(tmp_path)
    assert not target.exists()
