"""Everything needed to continue a run or to use its network: plain data, written atomically."""

import math
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from visionmtl.config.paths import check_new
from visionmtl.engine.logging import row_place
from visionmtl.engine.nonfinite import NotFinite
from visionmtl.io.atomic import atomic_write, link, remove_unfinished
from visionmtl.io.download import local_file
from visionmtl.io.tensor_files import (
    READING_FAILS,
    named_tensors,
    read_archive,
    read_safetensors,
    write_archive,
    write_safetensors,
)
from visionmtl.modeling.weights import load_strictly
from visionmtl.network import MultiTaskNet, build_model
from visionmtl.run import Run, restore
from visionmtl.structures import LabelSpace
from visionmtl.tasks.base import Task

FORMAT = 2
"""Of what is written. 1: without a digest."""
SAFETENSORS = ".safetensors"
PACKAGED = Path(__file__).resolve().parents[1] / "weights"
"""Trained networks that come with the package, NAME.safetensors each, with a card NAME.md."""

_NETWORK_PARTS: dict[str, tuple[type, ...]] = {
    "step": (int,), "epoch": (int,),
    "run": (dict,), "run/model": (dict,), "run/tasks": (dict,), "run/data": (dict,), "run/data/size": (list, tuple),
    "run/balance": (dict,), "run/optim": (dict,), "run/train": (dict,), "spaces": (dict,), "net": (dict,),
}  # fmt: skip
"""What every file of a network holds, by path."""
_PARTS: dict[str, tuple[type, ...]] = _NETWORK_PARTS | {
    "best": (int, float), "ema": (dict, NoneType), "balancer": (dict,), "scaler": (dict,), "optimizer": (dict,),
    "optimizer/state": (dict,), "optimizer/param_groups": (list,),
}  # fmt: skip
"""What every checkpoint holds. Newer ones also have "world", the number of processes that trained it."""
_SHOWN = 5


class Damaged(ValueError):
    """A checkpoint cannot be read, is not what was written, or holds numbers that are not finite."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain data so that a crash leaves the old file or the new one, never half of either.

    The file before is kept as `<name>.previous`.
    Raises NotFinite where weights or moments are not finite, DiskFull where there is no room.
    """
    if num_bad := _not_finite(state):
        raise NotFinite(
            f"{path} is not written, because at step {state['step']} {_listing(num_bad)}; a checkpoint holds finite "
            f"numbers only, so that {_what_is_kept(path)}; go on from it with --resume and a lower optim.lr, or set "
            "optim.clip_norm"
        )
    write_archive(path, {**state, "format": FORMAT}, previous=path.with_name(path.name + ".previous"))


def check_output(path: Path) -> None:
    """Raises ValueError where `save_for_prediction` would write over a file, or under a name that no reader knows."""
    if path.suffix != ".pt":
        raise ValueError(
            f"{path} ends with {path.suffix!r}, and a checkpoint is written; .pt is allowed; rename it, and make other "
            "files of it by visionmtl export"
        )
    check_new(path)


