"""Everything needed to continue a run or to use its network: plain data, written atomically."""

import errno
import os
import shutil
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from visionmtl.io.atomic import atomic_write
from visionmtl.io.download import local_file
from visionmtl.modeling.weights import load_strictly
from visionmtl.network import MultiTaskNet, build_model
from visionmtl.run import Run, restore
from visionmtl.structures import LabelSpace

FORMAT = 1
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EINVAL}
"""What the system answers where a file cannot have a second name (FAT, some network file systems)."""

_PARTS: dict[str, tuple[type, ...]] = {
    "step": (int,), "epoch": (int,), "best": (int, float),
    "run": (dict,), "run/model": (dict,), "run/tasks": (dict,), "run/data": (dict,), "run/data/size": (list, tuple),
    "run/balance": (dict,), "run/optim": (dict,), "run/train": (dict,),
    "spaces": (dict,), "net": (dict,), "ema": (dict, NoneType), "balancer": (dict,), "scaler": (dict,),
    "optimizer": (dict,), "optimizer/state": (dict,), "optimizer/param_groups": (list,),
}  # fmt: skip
"""What every checkpoint holds, by path. Newer ones also have "world", the number of processes that trained it."""
READING_FAILS = (
    RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error,
    UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
"""What torch.load raises on bytes that it did not write; it has no exception of its own."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain data so that a crash leaves the old file or the new one, never half of either.

    The file before is kept as `<name>.previous`.
    """
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, **state}, file)
        if path.exists():
            _link(path, path.with_name(path.name + ".previous"))


def save_weights(path: Path, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint that predicts with other weights, as `state` otherwise; no run can go on from it."""
    without: dict[str, Any] = {
        "ema": None,
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
        "balancer": {},
    }
    save(path, {key: value for key, value in state.items() if key != "format"} | {"net": dict(weights)} | without)


def save_step(folder: Path, state: Mapping[str, Any], keep: int) -> None:
    """checkpoints/last.pt of a run directory, and step-N.pt for the newest `keep` steps."""
    path = folder / "checkpoints" / "last.pt"
    save(path, state)
    if keep:
        named = path.with_name(f"step-{state['step']:07d}.pt")
        _link(path, named)
        # by time, not by name: after going back to an earlier step, later ones lie there that are older
        for old in sorted(path.parent.glob("step-*.pt"), key=lambda file: file.stat().st_mtime_ns)[:-keep]:
            old.unlink()


def _link(path: Path, other: Path) -> None:
    """Make `other` the same file as `path`; a copy where the file system has no hard links."""
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        with path.open("rb") as source, atomic_write(other) as copy:
            shutil.copyfileobj(source, copy)


def find(path: str | Path) -> Path:
    """The checkpoint at `path`; of a run folder its best, else its last. Raises ValueError where there is none.

    A URL with a checksum is one, too: https://HOST/best.pt#sha256=HEX, see `io.download`.
    """
    path = local_file(path)
    if path.is_dir():
        for name in ("checkpoints/best.pt", "checkpoints/last.pt", "best.pt", "last.pt"):
            if (path / name).is_file():
                return path / name
        raise ValueError(
            f"{path} is a folder without a checkpoint; a run folder keeps checkpoints/best.pt and last.pt; "
            "train first, or name a .pt file"
        )
    if not path.is_file():
        near = sorted(str(file) for inside in ("*.pt", "checkpoints/*.pt") for file in path.parent.glob(inside))[:5]
        raise ValueError(
            f"there is no checkpoint {path}; a run keeps them in checkpoints/last.pt and best.pt; "
            + (f"nearby are: {', '.join(near)}" if near else "train first, or correct the path")
        )
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it. Raises ValueError where it is not one of ours, or not whole."""
    path = find(path)
    if path.suffix in (".yaml", ".yml", ".json"):
        raise ValueError(
            f"{path} is a {path.suffix} file, not a checkpoint; a .pt file or a run folder is needed; give "
            "runs/NAME/checkpoints/best.pt, or train first: visionmtl train CONFIG"
        )
    previous = path.with_name(path.name + ".previous")
    advice = f"use {previous} beside it" if previous.is_file() else "use one that visionmtl wrote, or train first"
    try:  # a zip archive has its table of contents at the end: a file that was cut short has none
        whole = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True) if whole else None
    except READING_FAILS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} is damaged or no checkpoint of visionmtl ({reason}); tensors and plain data are all that is "
            f"read; {advice}"
        ) from error
    if not whole:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is no checkpoint, or was cut short; a checkpoint is the zip "
            f"archive that torch.save writes; {advice}"
        )
    return _check_parts(state, path, advice)


