"""Where a training is in its data, counted in images, so that it can go on in steps of another size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two steps."""

    epoch: int
    images: int
    """Of this epoch, over all processes, that are behind the place."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a run goes on from a position in steps that may have another size than those before it.

    The epoch is finished with the steps that its remaining images allow. From there on all epochs have equally many.
    """

    offset: int = 0
    """Steps done, less those that the run would have done if all had had the present size."""
    epoch: int = 0
    """The one that is finished."""
    shift: int = 0
    """Images by which its batches lie later in its order, see `BatchSampler.set_epoch`."""


def go_on(position: Position, step: int, steps_per_epoch: int, images_per_step: int, epoch_images: int) -> Continuation:
    """step: optimiser steps done; the others are of the steps from here on; epoch_images: that an epoch draws."""
    steps_left = max(0, epoch_images - position.images) // images_per_step
    as_if_done = (position.epoch + 1) * steps_per_epoch - steps_left
    shift = position.images - (steps_per_epoch - steps_left) * images_per_step if steps_left else 0
    return Continuation(step - as_if_done, position.epoch, shift)


def step_size(train: Mapping[str, Any], world: int) -> tuple[int, str]:
    """Images of an optimiser step, and of what they are the product; train: `Run.train` as plain data."""
    parts = f"train.batch_size {train['batch_size']} x accumulate {train['accumulate']} x {world} process(es)"
    return train["batch_size"] * train["accumulate"] * world, parts


def changed_settings(saved: Mapping[str, Any], fresh: Mapping[str, Any]) -> list[str]:
    """A line for each setting of a run (as plain data) that a resumed run has otherwise, but for its folder."""
    before, now = _flat(saved), _flat(fresh)
    names = [name for name in {**before, **now} if name.partition(".")[0] != "output"]
    return [
        f"{name} is {now.get(name, 'not set')}, and was {before[name]}"
        for name in names
        if name in before and (name not in now or before[name] != now[name])
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """The values of nested settings by dotted path; a list without settings in it is one value."""
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
        items = dict(enumerate(value)).items()
    else:
        return {path: list(value) if isinstance(value, tuple) else value}
    return {k: v for key, inner in items for k, v in _flat(inner, f"{path}.{key}" if path else str(key)).items()}


def what_changed(saved: Mapping[str, Any], fresh: Mapping[str, Any]) -> str | None:
    """A note where steps are made otherwise than those of the checkpoint; None: bit for bit as if nothing had happened.

    saved, fresh: as `Trainer.state_dict` gives them; older files tell neither the number of processes nor the images.
    """
    before, old = step_size(saved["run"]["train"], saved.get("world", fresh["world"]))
    now, new = step_size(fresh["run"]["train"], fresh["world"])
    if old == new:
        return None
    place = (
        f"the run goes on in epoch {saved['epoch']} behind the {saved['epoch_images']} images of it that were seen, "
        "and at the same place of the schedule"
        if "epoch_images" in saved
        else "the file does not tell how many images of its epoch were seen, so that epochs and the schedule count "
        f"from step {saved['step']} as if all steps had had the new size"
    )
    lr = "" if before == now else "; optim.lr stays, though a step has another size"
    return (
        f"a step has {now} images ({new}) and had {before} ({old}): {place}. From here on it is not bit for bit the "
        f"run it was: batches, BatchNorm's statistics, random layers and the order of sums differ{lr}"
    )
