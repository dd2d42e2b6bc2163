"""Look-ahead affinity: what a small step for one task does at once to the losses of the others.

Z[i][j] = 1 - L_j(shared weights after a step down the gradient of L_i) / L_j(shared weights), each task's own weights
left as they are (TAG: Fifty et al. 2021, arXiv:2109.04617, eq. 1). Above 0: task i's step helps task j. Two deviations:
steps have one length for all tasks, `STEP` of the shared weights' norm, so that rows compare; and it is measured at
kept checkpoints (`train.keep`) with their averaged weights, not in every n-th step of training.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionmtl.api import build_model
from visionmtl.config.text_files import read_object, shown
from visionmtl.data.label_spaces import align
from visionmtl.data.loader import train_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine.checkpoint import find, open_model
from visionmtl.engine.distributed import choose_device
from visionmtl.engine.extension import old_spaces, train_tasks
from visionmtl.engine.teachers import resolve_taught_spaces
from visionmtl.io.atomic import write_json
from visionmtl.network import LossNet, MultiTaskNet
from visionmtl.ops.ranks import step_totals
from visionmtl.run import Run
from visionmtl.structures import Batch
from visionmtl.study.comparison import renewed_key

STEP = 1e-4
NUM_BATCHES = 8
FILE = "affinity.json"


def check_affinity(name: str, run: Run) -> None:
    """Raise ValueError where a run has no affinity that could be measured once it is trained."""
    if not build_model(run.model_copy(update={"model": run.model.without_weights()})).trunk.shared_parameters():
        raise ValueError(
            f"affinity is {name!r}, in whose network two tasks share no parameter that is trained, so no step for one "
            "can change another's loss; it is for runs that share some; choose another run, or remove affinity"
        )


def lookahead(net: MultiTaskNet, batch: Batch, step: float = STEP) -> NDArray[np.float64]:
    """[T, T] on one batch: Z of the task that steps (row) on the task that is looked at; NaN where one has no label.

    step: its length as a fraction of the shared weights' norm. The network is left as it was.
    """
    shared = net.trunk.shared_parameters()
    net.train()
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]  # running statistics
    before = _losses(net, batch)
    gradients = [torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) for loss in before]
    weight_norm = _norm(shared)
    start = torch.stack(before).detach()
    found = []
    for of_task in gradients:
        steps = [torch.zeros_like(p) if g is None else g for g, p in zip(of_task, shared, strict=True)]
        factor = step * weight_norm / _norm(steps)
        with torch.no_grad():
            kept = [parameter.clone() for parameter in shared]
            for parameter, direction in zip(shared, steps, strict=True):
                parameter.sub_(factor * direction)
            found.append(1 - torch.stack(_losses(net, batch)) / start)
            for parameter, old in zip(shared, kept, strict=True):
                parameter.copy_(old)
    for buffer, old in buffers:
        buffer.copy_(old)
    matrix = torch.stack(found).double().cpu().numpy()
    return np.asarray(np.where(np.isfinite(matrix), matrix, np.nan))


def _losses(net: MultiTaskNet, batch: Batch) -> list[Tensor]:
    """The loss of each task, with the same random numbers at each call."""
    torch.manual_seed(0)
    parts, _, _ = LossNet(net, cut=False)(
        batch.image, batch.targets, batch.labelled, step_totals([batch.counts]), batch.color
    )
    return [torch.stack(list(of_task.values())).sum() for of_task in parts.values()]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().square().sum() for tensor in tensors]).sum().sqrt()


def measure_affinity(
    folder: Path, runs: Mapping[str, Path], device: str, threads: int, tell: Callable[[str], None]
) -> None:
    """Measure runs that are not measured yet; the file is written after each.

    runs: by the run's key, its folder
    """
    known = read_affinity(folder)
    torch.set_num_threads(threads)
    for key, place in runs.items():
        if key in known:
            continue
        tell(f"look-ahead affinity of {place}")
        steps = sorted((place / "checkpoints").glob("step-*.pt")) or [find(place)]
        matrices = [_of_checkpoint(path, choose_device(device)) for path in steps]
        known[key] = np.nanmean(np.stack(matrices), axis=0).tolist()
        write_json(folder / FILE, known)


def _of_checkpoint(path: Path, device: torch.device) -> NDArray[np.float64]:
    """The mean over the first batches of the run's training data."""
    opened = open_model(path, device)
    run, net = opened.run, opened.net
    datasets = open_datasets(run.data.train)
    data = run.data.model_copy(update={"workers": 0})
    spaces = resolve_taught_spaces(run, datasets, None, old_spaces(run))
    batches = train_loader(
        data, train_tasks(run), spaces, align(datasets, run.tasks, spaces), run.train.batch_size, run.seed,
        unlabelled=run.is_taught,
    )  # fmt: skip
    return np.nanmean(np.stack([lookahead(net, batch.to(device)) for batch in islice(batches, NUM_BATCHES)]), axis=0)


def read_affinity(folder: Path) -> dict[str, list[list[float]]]:
    """By key of the run (see `comparison.key_of`), the matrices measured so far; NaN: no batch had labels of both."""
    file = folder / FILE
    plain = read_object(file) if file.is_file() else {}
    known: dict[str, list[list[float]]] = {}
    for key, matrix in plain.items():
        try:
            numbers = np.array(matrix, np.float64)  # null is NaN
        except (TypeError, ValueError):
            numbers = np.array(0.0)
        if numbers.ndim != 2:
            raise ValueError(
                f"{file} holds {shown(matrix, 80)} under {shown(key, 80)}; a matrix of numbers is needed there; delete "
                "the file to measure again"
            )
        known[renewed_key(key)] = numbers.tolist()
    return known


def agreement(of_seeds: Sequence[Sequence[float]]) -> float | None:
    """The mean over pairs of seeds of Spearman's rank correlation; equal values share their mean rank.

    1: the seeds put the values in one order; about 0: in orders that have nothing to do with each other. None for fewer
    than two seeds whose values differ at all, or fewer than three values.

    of_seeds: of each seed the same figures in the same order
    """
    from scipy.stats import rankdata  # here: it takes as long as the rest of a tool to import

    ranks = [rankdata(values) for values in of_seeds if len(set(values)) > 1]
    if len(ranks) < 2 or len(ranks[0]) < 3:
        return None
    correlations = [float(np.corrcoef(a, b)[0, 1]) for a, b in combinations(ranks, 2)]
    return sum(correlations) / len(correlations)