def _check_parts(state: Any, path: Path, advice: str) -> dict[str, Any]:
    if not isinstance(state, dict) or "format" not in state:
        kind = f"a dict with {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else f"a {_kind(state)}"
        raise ValueError(
            f"{path} holds {kind}, and no checkpoint format; a checkpoint of visionmtl has one; {advice}. Weights of "
            "an encoder alone go to model.encoder.checkpoint"
        )
    if state["format"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {state['format']!r}; this version reads {FORMAT}; "
            "use a checkpoint that visionmtl wrote, or the version that wrote it"
        )
    for place, kinds in _PARTS.items():
        above, _, part = place.rpartition("/")
        holder = state
        for key in filter(None, above.split("/")):
            holder = holder[key]
        if part not in holder or not isinstance(holder[part], kinds):
            found = f"a {_kind(holder[part])} as {place!r}" if part in holder else f"no {place!r}"
            allowed = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"{path} has {found}; a checkpoint has a {allowed} there; {advice}")
    weights = {"net": state["net"], "balancer": state["balancer"]}
    if state["ema"] is not None:
        weights["ema/module"] = state["ema"].get("module")
    for place, tensors in weights.items():
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ValueError(f"{path} has other things than tensors by name in {place!r}; weights are such; {advice}")
    for task, space in state["spaces"].items():
        try:
            _ = space and LabelSpace.from_plain(space)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} has no label space as 'spaces/{task}' ({error!r}); a checkpoint has one or None; {advice}"
            ) from error
    return state


def _kind(value: Any) -> str:
    return type(value).__name__


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def run_folder(path: Path) -> Path:
    """The run directory of a checkpoint; where that was moved out of one, the folder it lies in."""
    folder = path.resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