def save_for_prediction(path: Path, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint that predicts with other weights, as `state` otherwise; no run can go on from it."""
    without: dict[str, Any] = {
        "ema": None,
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
        "balancer": {},
    }
    of_all = {key: value for key, value in state.items() if key != "format"}
    # a .safetensors file says nothing about what was best so far
    save(path, {"best": -math.inf} | of_all | {"net": dict(weights)} | without)


def save_step(folder: Path, state: Mapping[str, Any], keep: int) -> None:
    """checkpoints/last.pt of a run directory, and step-N.pt for the newest `keep` steps."""
    path = folder / "checkpoints" / "last.pt"
    save(path, state)
    if keep:
        link(path, path.with_name(f"step-{state['step']:07d}.pt"))
        # by time, not by name: after going back to an earlier step, later ones lie there that are older
        for old in _steps(path.parent)[keep:]:
            old.unlink()


def save_weights(
    path: Path, opened: "Opened", run: Mapping[str, Any] | None = None, half: bool = False
) -> dict[str, Any]:
    """Write a network as one .safetensors file: weights, settings and classes, and nothing that training needs.

    run: in place of its own settings, as plain data; half: weights as float16, in half the bytes; read, they are
    float32 again. Returns the plain data in the file.
    """
    spaces = {name: space and space.plain() for name, space in opened.net.spaces.items()}
    settings = {
        "visionmtl_format": FORMAT, "step": opened.step, "epoch": opened.epoch, "spaces": spaces,
        "run": run or opened.run.model_dump(mode="json"),
    }  # fmt: skip
    weights = opened.net.state_dict()
    if half:
        weights = {name: t.half() if t.is_floating_point() else t for name, t in weights.items()}
        if num_bad := _not_finite({"net": weights}):
            raise ValueError(
                f"{opened.path} holds numbers beyond float16, which ends at 65504: {_listing(num_bad)}; half the bytes "
                "are for weights within it; write it as float32"
            )
    write_safetensors(path, weights, settings)
    return settings


@torch.no_grad()
def _not_finite(state: Mapping[str, Any]) -> dict[str, int]:
    """How many numbers are not finite, by the name of the tensor in weights, their average and moments.

    All are looked at on their device, with one wait for it.
    """
    parts = {part: state[part] for part in ("net", "ema", "optimizer") if part in state}
    tensors = {name: t.detach() for name, t in named_tensors(parts) if t.is_floating_point() and t.numel()}
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors.values():
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    flags: dict[torch.device, list[Tensor]] = {}
    for (device, _), of_group in groups.items():
        flags.setdefault(device, []).append(torch.stack(torch._foreach_norm(of_group)).isfinite().all())
    if all(bool(torch.stack(of_device).all()) for of_device in flags.values()):
        return {}
    # squares of large numbers may be infinite where they are not
    counts = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
    return {name: count for name, count in counts.items() if count}


def _listing(num_bad: Mapping[str, int]) -> str:
    named = ", ".join(f"{name} ({count:,})" for name, count in list(num_bad.items())[:_SHOWN])
    more = f" and {len(num_bad) - _SHOWN} more tensors" if len(num_bad) > _SHOWN else ""
    return f"{sum(num_bad.values()):,} numbers are not finite, in {named}{more}"


def _what_is_kept(path: Path) -> str:
    if not path.is_file():
        return f"there is no {path.name} yet"
    try:
        return f"{path} still is that of step {load(path)['step']}"
    except ValueError as error:
        return f"{path} is as it was ({error})"


def find(path: str | Path) -> Path:
    """The checkpoint at `path`; of a run folder its best, else its last. Raises ValueError where there is none.

    A URL with a checksum is one, too: https://HOST/best.pt#sha256=HEX, see `io.download`; and so is the name of a
    network that comes with the package, where no file of that name lies there.
    """
    path = local_file(path)
    if not path.exists() and (network := PACKAGED / f"{path}{SAFETENSORS}").is_file() and path.name == str(path):
        return network
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
            + (f"nearby are: {', '.join(near)}" if near else f"train first, or correct the path{_packaged()}")
        )
    return path


def _packaged() -> str:
    names = sorted(file.stem for file in PACKAGED.glob(f"*{SAFETENSORS}"))
    return f"; with the package comes {', '.join(names)}" if names else ""


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it, or a .safetensors file of `save_weights`, which has less in it.

    Raises ValueError where it is not one of ours; Damaged, which is one, where it is not what was written.
    """
    path = find(path)
    if path.suffix in (".yaml", ".yml", ".json"):
        raise ValueError(
            f"{path} is a {path.suffix} file, not a checkpoint; a .pt file or a run folder is needed; give "
            "runs/NAME/checkpoints/best.pt, or train first: visionmtl train CONFIG"
        )
    advice = _advice(path)
    state = _read_weights(path, advice) if path.suffix == SAFETENSORS else _read_archive(path, advice)
    if num_bad := _not_finite(state):
        raise Damaged(f"{path} is of no use: {_listing(num_bad)}; finite numbers are needed; {advice}")
    return state


def _read_archive(path: Path, advice: str) -> dict[str, Any]:
    try:  # a zip archive has its table of contents at the end: a file that was cut short has none
        whole = zipfile.is_zipfile(path)
        state, has_digest = read_archive(path) if whole else (None, False)
    except PermissionError:
        raise
    except READING_FAILS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise Damaged(
            f"{path} is damaged or no checkpoint of visionmtl ({reason}); tensors and plain data are all that is "
            f"read; {advice}"
        ) from error
    if not whole:
        raise Damaged(
            f"{path} ({path.stat().st_size:,} bytes) is no checkpoint, or was cut short; a checkpoint is the zip "
            f"archive that torch.save writes; {advice}"
        )
    if not isinstance(state, dict) or "format" not in state:
        kind = f"a dict with {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else f"a {_kind(state)}"
        raise Damaged(
            f"{path} holds {kind}, and no checkpoint format; a checkpoint of visionmtl has one; {advice}. Weights of "
            "an encoder alone go to model.encoder.checkpoint"
        )
    version = state["format"]
    if version not in (*_MIGRATIONS, FORMAT):
        raise ValueError(
            f"{path} has checkpoint format {version!r}; this version reads "
            f"{' and '.join(map(str, (*_MIGRATIONS, FORMAT)))}; use a checkpoint that visionmtl wrote, or the version "
            "that wrote it"
        )
    if version != 1 and not has_digest:
        raise Damaged(f"{path} has lost the digest at its end; files of format {version} have one; {advice}")
    while state["format"] in _MIGRATIONS:
        state = _MIGRATIONS[state["format"]](state)
    return _check_parts(state, _PARTS, path, advice)


def _migrate_1(state: dict[str, Any]) -> dict[str, Any]:
    """From before the digest; the first of them have no curriculum either."""
    return {"curriculum": {}, **state, "format": 2}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _migrate_1}
