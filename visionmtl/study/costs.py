"""What a step of each run costs, timed in turns with one of them in the same process; parameters and arithmetic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from visionmtl.benchmark.measure import Timing, alternate, count_flops, median, ratio
from visionmtl.config.text_files import check_object, read_object
from visionmtl.data.label_spaces import align
from visionmtl.data.loader import train_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine.distributed import Ranks, choose_device
from visionmtl.engine.extension import extended, old_spaces, train_tasks
from visionmtl.engine.teachers import resolve_taught_spaces
from visionmtl.engine.trainer import Trainer
from visionmtl.io.atomic import write_json
from visionmtl.network import build_model
from visionmtl.run import Run
from visionmtl.study.comparison import Variant, key_of, renewed_key
from visionmtl.study.runner import Runner

TIMING = Timing(rounds=7, seconds=0.5)
FILE = "costs.json"


@dataclass(frozen=True)
class Cost:
    """Of one variant."""

    key: str  # of its run, see `key_of`
    baseline: str  # the variant that its steps took turns with
    baseline_ms: float  # the median over rounds of a whole training step of the baseline, on a batch in memory
    ratio: float  # of this variant's step to that: the median of the rounds' ratios
    num_parameters: int
    gflop: float  # of the network's forward pass on one image, a multiply-add as two


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "key": str, "baseline": str, "baseline_ms": (int, float), "ratio": (int, float), "num_parameters": int,
    "gflop": (int, float),
}  # fmt: skip


def read_costs(folder: Path) -> dict[str, Cost]:
    """By variant; those measured so far."""
    file = folder / FILE
    plain = read_object(file) if file.is_file() else {}
    for name, cost in plain.items():
        check_object(cost, f"{file}: {name}", _FIELDS)
    return {
        name: Cost(**{**{field: cost[field] for field in _FIELDS}, "key": renewed_key(cost["key"])})
        for name, cost in plain.items()
    }


def step_ms(costs: Mapping[str, Cost]) -> dict[str, float]:
    """Milliseconds of a step by variant: the ratio times the baseline's least busy rounds, for all alike."""
    least = min((cost.baseline_ms for cost in costs.values()), default=0.0)
    return {name: cost.ratio * least for name, cost in costs.items()}


def measure_costs(
    folder: Path, variants: Mapping[str, Variant | None], runner: Runner, tell: Callable[[str], None]
) -> None:
    """Measure the variants that are not measured yet and write the file after each.

    The baseline is the first variant that learns the most tasks. Nothing else should run on the machine.
    """
    known = {name: variant for name, variant in variants.items() if variant is not None}
    if not known:
        return
    num_tasks = max(len(variant.run.tasks) for variant in known.values())
    baseline = next(name for name, variant in known.items() if len(variant.run.tasks) == num_tasks)
    costs = {n: c for n, c in read_costs(folder).items() if n in known and c.key == key_of(known[n].run)}
    costs = {name: cost for name, cost in costs.items() if cost.baseline == baseline}
    missing = [name for name in known if name not in costs]
    if not missing:
        return
    tell(f"timing the steps of {len(missing)} runs in turns with {baseline}")
    torch.set_num_threads(runner.threads)
    device = choose_device(runner.device)
    base = _Step(known[baseline].run, device)
    for name in missing:
        step = base if name == baseline else _Step(known[name].run, device)
        works = {baseline: base.work} if name == baseline else {baseline: base.work, name: step.work}
        times = alternate(works, device, TIMING)
        compared = 1.0 if name == baseline else ratio(times[name], times[baseline])
        parameters = sum(parameter.numel() for parameter in step.trainer.net.parameters())
        baseline_ms = median(times[baseline])
        costs[name] = Cost(key_of(known[name].run), baseline, baseline_ms, compared, parameters, step.gflop())
        write_json(folder / FILE, {of: vars(cost) for of, cost in costs.items()})
        tell(f"  {name}: {compared:.2f} x {baseline}, which took {baseline_ms:.0f} ms a step")


class _Step:
    """The training step of a run on the first batch of its data."""

    def __init__(self, run: Run, device: torch.device) -> None:
        torch.manual_seed(run.seed)
        run, datasets = extended(run), open_datasets(run.data.train)
        spaces = resolve_taught_spaces(run, datasets, None, old_spaces(run))
        data, taught = run.data.model_copy(update={"workers": 0}), train_tasks(run)
        batches = train_loader(
            data, taught, spaces, align(datasets, run.tasks, spaces), run.train.batch_size, run.seed,
            unlabelled=run.is_taught,
        )  # fmt: skip
        self.batch = next(iter(batches)).to(device)
        net = build_model(run.model, run.tasks, spaces, run.data.size).to(device)
        self.trainer = Trainer(run, net, Ranks(0, 1, device))

    def work(self) -> None:
        self.trainer.train_step([self.batch] * self.trainer.run.train.accumulate)

    def gflop(self) -> float:
        net = self.trainer.net.eval()
        with torch.no_grad():
            flops = count_flops(lambda: net(self.batch.image[:1]))
        net.train()
        return flops / 1e9
