"""What was probably meant: the nearest known word, and the settings of a run by the last part of their path."""

import difflib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from visionmtl.config.paths import shipped_folder


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the nearest known word, "" when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def settings_called(name: str) -> list[str]:
    """Dotted paths of settings whose last part is `name`, or the nearest such name: "epochs" -> ["train.epochs"].

    Read from the shipped schema, so that a wrong command line is answered without importing torch.
    """
    schema = json.loads((shipped_folder("configs") / "schema.json").read_text(encoding="utf-8"))
    paths = list(_paths(schema, schema.get("$defs", {}), ()))
    by_leaf: dict[str, list[str]] = {}
    for path in paths:
        by_leaf.setdefault(path[-1], []).append(".".join(path))
    near = difflib.get_close_matches(name.lower(), by_leaf, n=1, cutoff=0.75)
    return by_leaf[near[0]] if near else []


def _paths(node: dict[str, Any], definitions: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]]
    for name, field in node.get("properties", {}).items():
        yield (*path, name)
        yield from _paths(field, definitions, (*path, name))
