"""Weights that a new run starts from: of a checkpoint, as far as they fit, or of a bare encoder; what is taken is said.

A tensor is taken where its name and its shape are those of the network's, and what it belongs to is the same: the
encoder of that name, the pyramid of that type, the task of that name and type with a decoder and head of those types.
The rows of a class, in tensors whose size follows from the number of classes, are taken by the name of the class.
Nothing else is taken: no tensor is cut, padded or resized, but the first convolution for another number of channels,
which timm adapts as it adapts pretrained weights.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmtl.engine import checkpoint
from visionmtl.io.tensor_files import READING_FAILS, has_settings, read_archive
from visionmtl.modeling.weights import plain_name
from visionmtl.network import MultiTaskNet, build_model
from visionmtl.run import Run
from visionmtl.structures import MAX_CLASSES, LabelSpace

_SHOWN = 6
_MOST_NAMES = 12


def load_initial(net: MultiTaskNet, run: Run, path: Path) -> list[str]:
    """Load what fits into a network of the run; returns what was taken and what was not, a sentence each.

    path: a checkpoint, a run folder, or a file with an encoder's weights under timm's names (.pth or .safetensors).
    Raises ValueError where the file is neither, or nothing fits.
    """
    bare = _bare_encoder(path)
    if bare is not None:
        return _load_encoder(net, bare, path)
    path = checkpoint.find(path)
    saved = checkpoint.load(path)
    weights = checkpoint.best_weights(saved)
    own = net.state_dict()
    not_meant = _other_parts(net, run, saved["run"])
    rows, class_notes = _class_rows(net, run, saved, weights)
    taken: dict[str, Tensor] = {}
    for name, value in own.items():
        if (stored := weights.get(name)) is None or any(name.startswith(prefix) for prefix in not_meant):
            continue
        fitting = rows[name] if name in rows else _fitting(stored, value, net.in_chans)
        if fitting is not None:
            taken[name] = fitting
    left = [name for name in weights if name not in taken]
    return _finish(net, own, left, taken, path, [*not_meant.values(), *class_notes.values(), *_size_note(run, saved)])


def _finish(
    net: MultiTaskNet, own: Mapping[str, Tensor], left: Sequence[str], taken: Mapping[str, Tensor], path: Path,
    notes: Sequence[str],
) -> list[str]:  # fmt: skip
    count, total = (sum(values[name].numel() for name in values) for values in (taken, own))
    if count * 100 < total:  # a few biases of equal lengths fit any network
        raise ValueError(
            f"{path}: {f'{count} of {total} values fit' if taken else 'none of its tensors fits'} this network: "
            f"{'; '.join(notes) or 'names or shapes differ'}; not taken are {_by_part(left) if left else 'none'}; a "
            "checkpoint that shares encoder, pyramid or a task is needed; choose another, set `model` as its run has "
            "it, or leave out --init-from"
        )
    net.load_state_dict({**own, **taken})
    fresh = [name for name in own if name not in taken]
    lines = [f"{path}: {len(taken)} of {len(own)} tensors taken, {count / 1e6:.2f} of {total / 1e6:.2f} M values"]
    lines += notes
    if left:
        lines.append(f"not taken of the file: {_by_part(left)}")
    if fresh:
        lines.append(f"as built, not from the file: {_by_part(fresh)}")
    return lines


def _by_part(names: Sequence[str]) -> str:
    """All names where they are few; else counts by module, with the first of each."""
    if len(names) <= _MOST_NAMES:
        return f"{len(names)} tensors: {', '.join(names)}"
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(".".join(name.split(".")[:3]), name)
    parts = Counter(".".join(name.split(".")[:3]) for name in names)
    counts = (f"{part} {count}" if count > 1 else first[part] for part, count in parts.items())
    return f"{len(names)} tensors: {', '.join(counts)}"


def _other_parts(net: MultiTaskNet, run: Run, saved: Mapping[str, Any]) -> dict[str, str]:
    """Prefixes of tensors that mean something else in the file, whatever their shapes, with what differs."""
    other: dict[str, str] = {}
    before, now = saved["model"], run.model.model_dump(mode="json")
    if before["encoder"]["name"].split(".")[0] != now["encoder"]["name"].split(".")[0]:
        text = f"encoder not taken: {before['encoder']['name']} in the file, {now['encoder']['name']} here"
        encoders = net.encoders()
        other |= {f"{name}.": text for name, module in net.named_modules() if any(module is one for one in encoders)}
    if before["pyramid"]["type"] != now["pyramid"]["type"]:
        text = f"pyramid not taken: {before['pyramid']['type']} in the file, {now['pyramid']['type']} here"
        names = (name for name, _ in net.named_modules())
        other |= {f"{name}.": text for name in names if name.rpartition(".")[2] in ("pyramid", "pyramids")}
    elif levels := _other_levels(saved["tasks"], run):
        names = (name for name, _ in net.named_modules())
        other |= {f"{name}.": levels for name in names if name.rpartition(".")[2] == "pyramid"}
    for name, task in run.tasks.items():
        was, own = saved["tasks"].get(name), task.model_dump(mode="json")
        if was is None:
            continue
        for key in ("type", "decoder", "head"):
            a, b = (_type(settings.get(key)) for settings in (was, own))
            if a != b:
                other[f"decoders.{name}."] = f"task {name} not taken: its {key} is {a} in the file, {b} here"
        for key in task.settings_in_weights:
            if was.get(key) != own[key]:
                text = f"{key} is {was.get(key)} in the file, {own[key]} here, and its weights hold it"
                other[f"decoders.{name}."] = f"task {name} not taken: its {text}"
    return other


def _other_levels(saved: Mapping[str, Mapping[str, Any]], run: Run) -> str | None:
    """What differs where a common pyramid's layers, which are numbered from the finest level on, serve other levels."""
    parts = [part for task in saved.values() for part in (task, task.get("decoder"), task.get("head"))]
    known = [part for part in parts if isinstance(part, Mapping)]
    before = sorted({level for part in known for level in (*part.get("levels", ()), part.get("level"))} - {None})
    now = sorted({level for task in run.tasks.values() for level in task.levels})
    counted_from_finest = run.model.pyramid.type in ("fpn", "pafpn")
    if not before or before == now or (counted_from_finest and before[0] == now[0]):
        return None
    return f"pyramid not taken: its levels are {before} in the file, {now} here"


