"""The documentation as a site: make docs, then open docs/_build/html/index.html."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import reference

import visionmtl

project = "visionmtl"
author = "visionmtl contributors"
copyright = "visionmtl contributors, Apache-2.0"
version = release = visionmtl.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"visionmtl {version}"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
default_role = "code"  # docstrings mark code with single backticks
suppress_warnings = ["myst.xref_missing"]  # pages name files of the repository, which the site does not hold

reference.write(Path(__file__).parent / "configuration.md")
