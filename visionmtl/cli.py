"""The `visionmtl` command: `visionmtl train ...` is the same function as `python tools/train.py ...`."""

import ast
import importlib
import pkgutil
import sys
from pathlib import Path

from visionmtl.config.paths import shipped_folder
from visionmtl.config.registry import did_you_mean

# found under this module's name (`visionmtl.cli.train`), so that worker processes find them again
_folder = shipped_folder("tools")
__path__ = [str(_folder)]


def verbs() -> dict[str, str]:
    """Every tool on disk with the first line of its docstring; nothing is imported."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: _charter(_folder / f"{name}.py") for name in found}


def _charter(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _usage() -> str:
    rows = verbs()
    width = max(map(len, rows), default=0)
    listing = "\n".join(f"  {name:<{width}}  {charter}" for name, charter in rows.items())
    return f"usage: visionmtl VERB ...\n\n{listing}\n\n'visionmtl VERB --help' explains one of them."


def main(argv: list[str] | None = None) -> int:
    """Hand the arguments after the verb to that tool's `main`; returns its exit status, 2 for an unknown verb."""
    asked, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if asked in ("-h", "--help", "help"):
        print(_usage())
        return 0

    verb = asked.replace("-", "_")
    known = verbs()
    if verb not in known:  # `check` is short for `check_data`
        longer = [name for name in known if name.partition("_")[0] == verb]
        verb = longer[0] if len(longer) == 1 else verb
    if verb not in known:
        print(
            f"visionmtl: unknown verb {asked!r}{did_you_mean(verb, known)}; known are: {', '.join(known)}; "
            "'visionmtl --help' says what each does",
            file=sys.stderr,
        )
        return 2

    sys.argv = [f"visionmtl {verb}", *rest]  # what the tool's usage line and the run's record show
    return int(importlib.import_module(f"visionmtl.cli.{verb}").main(rest))


if __name__ == "__main__":  # for `torchrun -m visionmtl.cli train ...`
    sys.exit(main())
