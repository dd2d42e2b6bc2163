"""Trained networks on the Hugging Face hub: weights as safetensors, settings as JSON, and a model card."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmtl.config.imports import allow_imports
from visionmtl.config.paths import home_path, regular_file
from visionmtl.config.text_files import check_object, read_object, shown
from visionmtl.data.label_spaces import tasks_of
from visionmtl.engine.checkpoint import FORMAT, Opened, check_spaces, load, open_model, open_state, save_weights
from visionmtl.engine.distributed import choose_device
from visionmtl.engine.evaluator import read_results
from visionmtl.inference.predictor import Predictor
from visionmtl.io.atomic import write_json, write_text
from visionmtl.io.tensor_files import has_settings
from visionmtl.metrics.distance import DistanceMeter
from visionmtl.ops.precision import Precision

WEIGHTS, CONFIG, CARD = FILES = ("model.safetensors", "config.json", "README.md")
_CARD = """# {title}

One network for {tasks}, trained with visionmtl.

```python
from visionmtl.export.hub import from_pretrained

model = from_pretrained("{repo}")
result = model("photo.jpg")
```

Licence of the weights: {licence}. The data they were trained on may have terms of their own.

## Tasks

| task | type | classes |
|---|---|---|
{task_rows}

Encoder {encoder}, input {size} px, {parameters:,} parameters, step {step}, epoch {epoch}.

