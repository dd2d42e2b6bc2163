"""Where a training is in its data, counted in images, so that it can go on in steps of another size."""

import re
from collections.abc import Iterator, Mapping
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
    """Optimiser steps done, minus as many steps of the present size as bring the run to the same place."""
    epoch: int = 0
    """The one that was interrupted, and is finished now."""
    shift: int = 0
    """Images by which its remaining batches start later in its order, see `BatchSampler.set_epoch`."""


def go_on(position: Position, step: int, steps_per_epoch: int, images_per_step: int, epoch_images: int) -> Continuation:
    """step: optimiser steps done; the others are of the steps from here on; epoch_images: that an epoch draws."""
    steps_left = max(0, epoch_images - position.images) // images_per_step
    equivalent_steps = (position.epoch + 1) * steps_per_epoch - steps_left
    shift = position.images - (steps_per_epoch - steps_left) * images_per_step if steps_left else 0
    return Continuation(step - equivalent_steps, position.epoch, shift)


def step_size(train: Mapping[str, Any], world: int) -> tuple[int, str]:
    """Images of an optimiser step, and of what they are the product; train: `Run.train` as plain data."""
    parts = f"train.batch_size {train['batch_size']} x accumulate {train['accumulate']} x {world} process(es)"
    return train["batch_size"] * train["accumulate"] * world, parts


def changed_settings(saved: Any, fresh: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and change of each setting (runs as plain data) that a resumed run has otherwise than its checkpoint.

    A setting that the file does not know is of a newer version, and has its default.
    """
    pairs: list[tuple[str | int, Any, Any]] = []
    if isinstance(saved, Mapping) and isinstance(fresh, Mapping):
        pairs = [(name, value, fresh.get(name, "not set")) for name, value in saved.items()]
    elif isinstance(saved, list) and isinstance(fresh, list) and len(saved) == len(fresh):
        whole = not any(isinstance(one, Mapping) for one in saved)  # as a size or levels
        pairs = [] if whole else [(number, *pair) for number, pair in enumerate(zip(saved, fresh, strict=True))]
    if not pairs and saved != fresh:
        yield path, f"is {fresh}, and was {saved}"
    for name, before, now in pairs:
        yield from changed_settings(before, now, f"{path}.{name}" if path else str(name))


def own_config(saved: Mapping[str, Any], fresh: Mapping[str, Any]) -> str:
    """What to do where the network of a resumed run is another than the checkpoint's; both are runs as plain data."""
    of_network = re.compile(r"model\.|tasks\.[^.]+(\.(decoder|head)\b|$)")
    changed = [f"{path} {how}" for path, how in changed_settings(saved, fresh) if of_network.match(path)]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    told = f"{', '.join(changed[:3])}{more}; " if changed else ""
    return f"{told}set that back, or go on by --resume RUN without a config, which takes the run's own"


def is_of_evaluation(path: str) -> bool:
    """Whether a setting decides on which images a run is evaluated, how large, or may decide what a metric then says.

    Folders may move; of a task's settings the weight of its loss alone surely changes no metric.
    """
    of_data = r"data\.(size|eval_size|val(\.\d+\.(?!root$).+)?)$"
    return bool(re.match(of_data, path) or re.match(r"tasks\.[^.]+\.(?!weight$)", path))


def changed_images(saved: Mapping[str, Any], fresh: Mapping[str, Any], part: str) -> str:
    """Which data sets have other images than at the checkpoint, or the same in another order; empty: none.

    saved, fresh: as `Trainer.state_dict` gives them; older files tell nothing of images. part: `train` or `val`
    """
    before: Mapping[str, Any] = saved.get("images", {}).get(part, {})
    phrases = []
    for name, (count, digest) in fresh["images"].get(part, {}).items():
        old_count, old_digest = before.get(name, (count, digest))
        if count != old_count:
            phrases.append(f"{name} has {count} images, and had {old_count}")
        elif digest != old_digest:
            phrases.append(f"{name} has other images, or the same in another order")
    return ", ".join(phrases)


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
