"""The `visionmtl` command, and what every tool's command line shares: its parser, its exit status, its targets.

`visionmtl train ...` is the same function as `python tools/train.py ...`. Nothing here imports torch: `--help` and a
wrong command line are answered at once.
"""

import argparse
import ast
import contextlib
import errno
import importlib
import math
import os
import pkgutil
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from visionmtl import __version__
from visionmtl.config.allocator import keep_freed_memory
from visionmtl.config.imports import allow_imports
from visionmtl.config.paths import check_new, shipped_folder
from visionmtl.config.suggest import did_you_mean, settings_called

# found under this module's name (`visionmtl.cli.train`), so that worker processes find them again
_folder = shipped_folder("tools")
__path__ = [str(_folder)]

CHECKPOINT = "a run folder (its best checkpoint, else its last), a .pt or .safetensors file, or nyuv2-small"
"""Help of the argument that names a trained network; the last one comes with the package."""

ERROR = 2
"""Exit status where a tool could not do its work; also argparse's own."""


def is_config(path: str | Path) -> bool:
    """Whether an argument that may be a trained network, a picture or a folder names a config."""
    return Path(path).suffix in (".yaml", ".yml")


def verbs() -> dict[str, str]:
    """Every tool on disk with the first line of its docstring; nothing is imported."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: _first_line(_folder / f"{name}.py") for name in names}


def _first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _usage() -> str:
    rows = verbs()
    width = max(map(len, rows), default=0)
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())
    return f"usage: visionmtl VERB ...\n\n{listing}\n\n'visionmtl VERB --help' explains one of them."


def main(argv: list[str] | None = None) -> int:
    """Hand the arguments after the verb to that tool's `main`; returns its exit status, 2 for an unknown verb."""
    asked, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if asked in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if asked == "--version":
        print(f"visionmtl {__version__}")
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
        return ERROR

    sys.argv = [f"visionmtl {verb}", *rest]  # what the run's record shows
    return int(importlib.import_module(f"visionmtl.cli.{verb}").main(rest))


# ---- what every tool shares ----


