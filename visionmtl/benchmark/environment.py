"""What the figures were measured on: that of a run, with the processor's name and the day."""

import datetime
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from visionmtl.engine.environment import environment

_CPU_INFO = Path("/proc/cpuinfo")


def header(command: str, verb: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What stands above the figures. The keys: command, date (UTC), verb, settings, machine."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    machine = environment()
    peer = {"segmentation-models-pytorch": version("segmentation-models-pytorch")}
    machine = {**machine, "packages": machine["packages"] | peer, "cpu": _cpu()}
    return {"command": command, "date": today, "verb": verb, "settings": settings, "machine": machine}


def _cpu() -> str:
    """The processor's name where the system tells, else its architecture."""
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