def _type(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else value


def _size_note(run: Run, saved: Mapping[str, Any]) -> list[str]:
    before = tuple(saved["run"]["data"]["size"])
    if before == run.data.size:
        return []
    (height, width), (old_height, old_width) = run.data.size, before
    return [f"data.size was {old_height}x{old_width}, and is {height}x{width}: depth is relative to it"]


def _class_rows(
    net: MultiTaskNet, run: Run, saved: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor | None], dict[str, str]]:
    """New values of tensors with a row a class (None: not taken), for tasks whose classes differ; a sentence a task.

    Which tensors these are, and along which axis, is seen on a second network with one class more.
    """
    rows: dict[str, Tensor | None] = {}
    notes: dict[str, str] = {}
    own = net.state_dict()
    for task, space in net.spaces.items():
        plain = saved["spaces"].get(task)
        before = list(plain["classes"]) if plain else []
        now = list(space.classes) if space else []
        if task not in saved["spaces"] or before == now or space is None:
            continue
        common = [name for name in now if name in before]
        step = 1 if len(now) < MAX_CLASSES else -1
        twin = _shapes(run, net, task, space, len(now) + step)
        for name, shape in twin.items():
            mine = own[name].shape
            axes = [axis for axis, (a, b) in enumerate(zip(mine, shape, strict=True)) if a != b]
            if not axes:
                continue
            (axis,) = axes if len(axes) == 1 else (-1,)
            stored = weights.get(name)
            expected = list(mine)
            expected[axis] = len(before)
            by_class = mine[axis] == len(now) and shape[axis] == len(now) + step
            rows[name] = None
            if common and stored is not None and by_class and list(stored.shape) == expected:
                to, of = ([names.index(label) for label in common] for names in (now, before))
                copied = stored.index_select(axis, torch.tensor(of)).to(own[name])
                rows[name] = own[name].clone().index_copy_(axis, torch.tensor(to), copied)
        new = [name for name in now if name not in before]
        gone = [name for name in before if name not in now]
        notes[task] = (
            f"classes of {task} by name: {len(common)} of {len(now)} have their rows from the file ({_some(common)}); "
            f"new: {_some(new)}; only in the file: {_some(gone)}"
        )
    return rows, notes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def _shapes(run: Run, net: MultiTaskNet, task: str, space: LabelSpace, num_classes: int) -> dict[str, torch.Size]:
    """Shapes of the same network where the classes of one task are so many."""
    colours = [space.colours[0]] * num_classes
    other = replace(space, classes=tuple(map(str, range(num_classes))), colours=tuple(colours), ids=())
    model = run.model.without_weights().model_copy(update={"freeze": ()})
    weighted = {"class_weights": None} if "class_weights" in type(run.tasks[task]).model_fields else {}
    tasks = {**run.tasks, task: run.tasks[task].model_copy(update=weighted)}
    with torch.random.fork_rng([]):  # in full: LoRA copies parts, which fake tensors cannot
        twin = build_model(model, tasks, {**net.spaces, task: other}, run.data.size)
    return {name: value.shape for name, value in twin.state_dict().items()}