"""From each earlier format to the next."""


def _read_weights(path: Path, advice: str) -> dict[str, Any]:
    try:
        tensors, settings = read_safetensors(path)
    except ValueError as error:
        raise Damaged(
            f"{path} is damaged or no network of visionmtl ({error}); a file that visionmtl export or publish "
            f"wrote is needed; {advice}"
        ) from error
    version = settings.get("visionmtl_format") if isinstance(settings, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"{path} has visionmtl_format {version!r}; this version reads {FORMAT}; use a network that visionmtl wrote"
        )
    return _check_parts({**settings, "net": tensors, "ema": None}, _NETWORK_PARTS, path, advice)


def _advice(path: Path) -> str:
    """What to do where a file is of no use: the other checkpoints beside it, the one before it first."""
    names = [f"{path.name}.previous", "last.pt", "last.pt.previous", "best.pt", "best.pt.previous"]
    files = dict.fromkeys([*(path.with_name(name) for name in names), *_steps(path.parent)])
    others = [file for file in files if file != path and file.is_file()]
    if not others:
        return "use one that visionmtl wrote, or train first"
    more = ", ".join(file.name for file in others[1:])
    return f"use {others[0]} beside it" + (f", or {more}" if more else "")


def _steps(folder: Path) -> list[Path]:
    """The checkpoints by step in a folder, the one written last first."""
    return sorted(folder.glob("step-*.pt"), key=lambda file: file.stat().st_mtime_ns, reverse=True)


def _check_parts(
    state: dict[str, Any], parts: Mapping[str, tuple[type, ...]], path: Path, advice: str
) -> dict[str, Any]:
    for place, kinds in parts.items():
        above, _, part = place.rpartition("/")
        holder = state
        for key in filter(None, above.split("/")):
            holder = holder[key]
        if part not in holder or not isinstance(holder[part], kinds):
            found = f"a {_kind(holder[part])} as {place!r}" if part in holder else f"no {place!r}"
            allowed = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            raise Damaged(f"{path} has {found}; a checkpoint has a {allowed} there; {advice}")
    weights = {"net": state["net"], "balancer": state.get("balancer", {})}
    if state["ema"] is not None:
        weights["ema/module"] = state["ema"].get("module")
    for place, tensors in weights.items():
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise Damaged(f"{path} has other things than tensors by name in {place!r}; weights are such; {advice}")
    check_spaces(state["spaces"], path, advice)
    return state


