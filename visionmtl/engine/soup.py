"""Model soups: one network whose weights are the mean of several (Wortsman et al. 2022, arXiv:2203.05482, uniform)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmtl.engine.checkpoint import best_weights, check_classes, check_output, find, load, save_for_prediction
from visionmtl.modeling.weights import key_differences


def make_soup(checkpoints: Sequence[str | Path], output: Path) -> list[Path]:
    """Write a checkpoint with the mean of the weights of two or more, which begin alike or come from one run.

    Of each file the averaged weights (EMA) where it has them. Running statistics of BatchNorm are averaged like
    weights, not measured anew. Settings are those of the first; the file is for predictions, not for going on.
    Returns the files averaged. Raises ValueError where the networks differ.
    """
    check_output(output)
    paths = [find(path) for path in checkpoints]
    if len({path.resolve() for path in paths}) < max(len(paths), 2):
        raise ValueError(
            f"the checkpoints are {', '.join(map(str, paths)) or 'none'}; a soup needs two or more, each once; name "
            "others, or runs by their folders"
        )
    first = load(paths[0])
    total: dict[str, Tensor] = {}
    for path in paths:
        state = load(path)
        _check_alike(first, state, paths[0], path)
        for name, value in best_weights(state).items():
            # what is counted, as num_batches_tracked, stays that of the first
            if value.is_floating_point():
                total[name] = total[name] + value.double() if name in total else value.double()
            else:
                total.setdefault(name, value)
    own = best_weights(first)
    mean = {name: _mean(total[name], len(paths), own[name]) for name in own}
    save_for_prediction(output, first, mean)
    return paths


def _mean(total: Tensor, count: int, like: Tensor) -> Tensor:
    # float32 at least: half of it is for files, and a network computes in float32
    return (total / count).to(torch.promote_types(like.dtype, torch.float32)) if like.is_floating_point() else total


def _check_alike(first: Mapping[str, Any], other: Mapping[str, Any], path: Path, other_path: Path) -> None:
    check_classes(first["spaces"], other["spaces"], other_path)
    settings = [_architecture(state["run"]) for state in (first, other)]
    unlike = [name for name in settings[0] if settings[0][name] != settings[1][name]]
    keys = key_differences(best_weights(first), best_weights(other))
    if unlike or keys:
        what = ", ".join(f"{name} {settings[1][name]} for {settings[0][name]}" for name in unlike) or keys
        raise ValueError(
            f"{other_path} is another network than {path}: {what}; a soup is made of networks of one architecture; "
            "leave it out"
        )


_MEANING = ("type", "min_depth_m", "max_depth_m", "num_bins", "head.levels", "decoder.levels", "many")
"""Settings of tasks that say what equal weights mean; a task has those of its type."""


def _setting(task: Mapping[str, Any], path: str) -> Any:
    value: Any = task
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _architecture(run: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs must have in common beside the shapes of their weights."""
    encoder, sharing = run["model"].get("encoder", {}), run["model"].get("sharing", {})
    return {
        "model.encoder": [encoder.get(name) for name in ("name", "options", "mean", "std")],
        "model.sharing": [sharing.get(name) for name in ("type", "alpha")],  # LoRA's matrices are times alpha
        "data.size": list(run["data"]["size"]),
        "tasks": {name: [_setting(task, of) for of in _MEANING] for name, task in run["tasks"].items()},
    }
