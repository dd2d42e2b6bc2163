"""Which tasks a step teaches, where `train.curriculum` says more than: all of them, always."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from visionmtl.ops.ranks import num_ranks, sum_over_ranks
from visionmtl.run import Curriculum
from visionmtl.structures import Batch


class TaskSchedule(nn.Module):
    """The tasks of each epoch; what easiest-first has measured is its state.

    A task that is not taught counts as not labelled: it has no loss, and balancing methods see no gradient of it. Its
    decoder, and what else serves it alone (its encoder under `single`), is held: neither gradients, momentum, weight
    decay nor running statistics change it. So it is of a frozen task, while its loss still teaches what is shared, such
    as the features that other tasks read of it under `pad_net`.
    """

    def __init__(self, spec: Curriculum, tasks: Sequence[str]) -> None:
        super().__init__()
        self.spec, self.tasks = spec, list(tasks)
        self._order: list[str] | None = None
        if spec.easiest_first:
            shape = (2, len(tasks))
            self.losses = nn.Buffer(torch.zeros(shape, dtype=torch.float64))
            """[2, T] sums over the steps of the first and of the second half of the measured epochs, over all ranks."""
            self.steps = nn.Buffer(torch.zeros(shape, dtype=torch.float64))
            """[2, T] how many of these steps had a label."""

    def taught(self, epoch: int) -> set[str]:
        """The tasks of an epoch, counted from 0. Waits for the device where easiest-first decides, once a start."""
        order = self.spec.easiest_first
        if order:
            num_open = self._num_open(epoch)
            return set(self.tasks if num_open >= len(self.tasks) else self.order()[:num_open])
        return {task for task in self.tasks if task not in self.spec.tasks or self.spec.tasks[task].teaches(epoch)}

    def held(self, epoch: int) -> set[str]:
        """The tasks whose own modules stay as they are in an epoch."""
        frozen = {task for task, when in self.spec.tasks.items() if when.freezes(epoch)}
        return frozen | (set(self.tasks) - self.taught(epoch))

    def order(self) -> list[str]:
        """The tasks, easiest first: by the fall of the loss from one half of the measured epochs to the other."""
        if self._order is None:
            means = self.losses / self.steps
            progress = (1 - means[1] / means[0]).tolist()  # NaN without labels: last
            ranked = sorted(range(len(self.tasks)), key=lambda t: (progress[t] != progress[t], -progress[t], t))
            self._order = [self.tasks[t] for t in ranked]
        return self._order

    def _num_open(self, epoch: int) -> int:
        order = self.spec.easiest_first
        assert order is not None
        if epoch < order.measure_epochs:
            return len(self.tasks)
        return 1 + (epoch - order.measure_epochs) // order.every_epochs

    def mask(self, batch: Batch, epoch: int) -> Batch:
        """The batch without labels of tasks that are not taught."""
        left_out = set(self.tasks) - self.taught(epoch)
        if not left_out:
            return batch
        labelled = {task: of & (task not in left_out) for task, of in batch.labelled.items()}
        return replace(batch, labelled=labelled)

    def measure(self, losses: Mapping[str, Tensor], labelled: Mapping[str, Tensor], epoch: float) -> None:
        """Take note of a step's losses (this rank's) at a time in epochs; nothing waits for the device."""
        order = self.spec.easiest_first
        if order is None or epoch >= order.measure_epochs:
            return
        half = int(2 * epoch >= order.measure_epochs)
        seen = torch.stack([labelled[task] for task in self.tasks]).double()
        values = sum_over_ranks(torch.stack([losses[task] for task in self.tasks]).double()) / num_ranks()
        self.losses[half] += values * seen
        self.steps[half] += seen
