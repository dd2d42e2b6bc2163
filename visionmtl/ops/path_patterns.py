"""Paths in settings: relative to a folder that they do not leave, with words in braces for parts of names."""

import re
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from visionmtl.ops.file_names import stays_inside


def _check_path(text: str) -> str:
    unknown = set(re.findall(r"{([^}]*)}", text)) - {"split", "stem", "path"}
    if unknown or not stays_inside(text):
        what = f"has {{{'}, {'.join(sorted(unknown))}}}" if unknown else "leads out of `root`"
        raise PydanticCustomError(
            "path",
            "{text}",
            {
                "text": f"path {text!r} {what}; allowed are paths relative to `root`, with / and without '..', and the "
                "words {split}, {stem} and {path}; correct it, or set `root` higher up"
            },
        )
    return text


def _check_per_image(text: str) -> str:
    if "{stem}" not in text and "{path}" not in text:
        raise PydanticCustomError(
            "path", "{text}", {"text": f"path {text!r} is one file for all images; write {{stem}} where names differ"}
        )
    return text


RelativePath = Annotated[str, AfterValidator(_check_path)]
"""{split}: a setting; {stem}: an image's file name without ending; {path}: the same with its folders."""
FilePerImage = Annotated[RelativePath, AfterValidator(_check_per_image)]
"""The same, with {stem} or {path} in it."""