class ToolParser(argparse.ArgumentParser):
    """The parser of `visionmtl NAME`, however it was started; an unknown option that is a setting gets a hint.

    manual: what stands below the options, as it is written: what one must know, and "examples:" with commands
    """

    def __init__(self, name: str, description: str | None, manual: str) -> None:
        super().__init__(
            prog=f"visionmtl {name}", description=description, epilog=manual.strip("\n"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.add_argument("--version", action="version", version=f"visionmtl {__version__}")

    def add_overrides(self, what: str = "settings that replace those of the file") -> None:
        """The positional `overrides`, behind all other positionals."""
        # with a default, or argparse would call it required where another positional is missing
        self.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help=what)

    def add_imports(self) -> None:
        """The option --allow-import, for tools that read what somebody else may have written; see `run_tool`."""
        self.add_argument(
            "--allow-import", action="append", default=[], metavar="MODULE",
            help="let a checkpoint import this module of plug-ins, which runs it; may be repeated; default: none",
        )  # fmt: skip

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but for empty arguments, which would be taken for options that are not given or for `.`."""
        words = list(sys.argv[1:] if args is None else args)
        for before, word in zip(["the command", *words], words, strict=False):
            if word == "" or re.fullmatch(r"--[\w-]+=", word):
                self.error(
                    f"{word or f'what follows {before}'} is empty; a value is needed; a variable of the shell that is "
                    "not set gives none: set it, or leave the option out"
                )
        return super().parse_known_args(args, namespace)

    def parse_intermixed_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse; a setting behind an option that may take more (`--resume optim.lr=1`) is a setting."""
        parsed = super().parse_intermixed_args(*args, **kwargs)
        for action in self._actions if "overrides" in parsed else ():
            if action.option_strings and action.nargs in ("+", "?"):
                value = getattr(parsed, action.dest)
                values = [value] if isinstance(value, str) else value or []
                settings = [one for one in values if is_setting(one)]
                parsed.overrides = [*parsed.overrides, *settings]
                if settings:
                    others = [one for one in values if one not in settings]
                    setattr(parsed, action.dest, others if action.nargs == "+" else action.const)
        return parsed

    def error(self, message: str) -> NoReturn:
        """As argparse; `--lr 0.1` is told of `optim.lr=0.1`."""
        unknown = re.match(r"unrecognized arguments: --?([\w.-]+)(?:[= ](\S+))?", message)
        if unknown and "overrides" in {action.dest for action in self._actions}:
            name = unknown[1].rpartition(".")[2].replace("-", "_")
            hints = [f"{path}={unknown[2] or 'VALUE'}" for path in settings_called(name)]
            message += f"; settings are written a.b=c, without dashes: {' or '.join(hints)}" if hints else ""
        super().error(message)


def is_setting(text: str) -> bool:
    """Whether an argument is a setting, `a.b=c` or `~a.b`, and no path that lies there."""
    return bool(re.match(r"~[A-Za-z_][\w.]*$|[A-Za-z_][\w.]*=", text)) and not Path(text).exists()


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: a whole number from `least` on."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


positive = at_least(1)


def above_zero(text: str) -> float:
    """An argument's type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0; correct it")
    return value


def score(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise argparse.ArgumentTypeError(f"{text!r} is no score; scores are 0 to 1{hint}")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option --device."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")


def add_tasks(parser: argparse.ArgumentParser, which: str = "only these; default: all") -> None:
    """The option --tasks: a list of names, or None where it is not given."""
    parser.add_argument("--tasks", type=_names, metavar="A,B", help=which)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def run_tool(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Do the work of a tool; what its user can cure becomes one line `error: ...` and exit status 2.

    A fault of ours keeps its traceback. What a terminal cannot show is written as its code, and so are control
    characters in the error; a reader that closes the pipe ends the tool silently with 141, as shells call it.
    Inside, `args.allow_import` may be imported by what is read.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    warnings.formatwarning = _warning
    try:
        with allow_imports(getattr(args, "allow_import", ())):
            status = work(args)
        if sys.stdout:  # there is none where the shell closed it
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Python flushes stdout once more at its end, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    # FloatingPointError: the losses of a run are not finite; MemoryError: see `engine.memory_errors`
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        from visionmtl.config.text_files import printable  # here: it imports YAML, for which --help should not wait

        print(f"error: {printable(_told(error))}", file=sys.stderr)
        return ERROR


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One line, as errors are; those of other packages with their place."""
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    return f"warning: {message}\n" if ours else f"warning: {filename}:{lineno}: {category.__name__}: {message}\n"


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return (
            f"{error.filename} cannot be read or written: {error.strerror}; a path that can be reached, with room on "
            "the disk, is needed; choose another, or mend this one"
        )
    if isinstance(error, MemoryError) and ";" not in str(error):  # Python's own, which names nothing
        return (
            f"the memory of this machine, or what this process may have of it, is full ({error or 'MemoryError'}); "
            "less must be needed; lower batch size, image size or the number of workers, or end other programs"
        )
    return str(error)


@contextlib.contextmanager
def tried(*files: Path | None, replace: Path | None = None) -> Iterator[None]:
    """Try files that will be written at the end of long work now; folders that stay empty are removed again.

    replace: one that may exist already.
    Raises OSError where one cannot be written, ValueError where it exists, or is meant twice.
    """
    made: list[Path] = []
    targets = [file for file in (replace, *files) if file is not None]
    try:
        for number, file in enumerate(targets):
            if file.resolve() in [other.resolve() for other in targets[:number]]:
                raise ValueError(f"{file} is to hold two results; each needs a file of its own; name another for one")
            if file.is_dir():
                raise ValueError(f"{file} is a folder; a file is to be written there; add a file name")
            if file is not replace:
                check_new(file)
            made += _make_folder(file.parent)
            trial = file.with_name(f"{file.name}.writing-{os.getpid()}")  # finds names that are too long, too
            trial.touch()
            trial.unlink()
        yield
    finally:
        _remove_empty(made)


@contextlib.contextmanager
def tried_folder(folder: Path) -> Iterator[None]:
    """Try now whether files can be written into a folder, which is made; if it stays empty, it is removed again."""
    made = _make_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield
    finally:
        _remove_empty(made)


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder; returns the folders that did not exist before, outermost first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # as a file
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    return new


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with contextlib.suppress(OSError):  # holds something, or is gone
            folder.rmdir()


if __name__ == "__main__":  # for `torchrun -m visionmtl.cli train ...`
    sys.exit(main())
