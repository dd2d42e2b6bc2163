"""What the Gramian tells of conflict between tasks, over the last steps: no backward more, and no wait for the device.

For tasks i and j with gradients g_i and g_j, of all shared maps together and of each level:
cosine of their angle; norm_ratio |g_i| / |g_j| (its geometric mean); magnitude_similarity
2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2), 1 for equal lengths (Yu et al. 2020, arXiv:2001.06782, def. 2); conflict, the share
of steps with a negative cosine (def. 1 there).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MEMORY = 0.98
"""Each step keeps so much of the averages before: they reach back about 50 steps."""
MAX_LEVEL = 9
_FIGURES = ("cosine", "norm_ratio", "magnitude_similarity", "conflict")


class ConflictTrace(nn.Module):
    """Moving averages over the steps in which both tasks have a gradient; part of the checkpoint."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        shape = (1 + len(_FIGURES), 1 + MAX_LEVEL, num_tasks, num_tasks)
        self.sums = nn.Buffer(torch.zeros(shape, dtype=torch.float64))
        """[0]: weight of the steps so far; then the figures, times it. Second axis: all maps together, then levels."""
        self._levels: tuple[int, ...] = ()
        self.register_load_state_dict_pre_hook(_begin_anew_where_missing)

    def update(self, whole: Tensor, of_levels: Tensor | None = None, levels: Sequence[int] = ()) -> None:
        """whole: float64 [T, T], the Gramian, rows of absent tasks 0; of_levels: [K, T, T], what it is the sum of."""
        self._levels = tuple(levels) if of_levels is not None else ()
        slots = [whole, *[torch.zeros_like(whole)] * MAX_LEVEL]
        for level, gramian in zip(self._levels, of_levels if of_levels is not None else (), strict=True):
            slots[level] = gramian
        gramians = torch.stack(slots)  # [1 + MAX_LEVEL, T, T]
        square = gramians.diagonal(dim1=1, dim2=2).clamp(min=0)
        seen = square > 0
        both = seen[:, :, None] & seen[:, None, :]
        length = torch.where(seen, square, 1.0).sqrt()
        product = length[:, :, None] * length[:, None, :]
        cosine = gramians / product
        ratio = (length[:, :, None] / length[:, None, :]).log()
        similarity = 2 * product / (length.square()[:, :, None] + length.square()[:, None, :])
        now = torch.stack([torch.ones_like(cosine), cosine, ratio, similarity, (cosine < 0).to(cosine.dtype)])
        self.sums.copy_(torch.where(both, MEMORY * self.sums + (1 - MEMORY) * now, self.sums))

    def read(self) -> dict[str, Tensor]:
        """float64 [T, T] by figure, and by `levelN/figure`; NaN for tasks that never met."""
        means = self.sums[1:] / self.sums[:1]
        figures = {}
        for slot in (0, *self._levels) if self._levels else (0,):
            for number, name in enumerate(_FIGURES):
                value = means[number, slot]
                figures[f"level{slot}/{name}" if slot else name] = value.exp() if name == "norm_ratio" else value
        return figures


def _begin_anew_where_missing(trace: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints from before there were traces resume with an empty one: it changes no weight."""
    state.setdefault(f"{prefix}sums", torch.zeros_like(trace.get_buffer("sums")))


def pairs(matrices: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """The matrices as numbers by pair, `a-b` with a before b; waits for the device once."""
    if not matrices:
        return {}
    values = torch.stack(list(matrices.values())).tolist()
    return {
        name: {
            f"{a}-{b}": matrix[i][j] for i, a in enumerate(tasks) for j, b in enumerate(tasks) if i < j
        }
        for name, matrix in zip(matrices, values, strict=True)
    }  # fmt: skip