def _fitting(stored: Tensor, value: Tensor, channels: int) -> Tensor | None:
    """The stored tensor where its shape is that of `value`; else the first convolution, adapted to `channels` by
    timm."""
    if stored.shape == value.shape:
        return stored
    of_rgb = channels != 3 and stored.ndim == value.ndim == 4 and (stored.shape[1], value.shape[1]) == (3, channels)
    if not of_rgb or (stored.shape[0], *stored.shape[2:]) != (value.shape[0], *value.shape[2:]):
        return None
    from timm.models import adapt_input_conv

    adapted: Tensor = adapt_input_conv(value.shape[1], stored)
    return adapted


# ---- a bare encoder ----


def _bare_encoder(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file that is no checkpoint of ours but a dict of tensors; None for everything else."""
    if not path.is_file():
        return None
    from timm.models import load_state_dict

    if path.suffix == ".safetensors":
        if has_settings(path):
            return None
    else:
        try:
            content, has_digest = read_archive(path)
        except READING_FAILS:
            return None  # what is wrong is said where checkpoints are read
        if has_digest or not isinstance(content, Mapping) or "format" in content:
            return None
    weights: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    is_bare = bool(weights) and all(isinstance(value, Tensor) for value in weights.values())
    return dict(weights) if is_bare else None


def _load_encoder(net: MultiTaskNet, weights: Mapping[str, Tensor], path: Path) -> list[str]:
    """Load the tensors of a bare encoder, under timm's names, into each encoder of the network."""
    own, taken, used = net.state_dict(), {}, set()
    source = {plain_name(name): name for name in weights}
    encoders = net.encoders()
    places = [name for name, module in net.named_modules() if any(module is one for one in encoders)]
    for place in places:
        for name, value in own.items():
            inside = name.startswith(f"{place}.")
            stored_name = source.get(plain_name(name.removeprefix(f"{place}."))) if inside else None
            if stored_name is None:
                continue
            stored = weights[stored_name]
            if (fitting := _fitting(stored, value, net.in_chans)) is not None:
                taken[name] = fitting
                used.add(stored_name)
    return _finish(net, own, [name for name in weights if name not in used], taken, path, [])
