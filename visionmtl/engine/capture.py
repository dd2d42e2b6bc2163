"""The first step that is not finite, written to a file before the run ends, for `engine.replay` to look at."""

import copy
import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from visionmtl.engine.nonfinite import NotFinite, largest_weight
from visionmtl.io.tensor_files import write_archive
from visionmtl.ops.ranks import Counts
from visionmtl.run import Run
from visionmtl.structures import Batch

Trainer = Any
"""A `trainer.Trainer`; that module imports this one."""

FORMAT = 1
KIND = "captured step"


def state_before(trainer: Trainer) -> dict[str, Any]:
    """A copy, on the device, of all that a step changes."""
    state = {
        "net": trainer.net.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "balancer": trainer.balancer.state_dict(),
        "curriculum": trainer.schedule.state_dict() if trainer.schedule else {},
        "scaler": trainer.scaler.state_dict(),
    }
    copied: dict[str, Any] = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, state)
    return copied


def check_step(
    trainer: Trainer, before: Mapping[str, Any], batches: Sequence[Batch], totals: Counts, output: Any
) -> None:
    """Write the step that was just done where it was not finite, and raise NotFinite. Waits for the device.

    before: see `state_before`; batches, totals: what the step computed on, and what its losses were divided by;
    output: what `train_step` returns
    """
    tally = trainer.finite.read()
    counted = tally.for_loss if trainer.finite.fp16 else tally.skipped  # a scale too large is no fault
    spoilt = not math.isfinite(float(largest_weight(trainer.net.parameters())))
    if not counted and not spoilt:
        return
    step = trainer.state.step
    name = f"step-{step:07d}" + (f"-process-{trainer.ranks.rank}" if trainer.ranks.world > 1 else "")
    file = trainer.run.folder / "captured" / f"{name}.pt"
    losses = {task: {part: float(value) for part, value in of.items()} for task, of in output.losses.items()}
    content = {
        "format": FORMAT, "kind": KIND, "step": step - 1, "steps_per_epoch": trainer.steps_per_epoch,
        "offset": trainer.continuation.offset,
        "rank": trainer.ranks.rank, "world": trainer.ranks.world, "device": trainer.ranks.device.type,
        "settings": _without_paths(trainer.run),
        "spaces": {task: space and space.plain() for task, space in trainer.net.spaces.items()},
        "batches": [_plain(batch) for batch in batches], "images": _images(trainer), "totals": totals,
        "losses": losses, "grad_norm": float(output.grad_norm), **before,
    }  # fmt: skip
    write_archive(file, tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, content))
    what = ", ".join(tally.first_losses) or ("the gradient" if counted else "weights after the update")
    raise NotFinite(
        f"step {step} is not finite: {what}; the run goes on only with finite values; its batch and the state before "
        f"it are in {file} (images as they were trained on: mind who gets it); see where it begins with: visionmtl "
        f"replay {file}"
    )


def _without_paths(run: Run) -> dict[str, Any]:
    """The settings that decide what a step computes; where files lie is not among them."""
    plain = run.model_dump(mode="json")
    kept = {name: plain[name] for name in ("seed", "model", "tasks", "balance", "optim", "train")}
    kept["model"]["encoder"].update(pretrained=False, checkpoint=None)
    kept["data"] = {"size": plain["data"]["size"], "eval_size": plain["data"]["eval_size"]}
    return kept


def _plain(batch: Batch) -> dict[str, Any]:
    fields = ("image", "targets", "labelled", "counts", "color")
    return {name: getattr(batch, name) for name in fields}


def _images(trainer: Trainer) -> list[list[str]]:
    """By micro-batch: data set and number of each image; none where the trainer has no data."""
    if trainer.data is None or not trainer.steps_per_epoch:
        return []
    epoch, done = divmod(trainer.steps_of_this_size - 1, trainer.steps_per_epoch)
    accumulate = trainer.run.train.accumulate
    sampler: Any = copy.copy(trainer.data.train_loader.batch_sampler)
    sampler.set_epoch(epoch, done * accumulate, trainer.shift(epoch))
    datasets = trainer.data.train_datasets
    ends = list(itertools.accumulate(len(dataset) for dataset in datasets))

    def name(index: int) -> str:
        number = bisect_right(ends, index)
        return f"{datasets[number].name} {index - (ends[number] - len(datasets[number]))}"

    return [[name(key.index) for key in keys] for keys in itertools.islice(sampler, accumulate)]
