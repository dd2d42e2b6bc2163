"""Where figures go: to the terminal as they come, and into JSON and Markdown files that are never behind."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionmtl.benchmark.base import Figure, Row, markdown, plain


class Report:
    """Printed line by line; files are written anew with each figure, so that a run cut short leaves what it found."""

    def __init__(self, header: Mapping[str, Any], json_file: Path | None, markdown_file: Path | None) -> None:
        self._header = dict(header)
        self._json, self._markdown = json_file, markdown_file
        self._figures: list[Figure] = []
        self._lines: list[str] = []
        for file in (json_file, markdown_file):
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
        self._say(_introduction(header))

    def add(self, figure: Figure) -> None:
        """Print and keep."""
        self._say(markdown(figure, self._figures[-1] if self._figures else None))
        self._figures.append(figure)
        if self._json:
            self._json.write_text(json.dumps({**self._header, **plain(self._figures)}, indent=1) + "\n")

    @property
    def kept(self) -> bool:
        """Whether no figure misses its limit so far."""
        return all(one.kept for one in self._figures if isinstance(one, Row))

    def _say(self, text: str) -> None:
        print(text, flush=True)
        self._lines.append(text)
        if self._markdown:
            self._markdown.write_text("\n".join(self._lines) + "\n", encoding="utf-8")


def _introduction(header: Mapping[str, Any]) -> str:
    """What the figures were measured with, in one paragraph."""
    machine = header["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return (
        f"`{header['command']}` on {header['date']}, commit {machine['commit']}: {machine['cpu']}, "
        f"{machine['torch_threads']} of {machine['cpu_cores']} cores; {gpus}"
        f"{', CUDA ' + machine['cuda'] if machine['gpus'] else ''}; Python {machine['python']}, {packages}."
    )
