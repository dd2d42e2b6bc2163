"""What `import visionmtl` offers beside the predictor: train, evaluate and build a network from Python."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from visionmtl import run as config
from visionmtl.config.imports import allow_imports
from visionmtl.config.paths import home_path
from visionmtl.config.suggest import did_you_mean
from visionmtl.data.label_spaces import Spaces, align, eval_names, supervises, tasks_of
from visionmtl.data.loader import val_loader
from visionmtl.datasets import NamedDataset, check_channels, open_datasets
from visionmtl.engine import distributed, memory_errors, trainer
from visionmtl.engine.checkpoint import Opened, open_model
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.evaluator import evaluate as evaluate_network
from visionmtl.engine.extension import extended, old_spaces
from visionmtl.engine.options import TrainOptions, check_counts, check_paths, check_texts
from visionmtl.engine.protocols import find_protocol
from visionmtl.engine.teachers import resolve_taught_spaces
from visionmtl.metrics.base import Meter, Results
from visionmtl.metrics.distance import DistanceMeter
from visionmtl.network import MultiTaskNet
from visionmtl.network import build_model as build_network
from visionmtl.run import Run
from visionmtl.structures import Sample
from visionmtl.tasks.base import Task


def train(
    config_or_run: str | Path | Run,
    *overrides: str,
    output: str | Path | None = None,
    allow_import: Sequence[str] = (),
    **options: Any,
) -> Results:
    """Train, and return the last evaluation: by task a dict of metrics, as `results["depth"]["rmse_m"]`.

    config_or_run: a YAML file, the name of a shipped one, or a `Run`; overrides: "train.epochs=3"
    output: the run folder; None: the config's, else runs/NAME
    allow_import: modules of plug-ins that checkpoints may import (init_from, extend, distill), which runs them
    options: fields of `engine.options.TrainOptions`, as max_steps=100, resume="auto", device="cpu"
    """
    run = _read(config_or_run, overrides)
    known = TrainOptions.__dataclass_fields__
    for option in options:
        if option not in known:
            raise TypeError(
                f"there is no option {option}={options[option]!r}{did_you_mean(option, known)}; options are "
                f"{', '.join(known)}; a setting of the config is a text, as 'train.epochs=3'"
            )
    start = TrainOptions(**options)
    check_paths(output=output)
    name = "unnamed" if isinstance(config_or_run, Run) else Path(config_or_run).stem
    with allow_imports(allow_import):
        return trainer.train(place(run, name, output, start.overfit), start)


def place(run: Run, name: str, output: str | Path | None, overfit: int | None) -> Run:
    """The run with its folder decided."""
    folder = (run.output or f"runs/{name}") + (f"-overfit{overfit}" if overfit else "")
    return run.model_copy(update={"output": str(home_path(output or folder))})


def build_model(config_or_run: str | Path | Run, *overrides: str) -> MultiTaskNet:
    """The untrained network of a run. Its training data sets are opened, for they name the classes to learn."""
    run = _read(config_or_run, overrides)
    run = extended(run)
    spaces = resolve_taught_spaces(run, open_datasets(run.data.train), None, old_spaces(run))
    return build_network(run.model, run.tasks, spaces, run.data.size)


def _read(config_or_run: str | Path | Run, overrides: Sequence[str]) -> Run:
    if not isinstance(config_or_run, str | Path | Run):
        raise TypeError(
            f"the run is {config_or_run!r}; a config file, the name of a shipped config or a visionmtl.run.Run is "
            "needed; correct it"
        )
    if not isinstance(config_or_run, Run):
        return config.load(config_or_run, overrides)
    return config.restore(config_or_run.model_dump(mode="json"), "Run", overrides)  # checked: a copy may hold anything


def evaluate(
    checkpoint: str | Path,
    *overrides: str,
    split: str | None = None,
    data: Sequence[str] = (),
    protocol: str | None = None,
    tta: Literal["flip"] | None = None,
    batch_size: int | None = None,
    limit_batches: int | None = None,
    device: str = "auto",
    allow_import: Sequence[str] = (),
) -> Results:
    """Evaluate a checkpoint, or a run folder's best, on the run's validation data; results as those of `train`.

    The arguments are the options of `tools/eval.py`; allow_import: see `visionmtl.load`.
    Raises ValueError for values that these cannot have.
    """
    if tta not in (None, "flip"):
        raise ValueError(f"tta is {tta!r}; it can be 'flip' or None; correct it")
    check_counts(batch_size=batch_size, limit_batches=limit_batches)
    check_texts(split=split, protocol=protocol)
    data = [data] if isinstance(data, str) else data
    with distributed.group(device) as ranks, allow_imports(allow_import):
        evaluation = Evaluation(open_model(checkpoint, ranks.device, overrides, split), ranks, data, protocol)
        return evaluation.measure(tta, batch_size, limit_batches)


class Evaluation:
    """A trained network with the validation data and the meters that judge it, all checked before the work."""

    def __init__(self, opened: Opened, ranks: Ranks, data: Sequence[str], protocol: str | None) -> None:
        """data, protocol: see `choose_datasets` and `choose_meters`."""
        self.opened, self.ranks, self.protocol = opened, ranks, protocol
        run, spaces = opened.run, opened.net.spaces
        self.sources = datasets = choose_datasets(run, data)
        check_channels(datasets, run.model.encoder.in_chans)
        self.notes = [f"{dataset.name}: {note}" for dataset in datasets for note in dataset.notes]
        self.meters, self.datasets = choose_meters(run.tasks, spaces, datasets, protocol, only_evaluated=bool(data))
        self.tasks = {task: run.tasks[task] for name in self.meters for task in tasks_of(name)}
        if protocol is None:
            self.meters |= distance_meters(self.tasks, spaces, self.datasets)

    def measure(
        self,
        tta: Literal["flip"] | None = None,
        batch_size: int | None = None,
        limit_batches: int | None = None,
        on_image: Callable[[Sample, dict[str, Any], Sequence[str]], None] | None = None,
    ) -> Results:
        """Once: the meters are used up. on_image: see `engine.evaluator.evaluate`."""
        run, net = self.opened.run, self.opened.net
        batch_size = batch_size or run.train.batch_size
        loader = val_loader(
            run.data, self.tasks, net.spaces, self.datasets, batch_size, self.ranks.rank, self.ranks.world,
            limit=limit_batches,
        )  # fmt: skip
        with memory_errors.explained(memory_errors.eval_remedies(run, batch_size, "--batch-size"), "evaluation"):
            results = evaluate_network(
                net, loader, self.ranks.device, precision=run.train.precision, meters=self.meters, flip=tta == "flip",
                on_image=on_image,
            )  # fmt: skip
        return find_protocol(self.protocol).named(results) if self.protocol else results


def choose_datasets(run: Run, names: Iterable[str]) -> list[NamedDataset]:
    """The validation data sets of these names; without names all."""
    datasets = open_datasets(run.data.val, run.data.elsewhere("val"))
    known = [dataset.name for dataset in datasets]
    for name in names:
        if name not in known:
            raise ValueError(
                f"--data {name}{did_you_mean(name, known)}: the validation data sets are {', '.join(known)}; "
                "choose among them, or add one as data.val.N"
            )
    return [dataset for dataset in datasets if not names or dataset.name in names]


def choose_meters(
    tasks: Mapping[str, Task],
    spaces: Spaces,
    datasets: list[NamedDataset],
    protocol: str | None,
    only_evaluated: bool,
) -> tuple[dict[str, Meter], list[NamedDataset]]:
    """Fresh meters by name of their results, and the data as they want it.

    protocol: a benchmark's rules in place of each task's own meter
    only_evaluated: leave out tasks that these data sets cannot evaluate
    """
    datasets = align(datasets, tasks, spaces)
    if only_evaluated:
        tasks = {
            name: task for name, task in tasks.items() if any(supervises(one, task, spaces[name]) for one in datasets)
        }
        if not tasks:
            names = " ".join(dataset.name for dataset in datasets)
            raise ValueError(f"--data {names} judges no task; one is needed; choose a data set that does")
    makers: Mapping[str, Callable[[], Meter]] = {name: partial(one.meter, spaces[name]) for name, one in tasks.items()}
    if protocol:
        rules = find_protocol(protocol)
        makers, datasets = rules.makers(tasks, spaces), rules.sources(datasets)
    names_of_results = eval_names({name: tasks[name] for name in makers}, spaces, datasets)
    return {name: makers[task]() for name, task in names_of_results.items()}, datasets


def distance_meters(tasks: Mapping[str, Task], spaces: Spaces, datasets: list[NamedDataset]) -> dict[str, Meter]:
    """What measures distances of boxes where boxes and depth are predicted and labelled, by names as "detection+depth".

    One meter for each data set that labels both, with @data set in its name where there are several.
    """
    first = {task.result_field: name for name, task in reversed(list(tasks.items()))}
    if "boxes" not in first or "depth_m" not in first:
        return {}
    pair = first["boxes"], first["depth_m"]
    space = spaces[pair[0]]
    assert space is not None
    evaluating = [one.name for one in datasets if all(supervises(one, tasks[name], spaces[name]) for name in pair)]
    name = "+".join(pair)
    return {name if len(evaluating) == 1 else f"{name}@{one}": DistanceMeter(space) for one in evaluating}