@dataclass(frozen=True, slots=True)
class Opened:
    """A trained network, ready to predict."""

    net: MultiTaskNet
    run: Run
    step: int
    epoch: int
    path: Path
    """Of the checkpoint."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return run_folder(self.path)


def open_model(
    path: str | Path, device: str | torch.device = "cpu", overrides: Sequence[str] = (), split: str | None = None
) -> Opened:
    """The network of a checkpoint (or of a run folder) in evaluation mode, with averaged weights where there are any.

    overrides: `a.b=value`, over the run's own settings; a new data.root moves every path in the old one.
    split: of all validation data sets, in place of their own
    Raises ConfigError listing what does not fit.
    """
    path = find(path)
    return open_state(load(path), path, device, overrides, split)


def open_state(
    state: Mapping[str, Any],
    path: Path,
    device: str | torch.device = "cpu",
    overrides: Sequence[str] = (),
    split: str | None = None,
) -> Opened:
    """As `open_model`, from what `load` gives, or from as much of it as a network needs; path: for messages."""
    run = restore(state["run"], str(path), overrides, split)
    trained = tuple(state["run"]["data"]["size"])
    if run.data.size != trained:
        raise ValueError(
            f"data.size is {run.data.size}, but {path} was trained at {trained}, and its depth is relative to that; "
            f"another is not allowed; set data.eval_size=[{run.data.size[0]},{run.data.size[1]}] to evaluate so"
        )
    # the weights come from the file; fetching the pretrained ones first would be idle
    encoder = run.model.encoder.model_copy(update={"pretrained": False, "checkpoint": None})
    spaces = {name: plain and LabelSpace.from_plain(plain) for name, plain in state["spaces"].items()}
    net = build_model(run.model.model_copy(update={"encoder": encoder}), run.tasks, spaces, run.data.size)
    net.check_size(run.data.input_size, "data.eval_size")
    load_strictly(net, best_weights(state), path)
    net.to(device).eval()
    return Opened(net, run, state["step"], state["epoch"], path)


def results_file(folder: Path, step: int) -> Path:
    """Where a run directory keeps the results at a step; the file is written when the evaluation is finished."""
    return folder / "eval" / f"step-{step:07d}.json"


def find_resumed(folder: Path, which: str | None, dry_run: bool = False) -> Path | None:
    """The checkpoint to go on from, or None for a start from nothing. An existing run is never overwritten silently.

    which: None = a start from nothing; "auto" = the last checkpoint in `folder` if there is one; or a path.
    dry_run: nothing will be written, so that a run that lies there is in no danger.
    """
    last = folder / "checkpoints" / "last.pt"
    if which is None:
        if not dry_run and (folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{folder} already holds a run; one folder holds one run; continue it with --resume, "
                "choose another with --output DIR, or delete it"
            )
        return None
    if which == "auto":
        return last if last.exists() else None
    if "=" in which and not Path(which).exists():
        raise ValueError(
            f"--resume is given {which!r}, which is no file but looks like a setting; a path or nothing may follow "
            f"it; write settings before it ({which} --resume), or --resume=auto"
        )
    return Path(which)


def check_continues(saved: Mapping[str, Any], fresh: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on from a checkpoint under settings that its optimiser, balancer or loss scale do not fit.

    saved, fresh: as `Trainer.state_dict` gives them, from the file and from the run that resumes; of one network.
    """

    def shapes(balancer: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in balancer.items()}

    def groups(state: Mapping[str, Any]) -> str:
        return "+".join(str(len(group["params"])) for group in state["optimizer"]["param_groups"])

    check_classes(saved["spaces"], fresh["spaces"], path)
    was, now = saved["run"], fresh["run"]
    wrong = None
    if was["optim"]["name"] != now["optim"]["name"]:
        wrong = f"optim.name {was['optim']['name']}, this run has {now['optim']['name']}"
    elif shapes(saved["balancer"]) != shapes(fresh["balancer"]):
        wrong = f"balance.type {was['balance']['type']}, this run has {now['balance']['type']}, which has another state"
    elif set(saved.get("curriculum", {})) != set(fresh["curriculum"]):
        wrong = "another train.curriculum: one of the two runs measures which task is easiest"
    elif fresh["scaler"] and not saved["scaler"]:
        wrong = f"train.precision {was['train']['precision']}, this run has fp16, which needs a loss scale"
    elif bool(fresh["ema"]) > bool(saved["ema"]):
        wrong = f"no weight average, this run has optim.ema_decay {now['optim']['ema_decay']}"
    elif groups(saved) != groups(fresh):
        wrong = (
            f"parameter groups of {groups(saved)} tensors, this run has {groups(fresh)}; groups follow from "
            "optim.encoder_lr_factor, layer_decay, weight_decay and from what is frozen"
        )
    if wrong:
        raise ValueError(
            f"{path} was written with {wrong}; a resumed run needs what the checkpoint has; take the setting back, or "
            f"begin a new run with its weights (--init-from {path})"
        )


def check_classes(saved: Mapping[str, Any], fresh: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError where a task would take the weights of other classes, or of the same in another order.

    saved, fresh: label spaces as plain data by task, of the file and of the network that is to have its weights.
    """
    for task in saved.keys() & fresh.keys():
        before, now = (spaces[task]["classes"] if spaces[task] else [] for spaces in (saved, fresh))
        if list(before) != list(now):
            raise ValueError(
                f"{path} learnt task {task!r} with the classes {', '.join(before) or 'none'}, but this run has "
                f"{', '.join(now) or 'none'}; its weights belong to the same classes in the same order; use the data "
                "that it was trained on, or start without its weights"
            )


def steps_changed(saved: Mapping[str, Any], fresh: Mapping[str, Any]) -> str | None:
    """A note where a step of the resumed run has another number of images: epochs then begin at other steps.

    saved, fresh: as `Trainer.state_dict` gives them; older files do not tell the number of processes.
    """

    def images(state: Mapping[str, Any]) -> tuple[int, str]:
        train, world = state["run"]["train"], state.get("world", fresh["world"])
        parts = f"train.batch_size {train['batch_size']} x accumulate {train['accumulate']} x {world} process(es)"
        return train["batch_size"] * train["accumulate"] * world, parts

    (before, old), (now, new) = images(saved), images(fresh)
    if before == now:
        return None
    return (
        f"a step has {now} images ({new}) and had {before} ({old}): step {saved['step']} keeps its number, but "
        "epochs, the schedule and the order of the data count from there as if all steps had been of the new size"
    )


def best_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """The averaged weights of a checkpoint where the run kept an average, else the plain ones."""
    weights: dict[str, Any] = state["ema"]["module"] if state["ema"] else state["net"]
    return weights
