"""Paths: where the top-level folders of the project lie, and what `~` means. Imports nothing heavy."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder(name: str) -> Path:
    """The folder `name`: `visionmtl/_<name>` in a wheel, `<name>` beside the package in a checkout.

    A wheel cannot install them at the top level: a package called `datasets` would shadow Hugging Face's.
    Raises ImportError when neither is there.
    """
    for folder in (_PACKAGE / f"_{name}", _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise ImportError(
        f"there is neither {_PACKAGE / f'_{name}'} nor {_PACKAGE.parent / name}; the folder {name}/ belongs to "
        "visionmtl; reinstall it"
    )


def home_path(text: str) -> Path:
    """A path from a command line; `~` is the home folder, which a shell does not fill in after `--option=`."""
    return Path(os.path.expanduser(text))
