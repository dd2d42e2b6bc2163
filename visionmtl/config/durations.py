"""Times as people write them: 90s, 10m, 2h."""

import re

_SECONDS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """'90s', '45m', '1.5h' -> seconds. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match:
        raise ValueError(f"{text!r} is no duration; allowed are e.g. 90s, 45m, 2h; correct it")
    return float(match[1]) * _SECONDS[match[2]]


def clock(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