def check_spaces(spaces: Mapping[str, Any], path: Path, advice: str) -> None:
    """Raise Damaged where a task has neither a label space, as plain data, nor None."""
    for task, space in spaces.items():
        try:
            _ = space and LabelSpace.from_plain(space)
        except (LookupError, TypeError, ValueError) as error:
            raise Damaged(
                f"{path} has no label space as 'spaces/{task}' ({error!r}); a checkpoint has one or None; {advice}"
            ) from error


def _kind(value: Any) -> str:
    return type(value).__name__


def run_folder(path: Path) -> Path:
    """The run directory of a checkpoint; where that was moved out of one, the folder it lies in.

    Of a network of the package it is runs/NAME, for nothing is written into the package.
    """
    folder = path.resolve().parent
    if folder == PACKAGED:
        return Path("runs") / path.stem
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

    @property
    def name(self) -> str:
        """By which `find` finds it: that of a network of the package, else the file's path."""
        return self.path.stem if self.card else str(self.path)

    @property
    def card(self) -> Path | None:
        """The file that tells of a network of the package; None of any other network."""
        return self.path.with_suffix(".md") if self.path.resolve().parent == PACKAGED else None


def open_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    overrides: Sequence[str] = (),
    split: str | None = None,
    reads_data: bool = True,
) -> Opened:
    """The network of a checkpoint (or of a run folder) in evaluation mode, with averaged weights where there are any.

    overrides: `a.b=value`, over the run's own settings; a new data.root moves every path in the old one.
    split: of all validation data sets, in place of their own
    reads_data: whether the run's data sets are read after this; else no override may be about them
    Raises ConfigError listing what does not fit.
    """
    path = find(path)
    return open_state(load(path), path, device, overrides, split, reads_data)


def open_state(
    state: Mapping[str, Any],
    path: Path,
    device: str | torch.device = "cpu",
    overrides: Sequence[str] = (),
    split: str | None = None,
    reads_data: bool = True,
) -> Opened:
    """As `open_model`, from what `load` gives, or from as much of it as a network needs; path: for messages."""
    run = restore(state["run"], str(path), overrides, split)
    _check_overrides(overrides, run, path)
    if not reads_data:
        _check_no_data(overrides, path)
    trained = tuple(state["run"]["data"]["size"])
    if run.data.size != trained:
        raise ValueError(
            f"data.size is {run.data.size}, but {path} was trained at {trained}, and its depth is relative to that; "
            f"another is not allowed; set data.eval_size=[{run.data.size[0]},{run.data.size[1]}] to evaluate so"
        )
    spaces = {name: plain and LabelSpace.from_plain(plain) for name, plain in state["spaces"].items()}
    net = build_model(run.model.without_weights(), run.tasks, spaces, run.data.size)
    net.check_size(run.data.input_size, "data.eval_size")
    load_strictly(net, best_weights(state), path)
    net.to(device).eval()
    return Opened(net, run, state["step"], state["epoch"], path)


_TRAINING_ALONE = ("balance", "data.augment", "distill", "extend", "model", "optim", "output", "seed", "train")
_BEYOND_TRAINING = ("train.batch_size", "train.precision")


def _check_overrides(overrides: Sequence[str], run: Run, path: Path) -> None:
    """Raise ValueError for a setting that a trained network no longer heeds, or that its weights are bound to."""
    for text in overrides:
        place = text.partition("=")[0].strip()
        parts = place.split(".")
        if parts[0] == "tasks" and len(parts) > 2 and parts[1] in run.tasks:
            counting = run.tasks[parts[1]].counting_when_trained
            counting = None if counting is None else tuple(f"tasks.{parts[1]}.{name}" for name in counting)
        elif any(f"{place}.".startswith(f"{one}.") for one in _TRAINING_ALONE):
            counting = _BEYOND_TRAINING
        else:
            continue
        if counting is not None and ".".join(parts[:3]) not in counting:
            raise ValueError(
                f"{place} would have no effect, or a wrong one: {path} is trained, and its weights go with its own "
                f"settings; of these, {', '.join(counting)} can be changed; leave it out"
            )


