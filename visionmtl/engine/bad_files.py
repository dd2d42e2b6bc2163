"""Training files that could not be read: each named once in RUN/bad_files.jsonl, counted, an error above the limit."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from visionmtl.config.text_files import check_object, parse_line, read_text
from visionmtl.data.bad_files import BadFiles
from visionmtl.engine.distributed import any_rank, gather_objects
from visionmtl.io.atomic import write_text
from visionmtl.structures import Batch

FILE = "bad_files.jsonl"
logger = logging.getLogger("visionmtl")


class BadFileRecord:
    """What the ranks of a run could not read.

    The limit is of one start: files may be mended before the next. Of the rows each file has one over all starts.
    """

    def __init__(
        self, bad_files: BadFiles, sizes: Mapping[str, int], device: torch.device, folder: Path | None, resumed: bool
    ) -> None:
        """bad_files: whose limit holds for each training data set; sizes: their images, by name.

        folder: of the run; None where this process writes nothing
        """
        self._sizes, self._device, self._bad_files = dict(sizes), device, bad_files
        self._file = folder and folder / FILE
        self._rows: list[dict[str, Any]] = []
        if self._file and self._file.exists():
            if resumed:
                self._rows = _read_rows(self._file)
            else:
                self._file.unlink()
        self._pending: list[dict[str, Any]] = []  # of this rank
        self._left_out: dict[str, set[int]] = {name: set() for name in sizes}  # indices by data set, of all ranks

    def add(self, batches: Sequence[Batch], epoch: int, step: int) -> None:
        """Take note of what the batches of a step lack; the first rank and the others hear of it in `share`."""
        for bad in (bad for batch in batches for bad in batch.bad_files):
            if bad.index not in self._left_out[bad.dataset]:
                now = datetime.now().astimezone().isoformat(timespec="seconds")
                self._pending.append({"time": now, "epoch": epoch, "step": step, **asdict(bad)})

    def share(self) -> None:
        """Write and count what the ranks have taken note of; all call this together.

        Raises ValueError on all ranks where more images of a data set are left out than the limit allows.
        """
        if not any_rank(bool(self._pending), self._device):
            return
        rows, self._pending = [row for of_rank in gather_objects(self._pending) for row in of_rank], []
        written = {(row["dataset"], row["index"]) for row in self._rows}
        new = len(self._rows)
        for row in sorted(rows, key=lambda row: row["step"]):
            left_out = self._left_out[row["dataset"]]
            if row["index"] in left_out:
                continue
            left_out.add(row["index"])
            logger.warning(f"BAD FILE  {self._line(row)}")
            if (row["dataset"], row["index"]) not in written:
                self._rows.append(row)
        if self._file and len(self._rows) > new:
            write_text(self._file, "".join(f"{json.dumps(row)}\n" for row in self._rows))
        for row in rows:
            self._check(row)

    def summary(self) -> str | None:
        """How many images this start had to leave out; None where it read all."""
        counts = Counter({name: len(indices) for name, indices in self._left_out.items() if indices})
        if not counts:
            return None
        told = ", ".join(f"{count} of {self._sizes[name]} of {name}" for name, count in counts.items())
        return f"{counts.total()} images could not be read and taught nothing: {told}; {FILE} names them"

    def _line(self, row: Mapping[str, Any]) -> str:
        name = row["dataset"]
        return (
            f"image {row['index']} of {name} cannot be read: {row['error']}. At step {row['step']} an unlabelled copy "
            f"of another image took its place; {len(self._left_out[name])} of {self._sizes[name]} images are left out "
            f"so far, {self._bad_files.allowed(self._sizes[name])} may be (data.bad_files.limit)"
        )

    def _check(self, row: Mapping[str, Any]) -> None:
        name = row["dataset"]
        count, size = len(self._left_out[name]), self._sizes[name]
        allowed = self._bad_files.allowed(size)
        if count > allowed:
            raise ValueError(
                f"{count} of {size} images of training data set {name} cannot be read, the last is image "
                f"{row['index']} ({row['file'] or row['error']}): {row['error']}; data.bad_files.limit "
                f"{self._bad_files.limit:g} allows {allowed}; mend these files, which {FILE} in the run's folder "
                "names, and go on with --resume, or raise the limit"
            )


def _read_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        where = f"{file}:{number}"
        row = parse_line(line, where)
        check_object(row, where, {"dataset": str, "index": int})
        rows.append(row)
    return rows