{sections}
"""


def save_pretrained(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    licence: str,
    results: str | Path | None = None,
    repo: str = "",
    half: bool = False,
) -> Path:
    """Write a network as the hub has it into a new or empty folder: the moving average of its weights, where kept.

    licence: of the weights, by the hub's name, such as apache-2.0, or `other`; data may forbid what code allows.
        A network that comes with the package keeps its own, and its card's sections go along
    results: the JSON file of an evaluation, for the card; None: the newest in the run's folder `eval` that
        measured these weights on all validation data
    repo: OWNER/NAME, for the card's example
    half: weights as float16, in half the bytes
    """
    opened, folder = open_model(checkpoint), home_path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; a new or empty folder is needed; choose another name")
    if not licence.strip():
        raise ValueError("licence is empty; the weights' licence by the hub's name is needed; e.g. apache-2.0 or other")
    own = {} if opened.card is None else _front_matter(opened.card)
    if licence != own.get("license", licence):
        raise ValueError(
            f"licence is {licence!r}, and {opened.path.stem}, which comes with the package, has "
            f"{own['license']!r} ({own['license_name']}); its weights keep their licence, see {opened.card}; give "
            f"licence {own['license']}"
        )
    file = home_path(results) if results else _newest_results(opened)
    measured = _read_results(file)
    card = model_card(opened, measured, licence, repo or folder.resolve().name)
    if results and not _are_of(home_path(results), opened):
        raise ValueError(
            f"{results} is not of this network on all of its validation data, as its header says (checkpoint, step, "
            f"overrides, limit_batches); results of {opened.path.name} at step {opened.step} are needed; write them "
            "with visionmtl eval"
        )
    folder.mkdir(parents=True, exist_ok=True)
    settings = save_weights(folder / WEIGHTS, opened, _without_paths(opened.run.model_dump(mode="json")), half)
    write_json(folder / CONFIG, settings)
    write_text(folder / CARD, card)
    return folder


def push_to_hub(
    checkpoint: str | Path,
    repo: str,
    *,
    licence: str,
    results: str | Path | None = None,
    private: bool = True,
    token: str | None = None,
    half: bool = False,
) -> str:
    """Upload what `save_pretrained` writes to the repository OWNER/NAME, which is made where it is missing.

    token: None: the one that `hf auth login` has kept. Returns the address of the commit.
    """
    import tempfile

    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "network"
        save_pretrained(checkpoint, folder, licence=licence, results=results, repo=repo, half=half)
        api = HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with visionmtl"))


def from_pretrained(
    repo: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    device: str | torch.device | None = None,
    tasks: Sequence[str] | None = None,
    precision: Precision | None = None,
    allow_import: Sequence[str] = (),
) -> Predictor:
    """The network of a folder that `save_pretrained` wrote, or of a repository OWNER/NAME of the hub.

    revision: a branch, tag or commit; the other arguments as of `visionmtl.load`
    """
    folder = home_path(repo)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(repo), revision=revision, token=token, allow_patterns=list(FILES)))
    elif revision is not None:
        raise ValueError(f"revision is {revision!r}, but {repo} is a folder, which has none; leave it out")
    state = _read_state(folder)
    chosen = device if isinstance(device, torch.device) else choose_device(device or "auto")
    with allow_imports(allow_import):
        opened = open_state(state, folder / WEIGHTS, chosen)
    return Predictor(opened, tasks, precision)


def _read_state(folder: Path) -> dict[str, Any]:
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {' and no '.join(missing)}; a folder that save_pretrained wrote has both; correct the "
            "path, or load a checkpoint with visionmtl.load"
        )
    file = folder / CONFIG
    settings = read_object(file)
    version = settings.get("visionmtl_format")
    if version not in (1, FORMAT) or isinstance(version, bool):
        raise ValueError(
            f"{file} has visionmtl_format {shown(version, 50)}; this version reads 1 and {FORMAT}; use a network that "
            "visionmtl wrote"
        )
    if version == 1 and not has_settings(folder / WEIGHTS):  # without a digest, and with settings in this file alone
        check_object(settings, str(file), {"run.data.size": list, "spaces": dict, "step": int, "epoch": int})
        check_spaces(settings["spaces"], file, "use a network that visionmtl wrote")
        return {**settings, "net": _load_format_1(folder / WEIGHTS), "ema": None}
    state = load(folder / WEIGHTS)
    if differing := [name for name in settings if settings[name] != state.get(name)]:
        raise ValueError(
            f"{file} has another {differing[0]!r} than {WEIGHTS}, which holds the same settings and is what "
            "is read; the two must be equal; fetch both again, or publish the network anew"
        )
    return state


def _load_format_1(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(regular_file(file))
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged ({error}); the file that save_pretrained wrote is needed; fetch it again"
        ) from error


def _without_paths(run: dict[str, Any]) -> dict[str, Any]:
    """The run without the folders of the machine that trained it: of other absolute paths the last name is left."""
    run["output"] = None
    run["model"]["encoder"]["checkpoint"] = None
    stripped: dict[str, Any] = _stripped(run, (run["data"].get("root") or "").rstrip("/"))
    return stripped


def _stripped(value: Any, root: str) -> Any:
    if isinstance(value, dict):
        return {key: _stripped(inner, root) for key, inner in value.items()}
    if isinstance(value, list):
        return [_stripped(inner, root) for inner in value]
    if not isinstance(value, str):
        return value
    if root and (value.rstrip("/") == root or value.startswith(f"{root}/")):
        return "data" + value[len(root) :]
    return Path(value).name if Path(value).is_absolute() else value


_OF_TRAINING = re.compile(r"(best|last|step-\d+)\.pt")
_WHERE = re.compile(r"data\.((train|val)\.\d+\.(of\.)*)?(root|workers|batch_size|timeout_s)=")
"""Settings that do not change what is judged: where the data lie, and how they are read."""


def _newest_results(opened: Opened) -> Path | None:
    files = sorted((opened.folder / "eval").glob("*.json"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    return next((file for file in files if _are_of(file, opened)), None)


def _are_of(file: Path, opened: Opened) -> bool:
    header = read_object(file).get("header")
    if not isinstance(header, dict):
        return False
    in_part = header.get("limit_batches") or header.get("data") or header.get("split", "val") != "val"
    changed = [text for text in header.get("overrides", ()) if not _WHERE.match(text)]
    # what a training writes are its own checkpoints, of which those of one step are one network; others stand alone
    evaluated, meant = Path(header.get("checkpoint", "last.pt")).name, opened.path.name
    is_same = evaluated == meant or bool(_OF_TRAINING.fullmatch(evaluated) and _OF_TRAINING.fullmatch(meant))
    return header.get("step") == opened.step and is_same and not in_part and not changed


def _read_results(file: Path | None) -> Mapping[str, Mapping[str, Any]]:
    if file is None:
        return {}
    return read_results(file)


def _front_matter(card: Path) -> dict[str, Any]:
    """The fields that a card begins with, between two lines of dashes."""
    import yaml

    fields: dict[str, Any] = yaml.safe_load(card.read_text(encoding="utf-8").split("---\n", 2)[1])
    return fields


def model_card(opened: Opened, results: Mapping[str, Mapping[str, Any]], licence: str, repo: str) -> str:
    """The card: the hub's own fields in YAML, then tasks, data, and metrics with the names of their protocols.

    Of a network of the package its own card's fields and sections, and metrics where results are given.
    """
    import yaml

    net, run = opened.net, opened.run
    names = repo.rsplit("/", 1)[-1]
    rows, shown = [], []
    for name, task in net.tasks.items():
        space = net.spaces[name]
        classes = f"{len(space.classes)}: {', '.join(space.classes)}" if space else ""
        rows.append(f"| {name} | {task.type} | {_cell(classes)} |")
    for name, result in results.items():
        tasks = tasks_of(name)
        if strange := [task for task in tasks if task not in net.tasks]:
            raise ValueError(
                f"the results are of task {strange[0]!r}, and the network has {', '.join(net.tasks)}; results of this "
                "network are needed; give what visionmtl eval wrote of it"
            )
        metrics = net.tasks[tasks[0]].meter_type.metrics if len(tasks) == 1 else DistanceMeter.metrics
        for metric in metrics:
            if isinstance(value := result.get(metric), float):
                shown.append((name, metric, value, str(result.get("protocol", "")), result.get("images")))
    table = "\n".join(f"| {n} | {m} | {v:.4f} | {i} | {_cell(p)} |" for n, m, v, p, i in shown)
    heading = "| task | metric | value | images | protocol |\n|---|---|---|---|---|\n"
    datasets = list(dict.fromkeys(one.name or one.type for one in (*run.data.train, *run.data.val)))
    fields = {
        "library_name": "visionmtl",
        "license": licence,
        "pipeline_tag": "object-detection" if "boxes" in {task.field for task in net.tasks.values()} else None,
        "tags": ["multi-task", *dict.fromkeys(task.type for task in net.tasks.values())],
    }
    measured = heading + table if shown else "No evaluation was kept with this network."
    sections = f"## Data\n\nTrained and evaluated on: {', '.join(datasets)}.\n\n## Metrics\n\n{measured}"
    if opened.card is not None:
        fields |= _front_matter(opened.card)
        own = opened.card.read_text(encoding="utf-8")
        sections = own[own.index("## ") :].strip() + (f"\n\n## Metrics\n\n{measured}" if shown else "")
    header = yaml.safe_dump({key: value for key, value in fields.items() if value}, sort_keys=False)
    body = _CARD.format(
        title=names,
        tasks=", ".join(net.tasks),
        repo=repo,
        licence=fields.get("license_name", licence),
        task_rows="\n".join(rows),
        encoder=run.model.encoder.name,
        size="x".join(map(str, run.data.input_size)),
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        step=opened.step,
        epoch=opened.epoch,
        sections=sections,
    )
    return f"---\n{header}---\n\n{body}"


def _cell(text: str) -> str:
    """In a table, where a bar would begin a new cell, and no name may be markup."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