_BESIDE_DATA = ("data.eval_size", "data.size")  # the second has an error of its own


def _check_no_data(overrides: Sequence[str], path: Path) -> None:
    """Raise ValueError for a setting of the run's data sets, which are not read."""
    for text in overrides:
        place = text.removeprefix("~").partition("=")[0].strip()
        if place.partition(".")[0] == "data" and place not in _BESIDE_DATA:
            raise ValueError(
                f"{place} would have no effect: the data sets of {path} are not read here; of data, data.eval_size "
                "alone can be changed; leave it out"
            )


def results_file(folder: Path, step: int) -> Path:
    """Where a run directory keeps the results at a step; the file is written when the evaluation is finished."""
    return folder / "eval" / f"step-{step:07d}.json"


def find_resumed(folder: Path, which: str | Path | None, dry_run: bool = False) -> Path | None:
    """The checkpoint to go on from, or None for a start from nothing. An existing run is never overwritten silently.

    which: None = a start from nothing; "auto" = the last checkpoint in `folder` if there is any; or a path, of a run's
    folder its last checkpoint.
    dry_run: nothing will be written, so that a run that lies there is in no danger.
    """
    last = folder / "checkpoints" / "last.pt"
    rows = folder / "metrics.jsonl"  # without rows and checkpoints, a start was left before its first step
    if which is None:
        if not dry_run and ((rows.exists() and rows.stat().st_size) or any((folder / "checkpoints").glob("*.pt*"))):
            raise ValueError(
                f"{folder} already holds a run; one folder holds one run; continue it with --resume, "
                "choose another with --output DIR, or delete it"
            )
    elif which != "auto":
        return Path(which) / "checkpoints" / "last.pt" if Path(which).is_dir() else Path(which)
    elif any(file.exists() for file in _last_first(last)):
        return last
    foreign = [name for name in ("config.yaml", "env.json", "train.log") if (folder / name).exists()]
    if foreign and not rows.exists() and not dry_run:
        raise ValueError(
            f"{folder / foreign[0]} is of no run, and a run would write over it; a folder without {', '.join(foreign)} "
            "is needed; choose another with --output DIR, or move the file away"
        )
    return None


@dataclass(frozen=True, slots=True)
class Resumed:
    """The checkpoint that a run goes on from."""

    path: Path
    state: Mapping[str, Any]
    warning: str | None = None
    """What was wrong with the last one, and what is lost."""
    damaged: Path | None = None
    """The last one, where it is of no use."""


def load_resumed(path: Path, fall_back: bool) -> Resumed:
    """Read the checkpoint that a run goes on from.

    fall_back: path is the last one of a run; where that is damaged or missing, the newest before it that is whole is
        taken, with a warning.
    Raises ValueError; where falling back finds nothing, it names all that were tried.
    """
    if not fall_back:
        return Resumed(path, _with_training(load(path), path))
    failures: list[str] = []
    for file in _last_first(path):
        if not file.is_file():
            if file == path:
                failures.append(f"{file} is missing")
            continue
        try:
            state = _with_training(load(file), file)
        except Damaged as error:
            failures.append(str(error).partition("; use ")[0])
            continue
        warning = None
        if failures:
            reached = _last_logged_step(run_folder(path))
            lost = f"steps {state['step'] + 1} to {reached}" if reached > state["step"] else "the steps after it"
            warning = (
                f"{'. '.join(failures)}. THE RUN GOES ON FROM {file}, which is whole, at step {state['step']}; {lost} "
                "are trained again, and what was logged of them is dropped"
            )
        return Resumed(file, state, warning, path if failures and path.exists() else None)
    raise ValueError(
        f"no checkpoint in {path.parent} can be read: {'. '.join(failures)}. A whole one is needed to go on; copy one "
        "there from elsewhere, go on from another file with --resume PATH, or begin anew with --output DIR"
    )


def _last_first(last: Path) -> list[Path]:
    return [last, last.with_name(f"{last.name}.previous"), *_steps(last.parent)]


