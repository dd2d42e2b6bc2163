"""Which modules the settings in a file may import: any for the user's own config, named ones for a checkpoint.

A plug-in is named by its import path (`type: my_module.MyTask`), and importing a module runs it. A checkpoint, and what
lies beside it, comes from somebody else: there, a module is imported only where the user allowed it by name, with
`--allow-import my_module` or `allow_import=("my_module",)`. What the program has imported itself may be used.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_allowed: ContextVar[frozenset[str]] = ContextVar("modules that foreign settings may import", default=frozenset())
_origin: ContextVar[str | None] = ContextVar("where foreign settings that are being read come from", default=None)


@contextmanager
def allow_imports(modules: Iterable[str]) -> Iterator[None]:
    """Inside, settings of foreign files may import these modules, and those in these packages."""
    token = _allowed.set(_allowed.get().union(modules))
    try:
        yield
    finally:
        _allowed.reset(token)


@contextmanager
def foreign_settings(origin: str) -> Iterator[None]:
    """Inside, settings come from `origin`, a file that the user need not have written."""
    token = _origin.set(origin)
    try:
        yield
    finally:
        _origin.reset(token)


def refusal(module: str) -> str | None:
    """Why a module may not be imported here, in three parts; None where it may."""
    origin = _origin.get()
    if origin is None or module in sys.modules:
        return None
    parents = module.split(".")
    if any(".".join(parents[:length]) in _allowed.get() for length in range(1, len(parents) + 1)):
        return None
    return (
        f"{origin} names the module {module!r}, which would be run; from a checkpoint, modules are imported only where "
        f"they are allowed by name; if you trust it, add --allow-import {module} (in Python: import {module}, or "
        f'allow_import=("{module}",))'
    )