def _with_training(state: dict[str, Any], path: Path) -> dict[str, Any]:
    if "optimizer" not in state:
        raise ValueError(
            f"{path} holds a network and no state of a training; a run goes on from a .pt file; begin a new run with "
            f"its weights (--init-from {path})"
        )
    return state


def _last_logged_step(folder: Path) -> int:
    """The last step in metrics.jsonl, 0 where there is none."""
    file = folder / "metrics.jsonl"
    rows = file.read_bytes().split(b"\n") if file.is_file() else []
    places = (row_place(row, file) for row in reversed(rows))
    return next((step for step, _ in filter(None, places)), 0)  # some may be damaged, the last one cut off by a crash


def carry_best(path: Path, target: Path, step: int, is_best: bool, write: bool) -> bool:
    """For a run that goes on in another folder from the checkpoint `path` of `step`: take its best one along.

    is_best: whether `path` itself was evaluated as the best; write: whether this process copies
    Returns whether there is one, no later than the checkpoint.
    """
    best = path.with_name("best.pt")
    if not (best.is_file() and load(best)["step"] <= step):
        if not is_best:
            return False
        best = path
    if write and not target.exists():
        with best.open("rb") as source, atomic_write(target, num_bytes=best.stat().st_size) as file:
            shutil.copyfileobj(source, file)
    return True


def clean_run(folder: Path, resumed: Resumed) -> list[str]:
    """Before the first file is written: remove what killed processes and later steps left in a run directory.

    A damaged last.pt gets another name, or the next checkpoint would make it the previous one in place of a whole one.
    Returns a sentence for each thing that a user may look for.
    """
    notes = []
    for inside in (folder, folder / "checkpoints", folder / "eval"):
        remove_unfinished(inside)
    if resumed.damaged:
        aside = resumed.damaged.with_name(f"{resumed.damaged.name}.damaged")
        os.replace(resumed.damaged, aside)
        notes.append(f"{resumed.damaged} is called {aside.name} now")
    for file in (folder / "eval").glob("step-*.json"):  # where one lies, its evaluation counts as done
        if (number := file.stem.removeprefix("step-")).isdigit() and int(number) > resumed.state["step"]:
            notes.append(f"{file} is removed; its step is later than that of the checkpoint, and comes again")
            file.unlink()
    return notes


def check_continues(saved: Mapping[str, Any], fresh: Mapping[str, Any], tasks: Mapping[str, Task], path: Path) -> None:
    """Refuse to go on from a checkpoint under settings that its weights, optimiser, balancer or loss scale do not fit.

    saved, fresh: as `Trainer.state_dict` gives them, from the file and from the run that resumes; of one network, which
    has these tasks.
    """

    def shapes(balancer: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        # older checkpoints have no `latest`, which is then as in a new run
        return {name: value.shape for name, value in balancer.items() if name != "latest"}

    def groups(state: Mapping[str, Any]) -> str:
        return "+".join(str(len(group["params"])) for group in state["optimizer"]["param_groups"])

    check_classes(saved["spaces"], fresh["spaces"], path)
    was, now = saved["run"], fresh["run"]
    wrong = None
    held = [(name, key) for name, task in tasks.items() for key in task.settings_in_weights]
    other = [(name, key) for name, key in held if was["tasks"][name].get(key) != now["tasks"][name][key]]
    if other:
        name, key = other[0]
        wrong = f"tasks.{name}.{key} {was['tasks'][name].get(key)}, this run has {now['tasks'][name][key]}"
    elif was["optim"]["name"] != now["optim"]["name"]:
        wrong = f"optim.name {was['optim']['name']}, this run has {now['optim']['name']}"
    elif shapes(saved["balancer"]) != shapes(fresh["balancer"]) or (
        was["balance"]["type"] != now["balance"]["type"] and (saved["balancer"] or fresh["balancer"])
    ):  # where shapes are alike, the numbers of one method would still mean something else to the other
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


def best_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """The averaged weights of a checkpoint where the run kept an average, else the plain ones."""
    weights: dict[str, Any] = state["ema"]["module"] if state["ema"] else state["net"]
    return weights
